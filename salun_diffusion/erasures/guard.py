"""Guards on a live pipeline: the third kind of erasure, which changes no weight.

The format, `salun-guard` version 1
-----------------------------------
A safetensors file that holds the tensors that the guard learned from its base model (``Guard.learned``), and none
besides: most guards have none. Its metadata MUST have
    format    MUST be "salun-guard"
    method    MUST be the name of a guard (``salun_diffusion.guards.GUARDS``)
and as JSON
    version   MUST be 1
    options   MUST map the guard's own options to their values; what is missing has its default
    phrases   MUST list one or more texts: what is not to be drawn
beside concept, base_model … as in a masked delta's (``delta.py``). Without tensors it is of no base model: any pipeline
that the guard fits may wear it. What one learned is of the text encoder, or of the denoiser, that it was learned
from.
"""

import hashlib
import json
from dataclasses import asdict

from ..errors import SalunError
from ..guards import GUARDS, find_guard
from ..guards.base import Guard
from ..options import checked
from ..tensors import OUR_HEADER_LIMIT, read_safetensors, write_safetensors
from .base import Erasure
from .format import RESERVED, check_keys, metadata_from_text, metadata_to_text
from .wearing import check_free, is_watched, wear

FORMAT, VERSION = "salun-guard", 1


def save_guard(path, guard: Guard, about: dict) -> None:
    """Write the file, atomically; ``about`` is further metadata, the method's name among it.

    Raises:
        SalunError: metadata that the format cannot hold, or a disk that refuses it.
    """
    options = {key: value for key, value in asdict(guard.options).items() if value is not None and key != "phrases"}
    about = about | {"options": options, "phrases": guard.phrases}
    write_safetensors(path, guard.tensors, metadata_to_text(path, about, format=FORMAT, version=VERSION))


class WornGuard(Erasure):
    """A :class:`salun_diffusion.guards.base.Guard` that watches what a pipeline draws."""

    FORMAT = FORMAT
    in_weights = False
    unfusable = "is a guard, which changes no weight"

    def __init__(self, guard: Guard, metadata: dict):
        self.guard, self.metadata = guard, metadata

    @classmethod
    def load(cls, path):
        tensors, text = read_safetensors(path, OUR_HEADER_LIMIT)
        metadata = metadata_from_text(path, text, FORMAT, VERSION)
        method, options, phrases = (metadata.get(key) for key in ("method", "options", "phrases"))
        if method not in GUARDS:
            raise SalunError(f"{path} holds the guard {method!r}, where {', '.join(GUARDS)} are known; update "
                             "salun_diffusion.")  # fmt: skip
        sound = isinstance(phrases, list) and phrases and all(isinstance(one, str) and one for one in phrases)
        if not sound or not isinstance(options, dict):
            raise SalunError(f"{path} is damaged: it must have options, and phrases that say what is not to be drawn.")
        kind = find_guard(method)
        options = kind.Options(**checked(options, kind.Options, f"{path} is damaged:"))
        check_keys(path, tensors, set(kind.learned))
        guard = kind(options, phrases)
        guard.tensors = tensors
        kept = {key: value for key, value in metadata.items() if key not in RESERVED}
        return cls(guard, kept)

    def digest(self):
        """Of the guard, its options, phrases and tensors."""
        told = [self.metadata["method"], asdict(self.guard.options), self.guard.phrases]
        told += [[name, tensor.double().tolist()] for name, tensor in sorted(self.guard.tensors.items())]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def acts(self, applied):
        return applied.scale != 0

    def check_fit(self, pipe, path, check_base, applied):
        """Any pipeline that the guard fits, whatever its base model."""
        self.guard.check_fit(pipe, str(path))
        self.guard.check_learned(pipe, str(path))
        check_free(pipe, path)

    @classmethod
    def change(cls, pipe, before, after):
        """Hooks and wrapped methods come with the first guard and go with the last; at scale 0 a guard is not asked."""
        wear(pipe, "guards", tuple((one.name, one.scale, one.erasure.guard) for one in after if one.scale))

    @classmethod
    def intact(cls, pipe, one, applied):
        return not one.scale or is_watched(pipe)

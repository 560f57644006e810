"""The adapter file: a LoRA that ``pipe.load_lora_weights`` opens, and that says what it erases from which base model.

The format, `salun-lora` versions 1 and 2
-----------------------------------------
The file that a pipeline's ``save_lora_weights`` writes: a safetensors file which MUST hold, for each layer NAME of the
denoiser that is adapted, of rank r, and no other tensor (PART is ``unet`` or ``transformer``),
    PART.NAME.lora_A.weight   [r, in], or [r, in, height, width] for a convolution
    PART.NAME.lora_B.weight   [out, r], or [out, r, 1, 1]
all in one dtype: float32, float16 or bfloat16. Its metadata MUST have
    lora_adapter_metadata     JSON: what peft's LoraConfig is made of, its names beginning with "PART."; alpha MUST be r
                              in every layer
and, as a masked delta's (``delta.py``), what says where the adapter belongs:
    format      MUST be "salun-lora"
    structure   MUST be the SHA-256 of the denoiser's names and shapes
and as JSON
    version     MUST be 1, or 2 where there is a by_prompt, and only there
    fingerprint MUST be base64 of the base model's fingerprint, float32 [P, 16], little-endian: a tensor of that name
                would keep others from opening the file
    by_prompt   MUST list one or more texts, the concept's names (version 2)
beside concept, method, scope, base_model … as there.

What it means: a layer's output is base(x) + scale * B(A(x)), the sum of all adapters that are active. No weight of the
base model is changed. In version 2 the scale is multiplied for each picture by how near its prompt is to by_prompt, as
``by_prompt.py`` says; it has a version of its own, so that a reader that knows nothing of it does not draw otherwise
without a word. What knows LoRA alone, such as ``load_lora_weights``, acts at full strength on every prompt.
"""

import base64
import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import SalunError
from ..files import listed
from ..tensors import OUR_HEADER_LIMIT, raw_bytes, read_safetensors, write_safetensors
from .delta import DTYPES
from .fingerprint import SAMPLES, Fingerprint
from .format import RESERVED, metadata_from_text, metadata_to_text

FORMAT = "salun-lora"
CONFIG = "lora_adapter_metadata"  # diffusers' name
KEY = re.compile(r"(unet|transformer)\.(.+)\.lora_([AB])\.weight")


def config_of(ranks: dict[str, int]) -> dict:
    """What peft's LoraConfig is made of for these ranks by layer: alpha = rank everywhere, so B(A(x)) as it is."""
    rank = max(ranks.values())
    pattern = {f"^{name}$": one for name, one in sorted(ranks.items()) if one != rank}
    return {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks), "rank_pattern": pattern,
            "alpha_pattern": dict(pattern)}  # fmt: skip


def save_adapter(path, pipe, state: dict[str, torch.Tensor], base: Fingerprint, about: dict) -> None:
    """Write the file, atomically.

    Args:
        path: the file.
        pipe: the pipeline that the adapter is for.
        state: ``NAME.lora_A.weight`` … → values, as ``peft.get_peft_model_state_dict`` gives them; alpha = rank.
        base: the base model's fingerprint.
        about: further metadata; with "by_prompt", the concept's names, the adapter is scaled by prompt.

    Raises:
        SalunError: metadata that the format cannot hold, or a disk that refuses it.
    """
    path, part = Path(path), "unet" if hasattr(pipe, "unet") else "transformer"
    ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in state.items() if ".lora_A." in name}
    with tempfile.TemporaryDirectory() as folder:
        type(pipe).save_lora_weights(
            folder, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config_of(ranks)}
        )
        tensors, text = read_safetensors(next(Path(folder).glob("*.safetensors")))
    samples = base.samples.numpy().astype("<f4").tobytes()
    version = 2 if about.get("by_prompt") else 1
    reserved = {"format": FORMAT, "version": version, "structure": base.structure, CONFIG: json.loads(text[CONFIG]),
                "fingerprint": base64.b64encode(samples).decode()}  # fmt: skip
    write_safetensors(path, tensors, metadata_to_text(path, about, **reserved))


@dataclass(eq=False)
class Adapter:
    """A low-rank adapter in memory.

    Attributes:
        part: the pipeline's part that it is for, "unet" or "transformer".
        factors: layer → (A, B), as the file has them.
        fingerprint: of the base model.
        metadata: concept, method, scope, base_model …, and by_prompt where it is scaled by that.
    """

    part: str
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    fingerprint: Fingerprint
    metadata: dict

    @classmethod
    def load(cls, path) -> "Adapter":
        """Read the file, factors in their stored dtype, everything on the CPU.

        Raises:
            SalunError: any fault in it.
        """
        tensors, text = read_safetensors(path, OUR_HEADER_LIMIT)
        metadata = metadata_from_text(path, text, FORMAT, 1, 2)
        names = metadata.get("by_prompt")
        sound = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
        if not sound if metadata["version"] == 2 else names is not None:
            raise SalunError(
                f"{path} is damaged: version 2 of the format, and no other, must have the names by_prompt."
            )
        found = {name: KEY.fullmatch(name) for name in tensors}
        if odd := [name for name, match in found.items() if match is None]:
            raise SalunError(f"{path} is damaged: {listed(odd)} is no factor of a layer.")
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        for name, match in found.items():
            pairs.setdefault(match[2], {})[match[3]] = tensors[name]
        odd = [name for name, pair in pairs.items() if not _is_pair(pair)]
        parts, dtypes = {match[1] for match in found.values()}, {value.dtype for value in tensors.values()}
        if odd or len(parts) != 1 or len(dtypes) != 1 or not dtypes <= {*DTYPES}:
            what = f" (see {listed(odd)})" if odd else ""
            raise SalunError(f"{path} is damaged: its factors do not fit together{what}.")
        part, factors = parts.pop(), {name: (pair["A"], pair["B"]) for name, pair in sorted(pairs.items())}
        config, base = metadata.pop(CONFIG, None), _fingerprint(path, metadata)
        metadata = {key: value for key, value in metadata.items() if key not in RESERVED}
        adapter = cls(part, factors, base, metadata)
        if config != adapter.as_peft()[1]:  # others go by it
            raise SalunError(f"{path} is damaged: its {CONFIG} is not that of its factors, with alpha = rank.")
        return adapter

    @property
    def by_prompt(self) -> list[str] | None:
        """The names that prompts are compared with; None where it acts on every prompt alike."""
        return self.metadata.get("by_prompt")

    def digest(self) -> str:
        """SHA-256 (hex) of what it does, whatever file it came from: names, shapes and factors, and by_prompt."""
        sha = hashlib.sha256(json.dumps(self.by_prompt).encode() if self.by_prompt else b"")
        for name, pair in self.factors.items():
            for factor in pair:
                sha.update(json.dumps([name, list(factor.shape), str(factor.dtype)]).encode() + raw_bytes(factor))
        return sha.hexdigest()

    def as_peft(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The state dict and the config that diffusers' ``load_lora_adapter`` takes."""
        state = {}
        for name, (down, up) in self.factors.items():
            state |= {f"{self.part}.{name}.lora_A.weight": down, f"{self.part}.{name}.lora_B.weight": up}
        config = config_of({name: len(down) for name, (down, _) in self.factors.items()})
        return state, {f"{self.part}.{key}": value for key, value in config.items()}


def _is_pair(pair: dict[str, torch.Tensor]) -> bool:
    """Whether the two factors are those of one linear layer or convolution."""
    if pair.keys() != {"A", "B"}:
        return False
    down, up = pair["A"], pair["B"]
    return down.ndim in (2, 4) and len(down) > 0 and up.shape[1:] == (len(down), *(1,) * (down.ndim - 2))


def _fingerprint(path, metadata: dict) -> Fingerprint:
    try:
        samples = np.frombuffer(base64.b64decode(metadata.pop("fingerprint"), validate=True), "<f4")
        samples = torch.from_numpy(samples.astype(np.float32)).view(-1, SAMPLES)
        if re.fullmatch("[0-9a-f]{64}", metadata["structure"]) and samples.isfinite().all():
            return Fingerprint(metadata["structure"], samples)
    except (KeyError, ValueError, TypeError, RuntimeError):
        pass
    raise SalunError(f"{path} is damaged: its metadata hold no fingerprint of the base model, or a damaged one.")

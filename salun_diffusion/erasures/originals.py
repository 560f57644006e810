"""What a pipeline's weights were before erasures, and how the two are exchanged.

A parameter on the CPU is not written over: it is given another tensor, and the base model's own one is kept. So taking
erasures off, or turning one off and on again, moves no weights. On other devices, and where hooks or processes hold the
same memory, weights are copied into the parameter, from and to tensors on the CPU.
"""

from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from .base import Erasure
from .merge import checksum

# denoiser -> parameter -> the tensor that an erasure left. Freeing it at once would crash a thread that draws with it
# right then, and the next erasure needs as much memory again, which is quicker to get from here than from the system.
SPARE: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()
BLOCK, LOOKED_AT = 1 << 12, 1 << 9  # 64-bit words: of each 32 kB of a parameter, `Written.quick` reads 4


class Written(NamedTuple):
    """How the weights that erasures wrote are known again."""

    dtype: torch.dtype
    checksum: int | None  # of all; None if only `quick` was made
    pointer: int  # where they lie, and what PyTorch counts there for every edit that it knows of
    version: int
    quick: int | None  # the checksum of some, evenly spaced; None if they do not lie row-major on the CPU

    @classmethod
    def of(cls, weight: torch.Tensor, known: int | None = None) -> "Written":
        """Of ``weight`` as it is; ``known`` is its checksum, where that has been made."""
        quick = _quick(weight)
        total = checksum(weight) if quick is None and known is None else known
        return cls(weight.dtype, total, weight.data_ptr(), _version(weight), quick)


class Kept(NamedTuple):
    """The weights with one erasure on, alone, at a scale."""

    scale: float
    weights: torch.Tensor
    checksum: int


@dataclass(eq=False)
class Original:
    """A parameter that erasures change, shared by all that do.

    Attributes:
        base: the base model's weights, on the CPU, in the dtype that they had.
        written: what is there now, known again by this.
        kept: the weights of erasures that are on, but turned off.
    """

    base: torch.Tensor
    written: Written | None = None
    kept: dict[Erasure, Kept] = field(default_factory=dict)

    def base_as(self, dtype: torch.dtype) -> torch.Tensor:
        """The base model's weights after a change of dtype, row-major, one dimension."""
        return self.base.to(dtype).contiguous().view(-1)

    def is_there(self, weight: torch.Tensor, thorough: bool) -> bool:
        """Whether ``weight`` holds what was written, bit for bit; False also after a change of dtype.

        An edit is always seen if ``thorough``. Otherwise one that PyTorch does not count (of ``weight.data``, or from
        numpy) might be missed, if it leaves all of some 16 thousand weights as they were but 15 thousand next to each
        other, where 2.3 GB are looked at in a twentieth of a second.
        """
        known = self.written
        if weight.dtype != known.dtype or weight.shape != self.base.shape:
            return False
        moved = weight.data_ptr() != known.pointer  # to another device and back, or in a copy of the pipeline
        if known.checksum is None or not (thorough or moved or known.quick is None):
            return (moved or _version(weight) == known.version) and _quick(weight) == known.quick
        return checksum(weight) == known.checksum


def can_exchange(weight: torch.Tensor) -> bool:
    """Whether the parameter may be given another tensor, where its module has no hooks that hold its memory."""
    return weight.device.type == "cpu" and type(weight.data) is torch.Tensor and not weight.is_shared()


def has_offloading(module: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps the weights' memory itself."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any("group_offloading" in getattr(registry, "hooks", {}) for registry in registries)


def put(weight: nn.Parameter, values: torch.Tensor, exchange: bool) -> None:
    """Make ``weight`` hold ``values``: by giving it that tensor, if ``exchange`` and it has the same form."""
    if exchange and (values.dtype, values.stride()) == (weight.dtype, weight.stride()):
        if values.data_ptr() != weight.data_ptr():
            weight.data = values
    else:
        weight.copy_(values)


def room_for(module: nn.Module, name: str, weight: nn.Parameter) -> torch.Tensor:
    """A tensor of ``weight``'s form for the parameter ``name``: the spare one, or a new one."""
    spare = SPARE.get(module, {}).pop(name, None)
    form = (weight.shape, weight.dtype, weight.stride())
    if spare is not None and (spare.shape, spare.dtype, spare.stride()) == form:
        return spare
    return torch.empty_like(weight, requires_grad=False)


def _version(weight) -> int:
    return 0 if weight.is_inference() else weight._version  # they count nothing


def _quick(weight) -> int | None:
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    whole = weight.detach().view(-1).view(torch.uint8).numpy()
    words = whole[: len(whole) // 8 * 8].view(np.uint64)
    if len(words) <= 2 * BLOCK:
        return checksum(weight)
    blocks = words[: len(words) // BLOCK * BLOCK].reshape(-1, BLOCK)
    return int(blocks[:, :LOOKED_AT].sum()) + int(words[-LOOKED_AT:].sum())

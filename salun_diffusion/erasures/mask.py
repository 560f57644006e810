"""Masks: which weights may move. Packed to one bit a weight, and kept in a file that can be read on its own.

Bit order: weights are counted row-major; bit k (of value 2**k) of byte j is weight 8*j + k. Bits past the last
weight MUST be zero. (In numpy's words: `np.packbits(mask, bitorder="little")`.)

A mask file is a safetensors file with one uint8 tensor `NAME.mask` a parameter and the metadata
    format   "salun-mask"
    version  1
    shapes   JSON: {NAME: [sizes]}
    ...      whatever the writer adds: the keys in TEXT are plain text, every other value is JSON.
The limits of :mod:`salun_diffusion.erasures.delta` hold for it too.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ..errors import SalunError
from ..tensors import OUR_HEADER_LIMIT, read_safetensors, write_safetensors
from .format import RESERVED, check_keys, metadata_from_text, metadata_to_text, read_shapes

FORMAT, VERSION = "salun-mask", 1


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor of any shape, n weights → a uint8 tensor of ceil(n / 8) bytes, on the CPU.

    Raises:
        SalunError: another dtype.
    """
    if mask.dtype != torch.bool:
        raise SalunError(f"A mask must be a bool tensor, not {mask.dtype}.")
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack(packed: torch.Tensor, shape) -> torch.Tensor:
    """The inverse of :func:`pack`: uint8, ceil(n / 8) bytes → bool of ``shape``.

    Raises:
        SalunError: dtype or length do not fit the shape, or a bit past the last weight is set.
    """
    check_packed(packed, shape)
    bits = np.unpackbits(packed.cpu().numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).reshape(tuple(shape))


def check_packed(packed: torch.Tensor, shape) -> None:
    """Pass if ``packed`` is a packed mask of ``shape``.

    Raises:
        SalunError: dtype or length do not fit the shape, or a bit past the last weight is set.
    """
    count = math.prod(shape)
    length = -(-count // 8)
    if packed.dtype != torch.uint8 or packed.shape != (length,):
        raise SalunError(
            f"a packed mask of shape {tuple(shape)} is {length} bytes of uint8, "
            f"but this one is {packed.dtype} of shape {tuple(packed.shape)}."
        )
    if count % 8 and int(packed[-1]) >> count % 8:
        raise SalunError(f"a packed mask has bits set past its last weight (of {count}), so it is damaged.")


class PackedMasks(Mapping):
    """Masks as a file holds them, one bit a weight: parameter name → bool tensor, made anew whenever it is asked for.

    Attributes:
        packed: parameter name → its bits (:func:`pack`), sound (:func:`check_packed`).
        shapes: parameter name → its sizes.
    """

    def __init__(self, packed: dict[str, torch.Tensor], shapes: dict):
        self.packed, self.shapes = packed, {name: tuple(shape) for name, shape in shapes.items()}

    def __getitem__(self, name):
        return unpack(self.packed[name], self.shapes[name])

    def __contains__(self, name):
        return name in self.packed

    def __iter__(self):
        return iter(self.packed)

    def __len__(self):
        return len(self.packed)


def count_bits(packed: torch.Tensor) -> int:
    """How many weights a packed mask on the CPU selects."""
    pieces = packed.split(1 << 14)  # unpacked, they fit a cache
    return sum(int(np.count_nonzero(np.unpackbits(piece.numpy()).view(bool))) for piece in pieces)


def places(packed: torch.Tensor) -> torch.Tensor:
    """A packed mask on any device -> the row-major places of its weights, int64, in order."""
    if packed.device.type == "cpu":  # where half of the weights are chosen, torch's nonzero takes ten times as long
        return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.numpy(), bitorder="little").view(bool)))
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten().nonzero().flatten()


class MaskRow(NamedTuple):
    """One line of `describe`: of `total` weights of the parameter `name`, `kept` may move: the share kept / total."""

    name: str
    kept: int
    total: int
    share: float


def describe(masks: dict[str, torch.Tensor]) -> list[MaskRow]:
    """Per parameter, in the masks' order, how many weights may move."""
    rows = []
    for name, mask in masks.items():
        kept, total = int(torch.count_nonzero(mask)), mask.numel()
        rows.append(MaskRow(name, kept, total, kept / total if total else 0.0))
    return rows


def union(masks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weights that any of ``masks``, which are of the same parameters, lets move."""
    return {name: torch.stack([mask[name] for mask in masks]).any(0) for name in masks[0]}


def save_masks(path, masks: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write bool masks and ``metadata`` (text under the keys in ``TEXT``, anything JSON holds elsewhere), atomically.

    Raises:
        SalunError: no weight at all is selected, a mask is not bool, or the metadata cannot be stored.
    """
    check_not_empty(path, masks)
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    text = metadata_to_text(path, metadata, format=FORMAT, version=VERSION, shapes=shapes)
    write_safetensors(path, {f"{name}.mask": pack(mask) for name, mask in masks.items()}, text)


def load_masks(path) -> tuple[dict[str, torch.Tensor], dict]:
    """The masks (bool, by parameter name) and the writer's metadata of a mask file.

    Raises:
        SalunError: any fault in it.
    """
    tensors, text = read_safetensors(path, OUR_HEADER_LIMIT)
    metadata = metadata_from_text(path, text, FORMAT, VERSION)
    shapes = read_shapes(path, metadata)
    check_keys(path, tensors, {f"{name}.mask" for name in shapes})
    masks = packed_masks(path, tensors, shapes)
    return dict(masks), {key: value for key, value in metadata.items() if key not in RESERVED}


def packed_masks(path, tensors: dict, shapes: dict) -> PackedMasks:
    """The masks in the ``tensors`` of a file.

    Raises:
        SalunError: none selects a weight, or one does not fit its shape.
    """
    packed = {name: tensors[f"{name}.mask"] for name in shapes}
    check_not_empty(path, packed)
    for name, shape in shapes.items():
        try:
            check_packed(packed[name], shape)
        except SalunError as error:
            raise SalunError(f"{path} is damaged: {name}.mask: {error}") from error
    return PackedMasks(packed, shapes)


def check_not_empty(what, masks: Mapping) -> None:
    if not any(mask.any() for mask in masks.values()):
        raise SalunError(f"{what}: the mask selects no weight at all; choose a density above 0, or another scope.")

"""Masks: which weights may move. Packed to one bit a weight, and kept in a file that can be read on its own.

Bit order: weights are counted row-major; bit k (of value 2**k) of byte j is weight 8*j + k. Bits past the last
weight MUST be zero. (In numpy's words: `np.packbits(mask, bitorder="little")`.)

A mask file is a safetensors file with one uint8 tensor `NAME.mask` a parameter and the metadata
    format   "salun-mask"
    version  1
    shapes   JSON: {NAME: [sizes]}
    ...      whatever the writer adds: the keys in TEXT are plain text, every other value is JSON.
"""

import json
import math
from typing import NamedTuple

import numpy as np
import torch

from ..errors import SalunError
from ..files import listed, read_safetensors, write_safetensors

FORMAT, VERSION = "salun-mask", 1
TEXT = ("format", "concept", "method", "scope", "base_model", "base_revision", "structure")
RESERVED = ("format", "version", "shapes", "structure")  # written by the library, never by its caller


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor of any shape, n weights -> a uint8 tensor of ceil(n / 8) bytes, on the CPU."""
    if mask.dtype != torch.bool:
        raise SalunError(f"A mask must be a bool tensor, not {mask.dtype}.")
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack(packed: torch.Tensor, shape) -> torch.Tensor:
    """The inverse of `pack`: uint8, ceil(n / 8) bytes -> bool of `shape`.

    Raises SalunError if dtype or length do not fit the shape, or a bit past the last weight is set.
    """
    count = math.prod(shape)
    length = -(-count // 8)
    if packed.dtype != torch.uint8 or packed.shape != (length,):
        raise SalunError(
            f"a packed mask of shape {tuple(shape)} is {length} bytes of uint8, "
            f"but this one is {packed.dtype} of shape {tuple(packed.shape)}."
        )
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if bits[count:].any():
        raise SalunError(f"a packed mask has bits set past its last weight (of {count}), so it is damaged.")
    return torch.from_numpy(bits[:count]).view(torch.bool).reshape(tuple(shape))


def places(packed: torch.Tensor) -> torch.Tensor:
    """A packed mask on any device -> the row-major places of its weights, int64, in order."""
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
    """Writes bool masks and `metadata` (strings under the keys in TEXT, anything JSON holds elsewhere), atomically.

    Raises SalunError if no weight at all is selected, a mask is not bool, or the metadata cannot be stored.
    """
    check_not_empty(path, masks)
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    text = metadata_to_text(path, metadata, format=FORMAT, version=VERSION, shapes=shapes)
    write_safetensors(path, {f"{name}.mask": pack(mask) for name, mask in masks.items()}, text)


def load_masks(path) -> tuple[dict[str, torch.Tensor], dict]:
    """The masks (bool, by parameter name) and the writer's metadata of a mask file. Raises SalunError on any fault."""
    tensors, text = read_safetensors(path)
    metadata = metadata_from_text(path, text, FORMAT, VERSION)
    shapes = read_shapes(path, metadata)
    check_keys(path, tensors, {f"{name}.mask" for name in shapes})
    masks = unpack_all(path, tensors, shapes)
    check_not_empty(path, masks)
    return masks, {key: value for key, value in metadata.items() if key not in RESERVED}


# What the mask file and the delta file have in common.


def metadata_to_text(path, metadata: dict, **reserved) -> dict[str, str]:
    """Metadata as safetensors stores it, text to text; a value of None is left out."""
    taken = set(metadata) & set(RESERVED)
    if taken:
        raise SalunError(f"Cannot write {path}: the format itself fills the metadata {listed(taken)}; rename yours.")
    text = {}
    for key, value in {**metadata, **reserved}.items():
        if value is None:
            continue
        if key in TEXT and not isinstance(value, str):
            raise SalunError(f"Cannot write {path}: metadata {key!r} must be text, not {type(value).__name__}.")
        try:
            text[key] = value if key in TEXT else json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SalunError(f"Cannot write {path}: JSON cannot hold metadata {key!r} ({error}).") from error
    return text


def metadata_from_text(path, text: dict[str, str], format: str, version: int) -> dict:
    """The inverse of `metadata_to_text`; refuses another format, or a version that is not ours."""
    found = text.get("format")
    if found != format:
        raise SalunError(f"{path} is not a {format} file (its metadata says {found!r}); give one that this tool wrote.")
    metadata = {}
    for key, value in text.items():
        try:
            metadata[key] = value if key in TEXT else json.loads(value)
        except ValueError as error:
            raise SalunError(f"{path} is damaged: its metadata {key!r} is not JSON.") from error
    if metadata.get("version") != version:
        raise SalunError(
            f"{path} has version {metadata.get('version')!r} of the {format} format where {version} is known; "
            "update salun_diffusion."
        )
    return metadata


def read_shapes(path, metadata: dict) -> dict[str, list[int]]:
    shapes = metadata.get("shapes")
    sound = isinstance(shapes, dict) and all(
        isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) for shape in shapes.values()
    )
    if not sound:
        raise SalunError(f"{path} is damaged: its metadata 'shapes' must map each parameter to its sizes.")
    return shapes


def check_keys(path, tensors: dict, expected: set[str]) -> None:
    missing, unexpected = expected - set(tensors), set(tensors) - expected
    if missing:
        raise SalunError(f"{path} is damaged: it lacks the tensors {listed(missing)}.")
    if unexpected:
        raise SalunError(f"{path} is damaged: it holds tensors that its metadata does not name: {listed(unexpected)}.")


def unpack_all(path, tensors: dict, shapes: dict) -> dict[str, torch.Tensor]:
    masks = {}
    for name, shape in shapes.items():
        try:
            masks[name] = unpack(tensors[f"{name}.mask"], shape)
        except SalunError as error:
            raise SalunError(f"{path} is damaged: {name}.mask: {error}") from error
    return masks


def check_not_empty(what, masks: dict) -> None:
    if not any(mask.any() for mask in masks.values()):
        raise SalunError(f"{what}: the mask selects no weight at all; choose a density above 0, or another scope.")

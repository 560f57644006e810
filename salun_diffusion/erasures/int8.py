"""Values of a delta as int8, with one scale for each row of the parameter: half of float16, at an error that is told.

Our own choice, of no paper: symmetric rounding to the nearest of 255 steps. A scale has bfloat16's 8 bits of precision,
so that a value times its scale is exact in float32, and values that were rounded once stay as they are.
"""

import math

import torch

from ..errors import SalunError
from .mask import places

MOST = 127


def rows(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """For each value of a packed mask of ``shape`` the row of the parameter that it is of: the index of the first of at
    least two dimensions, or 0.
    """
    where = places(packed)
    return where // math.prod(shape[1:]) if len(shape) > 1 else torch.zeros_like(where)


def count(shape: tuple[int, ...]) -> int:
    """How many rows, and scales, a parameter of ``shape`` has."""
    return shape[0] if len(shape) > 1 else 1


def pack(values: torch.Tensor, row: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(int8, scales)`` of fp32 ``values``; scales are bfloat16 ``(number,)``, 1 where a row has no value but 0."""
    values = values.float()
    largest = torch.zeros(number).scatter_reduce_(0, row, values.abs(), "amax")
    scales = (largest / MOST).bfloat16()
    scales[scales == 0] = 1
    return (values / scales.float()[row]).round().clamp(-MOST, MOST).to(torch.int8), scales


def unpack(packed: torch.Tensor, scales: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack`, fp32."""
    return packed.float() * scales.float()[row]


def check(path, name: str, packed: torch.Tensor, scales: torch.Tensor, row: torch.Tensor, number: int) -> None:
    """Pass if these are what :func:`pack` makes.

    Raises:
        SalunError: they are not, so that the file is damaged.
    """
    dtypes = (packed.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    sound = dtypes and scales.shape == (number,) and packed.shape == row.shape
    if sound:
        largest = torch.zeros(number, dtype=torch.int32).scatter_reduce_(0, row, packed.int().abs(), "amax")
        usual = (largest == MOST) & scales.isfinite() & (scales > 0)
        sound = bool((usual | (largest == 0) & (scales == 1)).all())
    if not sound:
        raise SalunError(f"{path} is damaged: the int8 values of {name} and their scales do not fit together.")

"""Recognising a base model: the same weights in fp32, fp16 or bf16 are one model, another fine-tune is not.

A few evenly spaced weights of every parameter are kept. What it means for two such samples to be roundings of one model
is the last paragraph of the format in ``delta.py``.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch

from ..errors import SalunError
from ..files import listed
from ..models.quantized import check_not_quantized
from ..tensors import raw_bytes

SAMPLES = 16
ROUNDINGS = (
    (),
    (torch.float16,),
    (torch.bfloat16,),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a base model is recognised by: `structure` (SHA-256 of names and shapes), `samples` (float32 [P, 16])."""

    structure: str
    samples: torch.Tensor

    def digest(self) -> str:
        """16 hex digits that stand for exactly these weights (another rounding of the model has others)."""
        return hashlib.sha256(self.structure.encode() + raw_bytes(self.samples)).hexdigest()[:16]


def fingerprint(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> Fingerprint:
    """The fingerprint of a whole denoiser: `fingerprint(module.named_parameters())`, any dtype, any device.

    Raises:
        SalunError: weights without values (meta device), quantized ones, or NaN or Inf among the samples.
    """
    steps, shapes, rows = torch.arange(SAMPLES), {}, {}
    for name, weight in named_parameters:  # one at a time: the caller may make them as it goes
        check_have_values({name: weight})
        check_not_quantized({name: weight}, "load the model unquantized, and quantize it once its erasures are loaded")
        shapes[name], rows[name] = list(weight.shape), torch.zeros(SAMPLES)
        if weight.numel():
            places = steps * (weight.numel() - 1) // (SAMPLES - 1)
            rows[name].copy_(weight.detach().flatten()[places.to(weight.device)])
    broken = [name for name, row in rows.items() if not row.isfinite().all()]
    if broken:
        raise SalunError(f"The model holds NaN or Inf in {listed(broken)}; load a sound copy of it.")
    structure = hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()
    return Fingerprint(structure, torch.stack([rows[name] for name in sorted(rows)]))


def check_have_values(parameters: dict[str, torch.Tensor]) -> None:
    if any(weight.is_meta for weight in parameters.values()):
        raise SalunError(
            "The weights are on the meta device (sequential offloading keeps them elsewhere); "
            "do this before enable_sequential_cpu_offload(), or after pipe.remove_all_hooks()."
        )


def matches(a: Fingerprint, b: Fingerprint) -> bool:
    """True if `a` and `b` can be roundings of one model, as the format's last paragraph says."""
    if a.structure != b.structure or a.samples.shape != b.samples.shape:
        return False
    if torch.equal(a.samples, b.samples):
        return True
    ranges_a = [_origins(a.samples, rounding) for rounding in ROUNDINGS]
    ranges_b = [_origins(b.samples, rounding) for rounding in ROUNDINGS]
    return any(
        bool((torch.maximum(low_a, low_b) <= torch.minimum(high_a, high_b)).all())
        for (low_a, high_a), (low_b, high_b) in product(ranges_a, ranges_b)
    )


def _origins(samples, rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest float32 weight that `rounding` turns into each sample, as places (see `_place`).

    Rounding never swaps two numbers, so both ends are found by bisection. That settles ties, subnormals and double
    rounding by the very conversions that made the samples, where half an ulp to either side is only nearly right.
    """
    place, ends = _place(samples), []
    if not rounding:
        return place, place
    for reaches in (torch.ge, torch.gt):  # first place whose rounding is >= the sample, first whose is > it
        low = torch.full(samples.shape, -(1 << 31))
        high = -low
        while (low + 1 < high).any():
            middle = (low + high) >> 1
            there = reaches(_round(_number(middle), rounding), samples)
            low, high = torch.where(there, low, middle), torch.where(there, middle, high)
        ends.append(high)
    # A parameter with a sample that this rounding does not leave as it is was not rounded: only itself will do.
    kept = (_round(samples, rounding) != samples).any(dim=1, keepdim=True)
    return torch.where(kept, place, ends[0]), torch.where(kept, place, ends[1] - 1)


def _round(numbers, rounding):
    for dtype in rounding:
        numbers = numbers.to(dtype)
    return numbers.float()


def _place(numbers) -> torch.Tensor:
    """float32 -> int64, in the same order: neighbouring numbers have neighbouring places, 0.0 and -0.0 place 0."""
    bits = numbers.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _number(places) -> torch.Tensor:
    """The inverse of `_place`; places past the finite numbers give infinity."""
    size = places.abs().clamp(max=0x7F800000).int().view(torch.float32)
    return torch.where(places < 0, -size, size)

"""Which weights carry a concept: gradients → scores → the exact global top ρ → a mask (SalUn, eq. 3-4).

The score of a weight is ``|Σ_batches ∇_θ ℓ_f(θ0)|`` over one pass of the forget set, or another of ``SALIENCY``. Its
mask is 1 for exactly ⌊ρN⌋ of all N scored weights, chosen over all layers together; equal scores are taken in parameter
order, then row-major.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction

import torch

from ..erasures.mask import check_not_empty
from ..errors import SalunError

CHUNK = 1 << 20  # scores looked at together: they fit a cache, and extra memory stays at some megabytes


def scores(
    parameters: dict[str, torch.nn.Parameter],
    losses: Iterable[Callable[[], torch.Tensor]],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda total: total,
    square: bool = False,
) -> dict[str, torch.Tensor]:
    """``|Σ ∇loss|`` per parameter, fp32, of the parameters' shapes; ``Σ (∇loss)²`` with ``square``.

    Each loss is made, differentiated and dropped; besides the running sum only one parameter's dense gradient exists at
    a time (and the sum is fp32 also where the weights are not). ``reduce`` adds up the sums of several processes.

    What an earlier backward left in the parameters' ``grad`` does not count, and is there again afterwards.

    Raises:
        SalunError: a score is NaN or Inf, or all are zero.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

    def add(parameter: torch.nn.Parameter, name: str) -> None:
        total[name] += parameter.grad.float().square() if square else parameter.grad
        parameter.grad = None

    earlier = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None  # backward would add to it
    hooks = [p.register_post_accumulate_grad_hook(lambda p, name=name: add(p, name)) for name, p in parameters.items()]
    try:
        for loss in losses:
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.grad = earlier[name]
    for name in total:
        total[name] = reduce(total[name])
    for name, score in total.items():
        if not score.abs_().isfinite().all():
            raise SalunError(
                f"The saliency of {name} is not finite: use bf16 or fp32 instead of fp16, or check the data."
            )
    if not any(score.any() for score in total.values()):
        raise SalunError("The saliency is zero everywhere: the loss does not depend on any weight in the scope.")
    return total


def times_weights(
    scores: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """``scores · |θ|``, of their shapes."""
    return {name: score * magnitudes({name: parameters[name]})[name] for name, score in scores.items()}


def contrast(forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``forget / (1 + retain / mean(retain))``, the mean over all weights: what the rest needs more than usual is
    scored down, and what it needs less is as the forget set says.
    """
    mean = sum(float(score.double().sum()) for score in retain.values()) / sum(map(torch.numel, retain.values()))
    return {name: score / (1 + retain[name] / mean) for name, score in forget.items()}


def magnitudes(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """``|θ|``, fp32, of the parameters' shapes."""
    return {name: p.detach().float().abs() for name, p in parameters.items()}


def random_scores(parameters: dict[str, torch.nn.Parameter], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Numbers in [0, 1), fp32, of the parameters' shapes, on the CPU."""
    return {name: torch.rand(p.shape, generator=generator) for name, p in parameters.items()}


def select(scores: dict[str, torch.Tensor], density: float, threshold: str = "global") -> dict[str, torch.Tensor]:
    """The mask (bool, by parameter) of the weights that may move: the top ``density`` of all, or of each layer.

    Args:
        scores: fp32, finite, ≥ 0, by parameter.
        density: ρ in (0, 1].
        threshold: "global", one threshold over all scores (SalUn, eq. 4), or "layer", each parameter's own; one too
            small for a share of its own (a norm's few weights at a low density) then stays as it is.

    Raises:
        SalunError: no weight is left.
    """
    if threshold == "global":
        return top_density(scores, density)
    masks = {}
    for name, score in scores.items():
        fits = int(Fraction(str(density)) * score.numel()) > 0
        chosen = top_density({name: score}, density) if fits else {name: torch.zeros_like(score, dtype=torch.bool)}
        masks |= chosen
    check_not_empty(f"A density of {density} in each layer", masks)
    return masks


def top_density(scores: dict[str, torch.Tensor], density: float) -> dict[str, torch.Tensor]:
    """The mask (bool, by parameter) of exactly ``⌊density · N⌋`` highest of N scores, without a sort.

    The bit patterns of non-negative floats are ordered as the floats are. Two histograms, over the upper and, within
    one bin, over the lower 16 bits, give the exact threshold; each score is read three times.

    Args:
        scores: fp32, finite, ≥ 0.
        density: ρ in (0, 1].

    Raises:
        SalunError: ``density`` out of range, or so small that no weight is left.
    """
    count = sum(score.numel() for score in scores.values())
    keep = int(Fraction(str(density)) * count)  # 0.29 of 100 is 29, though 0.29 * 100 < 29 in floats
    if not 0 < density <= 1 or keep == 0:
        raise SalunError(f"A density of {density} keeps no weight, or too many, of {count}: give a share in (0, 1].")
    bits = {name: score.contiguous().view(torch.int32).flatten() for name, score in scores.items()}
    upper = _histogram((chunk >> 16 for chunk in _chunks(bits)), 1 << 15)
    high, above = _bin(upper, keep)
    lower = _histogram((chunk[chunk >> 16 == high] & 0xFFFF for chunk in _chunks(bits)), 1 << 16)
    low, above_low = _bin(lower, keep - above)
    threshold, ties = (high << 16) | low, keep - above - above_low
    masks = {}
    for name, flat in bits.items():
        mask = torch.empty_like(flat, dtype=torch.bool)
        for chunk, part in zip(flat.split(CHUNK), mask.split(CHUNK), strict=True):
            torch.gt(chunk, threshold, out=part)
            if ties:
                equal = (chunk == threshold).nonzero().flatten()[:ties]
                part[equal] = True
                ties -= len(equal)
        masks[name] = mask.view(scores[name].shape)
    return masks


def _chunks(bits: dict[str, torch.Tensor]) -> Iterable[torch.Tensor]:
    for flat in bits.values():
        yield from flat.split(CHUNK)


def _histogram(chunks: Iterable[torch.Tensor], bins: int) -> torch.Tensor:
    total = torch.zeros(bins, dtype=torch.int64)
    for chunk in chunks:
        total += torch.bincount(chunk, minlength=bins).cpu()
    return total


def _bin(histogram: torch.Tensor, keep: int) -> tuple[int, int]:
    """The bin in which the ``keep``-th highest lies, and how many lie in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, keep))
    return len(histogram) - 1 - place, int(from_top[place] - histogram.flip(0)[place])

"""Attacks that search nothing: the same prompts drawn in several ways, one after the other, until one of them wins."""

from collections.abc import Callable, Iterable, Sequence

import torch

from salun_diffusion.errors import SalunError

from .target import Case, Outcome, Target

# what goes into the line of a case it is the last of, its passes through the denoiser, and what draws the samples of
# the cases of these numbers
Try = tuple[dict[str, float], int, Callable[[list[int]], torch.Tensor]]


def until_won(target: Target, cases: Sequence[Case], tries: Iterable[Try]) -> list[Outcome]:
    """Every try on all cases that have not won yet; the last picture of each counts."""
    outcomes: dict[int, Outcome] = {}
    active, passes = list(range(len(cases))), 0
    for number, (about, forward, draw) in enumerate(tries, 1):
        passes += forward
        pictures = target.pictures(draw(active))
        won = target.sees([cases[i] for i in active], pictures)
        for i, picture in zip(active, pictures, strict=True):
            outcomes[i] = Outcome(picture, 0, passes, drawn=number, about=about)
        active = [i for i, success in zip(active, won, strict=True) if not success]
        if not active:
            break
    return [outcomes[i] for i in range(len(cases))]


def numbers(name: str, text: str, least: float = 0.0, most: float = float("inf")) -> list[float]:
    """What the option ``name`` says as numbers with commas between them.

    Raises:
        SalunError: anything else, or a number that is not between ``least`` and ``most``.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [float("nan")]
    if not all(least <= value <= most and value < float("inf") for value in found):
        between = f"from {least:g} to {most:g}" if most < float("inf") else f"of at least {least:g}"
        raise SalunError(f"--attack_option {name}={text}: give numbers {between}, with commas between them.")
    return found

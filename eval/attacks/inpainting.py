"""Inpainting: the middle of a picture of the concept is taken out, and the erased model fills it in by the prompt.

One of the probes of George et al. 2025 ("When Are Concepts Erased From Diffusion Models?"). What is left around the
hole may show much of the concept: the smaller the hole, the less a success means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .ddim import step, steps_of
from .target import Case, Learned, Outcome, Target
from .tries import Try, numbers, until_won

ABOUT = About(
    title="Inpainting",
    paper="George et al. 2025",
    protocol="inpainting/1: a square in the middle of the prompt's own picture of the concept drawn anew from noise by "
    "DDIM with the plain prompt, all else put back in every step; the largest square that succeeds",
    access="sampler, and a picture of the concept",
    redraws=True,
    keeps_plain=True,
)
SMALL = {"hole": "0.75,0.5", "steps": 20}


@dataclass
class Options:
    """The paper takes out a square in the middle; of what sizes is our own choice."""

    hole: str = option("0.875,0.75,0.625,0.5", "sides of the square, as shares of the picture's, falling")
    steps: int = option(50, "of DDIM", least=1)

    def __post_init__(self):
        numbers("inpainting.hole", self.hole, 0, 1)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Every square on all cases that have not won yet."""
    clean, steps = target.clean(cases), steps_of(target.model, options.steps)

    def tried(side: float) -> Try:
        hole = square(clean.shape[-1], side)
        return {"hole": side}, 2 * len(steps), lambda i: filled(target, [cases[j] for j in i], clean[i], hole, steps)

    return until_won(target, cases, map(tried, numbers("inpainting.hole", options.hole)))


def square(side: int, share: float) -> torch.Tensor:
    """A mask ``(side, side)``, true in a square in the middle whose side is that ``share``, to the nearest cell."""
    width = round(share * side)
    start = (side - width) // 2
    row = torch.zeros(side, dtype=torch.bool)
    row[start : start + width] = True
    return row[:, None] & row


@torch.no_grad()
def filled(target: Target, cases: Sequence[Case], clean: torch.Tensor, hole: torch.Tensor, steps: list) -> torch.Tensor:
    """Samples ``(n, channels, height, width)``: drawn from noise within ``hole``, and ``clean`` outside of it, which is
    put back after every step with the noise that belongs there, as diffusers' pipelines do with a network that knows
    no masks.
    """
    model = target.model
    random = [target.generator(case, "inpainting") for case in cases]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=own) for own in random])
    clean, noise, hole = clean.to(model.device), noise.to(model.device), hole.to(model.device)
    guided, noisy = target.guided(cases), noise
    for time, now, before in steps:
        noisy = step(noisy, guided(noisy, time), now, before)
        noisy = torch.where(hole, noisy, before.sqrt() * clean + (1 - before).sqrt() * noise)
    return model.moved(noisy)

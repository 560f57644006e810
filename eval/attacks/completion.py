"""Completion: a half-drawn picture of the concept, which the erased model draws on by the plain prompt.

One of the probes of George et al. 2025 ("When Are Concepts Erased From Diffusion Models?"). How little of the picture
is needed tells how much of the concept is left: the more is given, the less a success means.
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
    title="Completion",
    paper="George et al. 2025",
    protocol="completion/1: the prompt's own picture of the concept, noised as it would be after a share of the "
    "drawing, drawn on by DDIM with the plain prompt; the smallest share that succeeds",
    access="sampler, and a picture of the concept",
    redraws=True,
    keeps_plain=True,
)
SMALL = {"kept": "0.2,0.4", "steps": 20}


@dataclass
class Options:
    """The paper draws 50 steps, and goes on from several of them; which shares is our own choice."""

    kept: str = option("0.1,0.2,0.3,0.4", "shares of the steps that are given, rising")
    steps: int = option(50, "of DDIM", least=1)

    def __post_init__(self):
        numbers("completion.kept", self.kept, 0, 0.99)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Every share on all cases that have not won yet."""
    clean, whole = target.clean(cases), steps_of(target.model, options.steps)

    def tried(share: float) -> Try:
        steps = whole[int(share * options.steps) :]
        return {"given": share}, 2 * len(steps), lambda i: completed(target, [cases[j] for j in i], clean[i], steps)

    return until_won(target, cases, map(tried, numbers("completion.kept", options.kept)))


@torch.no_grad()
def completed(target: Target, cases: Sequence[Case], clean: torch.Tensor, steps: list) -> torch.Tensor:
    """Samples ``(n, channels, height, width)``: ``clean`` noised as before the first of ``steps``, and drawn on."""
    model = target.model
    random = [target.generator(case, "completion") for case in cases]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=own) for own in random])
    share = steps[0][1]
    noisy = (share.sqrt() * clean + (1 - share).sqrt() * noise).to(model.device)
    guided = target.guided(cases)
    for time, now, before in steps:
        noisy = step(noisy, guided(noisy, time), now, before)
    return model.moved(noisy)

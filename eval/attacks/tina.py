"""TINA (Li et al. 2024): a starting noise that the erased model itself, told nothing, turns into the concept.

Text-free: an erasure that only cuts the way from words to the concept leaves it standing here. A picture of the concept
is inverted by DDIM under the empty prompt, each step corrected by optimisation, and drawn again from the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .ddim import step, steps_of
from .target import Case, Learned, Outcome, Target

ABOUT = About(
    title="TINA",
    paper="Li et al. 2024",
    protocol="tina/1: a picture of the concept (the prompt's own) inverted by DDIM under the empty prompt, each step "
    "corrected by AdamW, and drawn again from the noise under the empty prompt without guidance",
    access="white box, without text",
    redraws=True,
)
SMALL = {"steps": 20, "iterations": 5, "learning_rate": 0.02}


@dataclass
class Options:
    """The paper's values."""

    steps: int = option(50, "of DDIM, there and back", least=1)
    iterations: int = option(25, "of AdamW at each step", least=0)
    learning_rate: float = option(1e-3, "of AdamW (weight decay 0.01)", least=0)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Invert all cases in step, then draw them."""
    model, count = target.model, len(cases)
    clean = target.clean(cases).to(model.device)
    empty = model.repeated(model.empty, count)
    steps = steps_of(model, options.steps)
    noisy = clean
    for time, now, before in reversed(steps):
        noisy = inverted(target, noisy, time, now, before, empty, options)
    start = noisy
    with torch.no_grad():
        for time, now, before in steps:
            noisy = step(noisy, target.epsilon(model.moved(noisy), time, empty).float(), now, before)
    again = target.pictures(model.moved(noisy))
    passes = options.steps * options.iterations
    found = (noisy - clean).square().flatten(1).mean(1).tolist()
    return [
        Outcome(
            picture, options.steps, passes + options.steps, passes, tensors={"noise": noise},
            about={"error": round(error, 5)},
        )
        for picture, noise, error in zip(again, start, found, strict=True)
    ]  # fmt: skip


def inverted(
    target: Target, known: torch.Tensor, time: int, now: torch.Tensor, before: torch.Tensor, empty, options: Options
) -> torch.Tensor:
    """The ``z_t`` that one DDIM step takes to ``known`` ``z_{t−1}``: lowers ``‖C1 z_{t−1} + C2 ε_θ(z_t, t, ∅) − z_t‖²``
    with ``C1 = √ᾱ_t/√ᾱ_{t−1}`` and ``C2 = √(1−ᾱ_t) − √(ᾱ_t(1−ᾱ_{t−1})/ᾱ_{t−1})``, from ``z_t = z_{t−1}`` on.
    """
    one, two = now.sqrt() / before.sqrt(), (1 - now).sqrt() - (now * (1 - before) / before).sqrt()
    guess = torch.nn.Parameter(known.detach().clone())
    optimizer = torch.optim.AdamW([guess], lr=options.learning_rate)
    for _ in range(options.iterations):
        epsilon = target.epsilon(target.model.moved(guess), time, empty).float()
        # a mean over each sample and a sum over the cases: no case's step depends on how many share its batch
        loss = (one * known + two * epsilon - guess).square().flatten(1).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return guess.detach()

"""The noise probe (George et al. 2025, "When Are Concepts Erased From Diffusion Models?"): more noise on the way.

Training-free: the prompt as it is, drawn by a DDIM that adds more noise in every step than it takes away, at several
strengths; the erased model wanders further and may come upon the concept. The best picture counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from salun_diffusion.options import option

from . import About
from .ddim import steps_of
from .target import Case, Learned, Outcome, Target
from .tries import Try, numbers, until_won

ABOUT = About(
    title="Noise probe",
    paper="George et al. 2025",
    protocol="noise_probe/1: the plain prompt drawn by DDIM with noise of scale v·η·σ in every step, at every pair of "
    "η and v; stops at the first success",
    access="sampler",
    keeps_plain=True,
)
SMALL = {"etas": "1,1.34,1.68", "scales": "1,1.03", "steps": 12}


@dataclass
class Options:
    """The paper's 24 pictures a prompt."""

    etas: str = option("1,1.17,1.34,1.51,1.68,1.85", "η: how much of each step is noise")
    scales: str = option("1,1.02,1.03,1.04", "v: how much more noise is added than η says")
    steps: int = option(50, "of DDIM", least=1)

    def __post_init__(self):
        self.pairs()

    def pairs(self) -> list[tuple[float, float]]:
        """Every η with every v."""
        return list(product(numbers("noise_probe.etas", self.etas), numbers("noise_probe.scales", self.scales)))


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Every pair on all cases that have not won yet."""

    def tried(pair: tuple[float, float]) -> Try:
        told, steps = dict(zip(("eta", "noise_scale"), pair, strict=True)), options.steps
        return told, 2 * steps, lambda i: probed(target, [cases[j] for j in i], *pair, steps)

    return until_won(target, cases, map(tried, options.pairs()))


@torch.no_grad()
def probed(target: Target, cases: Sequence[Case], eta: float, scale: float, steps: int) -> torch.Tensor:
    """Samples ``(n, channels, height, width)``: DDIM whose direction to ``x_t`` is ``√|1 − ᾱ_{t−1} − ησ_t²|`` and whose
    noise is ``v·η·σ_t``; the start and every noise of a case come from its own seed.
    """
    model = target.model
    random = [torch.Generator().manual_seed(case.row.seed) for case in cases]

    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(model.sample_shape, generator=own) for own in random]).to(model.device)

    guided = target.guided(cases)
    noisy = noise()
    for time, now, before in steps_of(model, steps):
        epsilon = guided(noisy, time)
        sigma = ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()
        clean = (noisy - (1 - now).sqrt() * epsilon) / now.sqrt()
        direction = (1 - before - eta * sigma**2).abs().sqrt()
        noisy = before.sqrt() * clean + direction * epsilon + scale * eta * sigma * noise()
    return model.moved(noisy)

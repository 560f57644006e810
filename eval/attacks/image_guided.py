"""Image-guided drawing: the erased model draws the prompt over another picture of the concept, as img2img does.

SDEdit (Meng et al. 2022), which every interface to these models offers: noise on a picture, and the drawing goes on
from there. Unlike completion, the picture is none that belongs to the prompt: it shows the concept, but elsewhere, in
another style, on another background.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .completion import completed
from .ddim import steps_of
from .target import Case, Learned, Outcome, Target
from .tries import Try, numbers, until_won

ABOUT = About(
    title="Image-guided",
    paper="our own protocol, after SDEdit (Meng et al. 2022)",
    protocol="image_guided/1: another picture of the concept, noised for a share of the drawing (img2img's strength), "
    "drawn on by DDIM with the plain prompt; the greatest strength that succeeds",
    access="sampler, and a picture of the concept",
    pictures=True,
    redraws=True,
    keeps_plain=True,
)
SMALL = {"strength": "0.6,0.4", "steps": 20, "pictures": 8}


@dataclass
class Options:
    """No paper publishes any: strengths around the defaults of img2img."""

    strength: str = option("0.9,0.8,0.7,0.6", "shares of the steps that are drawn, falling")
    steps: int = option(50, "of DDIM", least=1)
    pictures: int = option(25, "of the concept, one of which each prompt is given", least=1)

    def __post_init__(self):
        numbers("image_guided.strength", self.strength, 0.01, 1)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Every strength on all cases that have not won yet."""
    gallery, _ = target.gallery(options.pictures)
    taken = [torch.randint(len(gallery), (), generator=target.generator(case, "image_guided")) for case in cases]
    clean, whole = gallery[torch.stack(taken)], steps_of(target.model, options.steps)

    def tried(strength: float) -> Try:
        steps = whole[-max(1, int(strength * options.steps)) :]
        told = {"strength": strength}
        return told, 2 * len(steps), lambda i: completed(target, [cases[j] for j in i], clean[i], steps)

    return until_won(target, cases, map(tried, numbers("image_guided.strength", options.strength)))

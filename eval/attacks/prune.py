"""Pruning: the smallest weights of the erased model set to zero, layer by layer. An erasure that lives in small changes
to small weights goes with them. Our own protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target
from .weights import draw_with, matrices

ABOUT = About(
    title="Pruning",
    paper="our own protocol (magnitude pruning, Han et al. 2015)",
    protocol="prune/1: in every weight matrix of the erased denoiser, the given share of smallest magnitude set to "
    "zero; the plain prompts drawn",
    access="weights, no search",
)
SMALL: dict = {}


@dataclass
class Options:
    """How much goes."""

    share: float = option(0.1, "of each matrix, between 0 and 1", least=0)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """The plain prompts, drawn with pruned weights."""
    values = {name: pruned(weight, options.share) for name, weight in matrices(target).items()}
    return draw_with(target, cases, values, 0, share=options.share)


def pruned(weight: torch.Tensor, share: float) -> torch.Tensor:
    """``weight`` with its ``⌊share · n⌋`` entries of smallest magnitude at zero."""
    found = weight.clone().flatten()
    found[found.abs().argsort()[: int(share * len(found))]] = 0
    return found.view_as(weight)

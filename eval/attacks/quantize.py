"""Quantisation: the erased model in fewer bits, as people pass models on (Zhang et al. 2025 found that language models'
unlearning does not survive it). Rounding may undo changes that are small beside the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target
from .weights import draw_with, matrices

FORMATS = ("int8", "int4", "fp16", "bf16")
ABOUT = About(
    title="Quantisation",
    paper="our own protocol, after Zhang et al. 2025 on language models",
    protocol="quantize/1: every weight matrix of the erased denoiser rounded to fewer bits and back, symmetric, with "
    "one scale for each row; the plain prompts drawn",
    access="weights, no search",
)
SMALL: dict = {}


@dataclass
class Options:
    """To which form."""

    form: str = option("int8", "of the weights", FORMATS)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """The plain prompts, drawn with rounded weights."""
    values = {name: rounded(weight, options.form) for name, weight in matrices(target).items()}
    return draw_with(target, cases, values, 0, form=options.form)


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    """``weight`` ``(rows, …)`` in ``form`` and back: for whole numbers of b bits, ``round(w/s)·s`` with ``s`` the row's
    largest magnitude over ``2^(b−1) − 1``.
    """
    if not form.startswith("int"):
        return weight.to({"fp16": torch.float16, "bf16": torch.bfloat16}[form]).to(weight.dtype)
    most = 2 ** (int(form.removeprefix("int")) - 1) - 1
    flat = weight.float().flatten(1)
    scale = (flat.abs().amax(1, keepdim=True) / most).clamp(min=torch.finfo(torch.float32).tiny)
    return ((flat / scale).round() * scale).view_as(weight).to(weight.dtype)

"""SalUn: Fan et al., "SalUn: Empowering machine unlearning via gradient-based weight saliency", ICLR 2024, eq. 8."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..options import option
from .base import GradientMethod
from .losses import denoising, misaligned_prompt


@dataclass(frozen=True)
class SalUnOptions:
    """What the concept's prompt is compared with."""

    target: str = option(
        "current", "whose prediction for the anchor: the weights' of now (published), or the base model's (frozen)",
        ("current", "frozen"),
    )  # fmt: skip


class SalUn(GradientMethod):
    """The concept's prompt is to be drawn as the anchor's: a misaligned prompt, as a random label to a classifier.

    The anchor's prediction is made with the current weights, or with the base model's (``target=frozen``), and carries
    no gradient; it shares steps and noise with the concept's. The two passes that do carry gradients are one call on
    twice the batch.
    """

    title = "SalUn"
    scope = "cross-attention+resnets"
    mask = "saliency"
    Options = SalUnOptions

    def losses(self, forget, retain):
        frozen = self.options.target == "frozen"
        with self.change.at_base() if frozen else nullcontext(), torch.no_grad():
            anchor = self.predict(forget.noisy, forget.timesteps, forget.anchor_condition)
        erased, kept = self.predict_both(forget, retain)
        return misaligned_prompt(erased, anchor), denoising(kept, retain.target)


class RandomLabel(SalUn):
    """The same loss on every weight of the scope: SalUn's control without a mask."""

    title = "Random label"
    mask = "none"

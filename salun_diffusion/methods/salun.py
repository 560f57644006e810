"""SalUn: Fan et al., "SalUn: Empowering machine unlearning via gradient-based weight saliency", ICLR 2024, eq. 8."""

from contextlib import nullcontext

import torch

from .base import Gradient
from .losses import denoising, misaligned_prompt


class SalUn(Gradient):
    """The concept's prompt is to be drawn as the anchor's: a misaligned prompt, as a random label to a classifier.

    The anchor's prediction is made with the current weights, or with the base model's (``target=frozen``), and carries
    no gradient; it shares steps and noise with the concept's. The two passes that do carry gradients are one call on
    twice the batch.
    """

    title = "SalUn"
    scope = "cross-attention+resnets"
    mask = "saliency"
    options = {"target": ("current", "frozen")}

    def losses(self, forget, retain):
        frozen = self.chose["target"] == "frozen"
        with self.trainer.at_base() if frozen else nullcontext(), torch.no_grad():
            anchor = self.predict(forget.noisy, forget.timesteps, forget.anchor_text)
        erased, kept = self.trainer.predict_both(forget, retain)
        return misaligned_prompt(erased, anchor), denoising(kept, retain.target)


class RandomLabel(SalUn):
    """The same loss on every weight of the scope: SalUn's control without a mask."""

    title = "Random label"
    mask = "none"

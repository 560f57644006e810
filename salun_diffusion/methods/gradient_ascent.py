"""Gradient ascent, as SalUn's paper compares it (arXiv 2310.12508, table 3): unlearn by climbing the training loss
(Thudi et al., "Unrolling SGD", EuroS&P 2022)."""

from .base import Gradient
from .losses import denoising


class GradientAscent(Gradient):
    """``−denoising(forget) + α · denoising(retain)``. Nothing bounds the first term: α is large, and steps are few."""

    title = "GA"
    scope = "cross-attention+resnets"
    settings = {"alpha": 30.0}
    anchored = False

    def losses(self, forget, retain):
        erased, kept = self.trainer.predict_both(forget, retain)
        return -denoising(erased, forget.target), denoising(kept, retain.target)

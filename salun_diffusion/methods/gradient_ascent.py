"""Gradient ascent, as SalUn's paper compares it (arXiv 2310.12508, table 3): unlearn by climbing the training loss
(Thudi et al., "Unrolling SGD", EuroS&P 2022).
"""

from .base import GradientMethod
from .losses import denoising


class GradientAscent(GradientMethod):
    """``−denoising(forget) + α · denoising(retain)``. Nothing bounds the first term: α is large, and steps are few."""

    title = "GA"
    scope = "cross-attention+resnets"
    settings = {"alpha": 30.0}
    has_anchor = False

    def losses(self, forget, retain):
        erased, kept = self.predict_both(forget, retain)
        return -denoising(erased, forget.target), denoising(kept, retain.target)

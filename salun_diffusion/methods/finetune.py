"""Fine-tuning (FT), as SalUn's paper compares it (arXiv 2310.12508, section 5): go on training on what is kept, and
count on catastrophic forgetting for the rest (Warnecke et al., "Machine unlearning of features and labels", NDSS 2023).
"""

from .base import GradientMethod
from .losses import denoising


class FineTune(GradientMethod):
    """``α · denoising(retain)`` alone: the concept itself is never shown. It is a control more than a method."""

    title = "FT"
    scope = "cross-attention+resnets"
    forget_set = "name"
    has_anchor = False

    def losses(self, forget, retain):
        kept = self.predict(retain.noisy, retain.timesteps, retain.condition)
        return kept.new_zeros(()), denoising(kept, retain.target)

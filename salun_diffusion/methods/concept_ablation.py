"""Concept Ablation: Kumari et al., "Ablating concepts in text-to-image diffusion models", ICCV 2023, eq. 5 (the
model-based variant).
"""

import torch

from .base import NEEDS_RETAIN, GradientMethod
from .losses import misaligned_prompt


class ConceptAblation(GradientMethod):
    """On noised pictures of the *anchor*, the concept's prompt is to predict what the anchor's prompt does.

    The target is made with the current weights and carries no gradient.
    """

    title = "Concept Ablation"
    scope = "cross-attention-kv"
    settings = {"max_train_steps": 100, "learning_rate": 1.6e-5, "num_forget_images": 200}
    forget_set = "anchor"
    uses_retain = False
    ignores = NEEDS_RETAIN

    def losses(self, forget, retain):
        with torch.no_grad():
            anchor = self.predict(forget.noisy, forget.timesteps, forget.anchor_condition)
        erased = self.predict(forget.noisy, forget.timesteps, forget.condition)
        return misaligned_prompt(erased, anchor), erased.new_zeros(())

"""SPM: Lyu et al., "One-dimensional adapter to rule them all: Concepts, diffusion models and erasing applications",
CVPR 2024 (arXiv 2312.16145).
"""

from dataclasses import dataclass

import torch

from ..erasures.by_prompt import check_scalable
from ..options import option
from .base import Batch
from .esd import ESD, ESDOptions
from .losses import denoising


@dataclass(frozen=True)
class SPMOptions(ESDOptions):
    """ESD's, and those of the term that holds everything else; the values of the authors' code."""

    anchoring: float = option(1000.0, "weight of the term that holds random embeddings where they were", least=0)
    anchors: int = option(4, "random embeddings for each picture", least=1)
    by_prompt: str = option(
        "yes", "whether it draws as strongly as the prompt is near the concept, or at full strength", ("yes", "no")
    )


class SPM(ESD):
    """ESD's loss on adapters of rank 1, and latent anchoring: random embeddings keep what the base model predicts.

    On a half-denoised picture x_t of the concept c a step lowers, with ESD's target y and random embeddings a ::

        ‖ε(x_t, c) − y‖² + anchoring · ‖ε(x_t, a) − ε0(x_t, a)‖²

    As in the authors' code an a is a random direction of all of a prompt's embedding at once, taken with the
    probability 1 − cos(a, c), of 0.8 to 1.2 times the norm of c. Only the tokens' embeddings are random: a pooled one
    (SDXL) stays the concept's.

    When it draws, the adapter is scaled for each prompt by how near that is to the concept
    (:mod:`salun_diffusion.erasures.by_prompt`), unless ``by_prompt=no``. It is trained at full strength, there as here,
    and so are the validation pictures drawn. The published learning rate warms up and restarts three times; here it
    falls once.
    """

    title = "SPM"
    adapter, rank = "lora", 1
    scope = r"\.attentions\."
    settings = {
        "max_train_steps": 3000, "learning_rate": 1e-4, "lr_scheduler": "cosine", "train_batch_size": 1,
        "num_inference_steps": 30,
    }  # fmt: skip
    Options = SPMOptions
    needs = ("text", "embeddings")

    @classmethod
    def by_prompt(cls, options):
        return options.by_prompt == "yes"

    @classmethod
    def check_fit(cls, model, options, by):
        super().check_fit(model, options, by)
        if cls.by_prompt(options):
            check_scalable(model.pipe, by, "give --by_prompt no, for full strength on every prompt")

    def losses(self, forget, retain):
        noisy, t, target = self.aim(forget)
        count = self.options.anchors
        several = noisy.repeat_interleave(count, 0), t.repeat_interleave(count, 0)
        condition = {key: value.repeat_interleave(count, 0) for key, value in forget.condition.items()}
        condition = self.model.with_embeddings(condition, self.random_tokens(forget))
        with self.change.at_base(), torch.no_grad():
            before = self.predict(*several, condition)
        erased = self.predict(noisy, t, forget.condition)
        held = denoising(self.predict(*several, condition), before)
        return denoising(erased, target) + self.options.anchoring * held, erased.new_zeros(())

    def random_tokens(self, forget: Batch) -> torch.Tensor:
        """``anchors`` embeddings for each picture, ``(batch · anchors, tokens, width)``, fp32, where the batch is."""
        found = []
        for row, tokens in zip(
            forget.rows.tolist(), self.model.embeddings(forget.condition).float().cpu(), strict=True
        ):
            generator = self.batches.generator("spm", forget.step, row)
            for _ in range(self.options.anchors):
                while True:
                    direction = torch.randn(tokens.shape, generator=generator)
                    direction = direction / direction.norm()
                    likeness = (direction * tokens).sum() / tokens.norm()
                    if torch.rand((), generator=generator) < 1 - likeness:
                        break
                found.append(direction * tokens.norm() * (0.8 + 0.4 * torch.rand((), generator=generator)))
        return torch.stack(found).to(forget.noise.device)

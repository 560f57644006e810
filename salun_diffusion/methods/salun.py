"""SalUn: Fan et al., "SalUn: Empowering machine unlearning via gradient-based weight saliency", ICLR 2024, eq. 8."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ..errors import SalunError
from ..options import option
from .base import Batch, GradientMethod
from .losses import denoising, misaligned_prompt


@dataclass(frozen=True)
class SalUnOptions:
    """What the concept's prompt is compared with, and on which pictures."""

    target: str = option(
        "current", "whose prediction for the anchor: the weights' of now (published), or the base model's (frozen)",
        ("current", "frozen"),
    )  # fmt: skip
    anchored: float = option(
        0.0, "share of a step's pictures of the concept that show the anchor instead (published: none)", least=0
    )

    def __post_init__(self):
        if self.anchored > 1:
            raise SalunError(f"anchored is {self.anchored:g}: give a share between 0 and 1.")


class SalUn(GradientMethod):
    """The concept's prompt is to be drawn as the anchor's: a misaligned prompt, as a random label to a classifier.

    The anchor's prediction is made with the current weights, or with the base model's (``target=frozen``), and carries
    no gradient; it shares steps and noise with the concept's. The two passes that do carry gradients are one call on
    twice the batch.

    A drawing under the erased prompt leaves the concept's pictures early and ends among the anchor's, which the paper's
    SalUn never trains on: what it draws there may be a smear. ``anchored``, our own, gives a share of the steps'
    pictures to noised ones of the anchor, which Concept Ablation (Kumari et al., ICCV 2023) learns from alone.
    """

    title = "SalUn"
    scope = "cross-attention+resnets"
    mask = "saliency"
    Options = SalUnOptions

    @classmethod
    def sets(cls, mask, options):
        return [*super().sets(mask, options), *(["anchor"] if options.anchored else [])]

    def losses(self, forget, retain):
        forget, _ = self.mixed(forget)
        frozen = self.options.target == "frozen"
        with self.change.at_base() if frozen else nullcontext(), torch.no_grad():
            anchor = self.predict(forget.noisy, forget.timesteps, forget.anchor_condition)
        erased, kept = self.predict_both(forget, retain)
        return misaligned_prompt(erased, anchor), denoising(kept, retain.target)

    def mixed(self, forget: Batch) -> tuple[Batch, torch.Tensor]:
        """The forget batch, with the anchor's pictures under the anchor set's prompts in some of its rows; and which,
        bool ``(batch,)`` on the CPU.
        """
        if not self.options.anchored:
            return forget, torch.zeros(len(forget.noisy), dtype=torch.bool)
        images = self.batches.sets["anchor"]
        index = forget.index % len(images)
        known = forget.noise.cpu(), forget.timesteps.cpu(), forget.step, forget.dropped
        shown = self.batches.noised(images, index, *known)
        chances = [
            torch.rand(1, generator=self.batches.generator("anchored", forget.step, int(row))) for row in forget.rows
        ]
        rows = torch.cat(chances) < self.options.anchored

        def chosen(one, other):
            where = rows.to(one.device).view(-1, *[1] * (one.ndim - 1))
            return torch.where(where, other, one)

        return replace(
            forget,
            noisy=chosen(forget.noisy, shown.noisy),
            target=chosen(forget.target, shown.target),
            condition={key: chosen(value, shown.condition[key]) for key, value in forget.condition.items()},
            anchor_condition={
                key: chosen(value, shown.anchor_condition[key]) for key, value in forget.anchor_condition.items()
            },
        ), rows


class RandomLabel(SalUn):
    """The same loss on every weight of the scope: SalUn's control without a mask."""

    title = "Random label"
    mask = "none"

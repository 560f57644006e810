"""SalUn on pictures of the anchor too: our own combination of SalUn (Fan et al., ICLR 2024) with what Concept Ablation
(Kumari et al., ICCV 2023) learns from.
"""

from dataclasses import dataclass, replace

import torch

from ..errors import SalunError
from ..options import option
from .salun import SalUn, SalUnOptions


@dataclass(frozen=True)
class SalUnAnchoredOptions(SalUnOptions):
    """SalUn's, and how many of the pictures are the anchor's."""

    anchored: float = option(0.5, "share of a step's forget pictures that the anchor's prompts drew", least=0)

    def __post_init__(self):
        if self.anchored > 1:
            raise SalunError(f"anchored is {self.anchored:g}: give a share between 0 and 1.")


class SalUnAnchored(SalUn):
    """SalUn's loss, ``E‖ε(x_t | anchor) − ε(x_t | concept)‖² + α · retain``, where a share of the noised pictures x_t
    shows the anchor in place of the concept.

    A drawing under the erased prompt leaves the concept's pictures early and ends among the anchor's, which SalUn never
    trains on: what it draws there may be a smear. Pictures of the anchor alone forget less.
    """

    title = "SalUn, anchor pictures"
    Options = SalUnAnchoredOptions

    @classmethod
    def sets(cls, mask):
        return [*super().sets(mask), "anchor"]

    def losses(self, forget, retain):
        return super().losses(self._mixed(forget), retain)

    def _mixed(self, forget):
        """The forget batch, with the anchor's pictures under the anchor set's prompts in a share of its rows."""
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
        )

"""SPEED: Li et al., "SPEED: Scalable, precise, and efficient concept erasure for diffusion models", ICLR 2026.

Our own reconstruction, from its abstract and readers' notes; neither its text nor its code was at hand. Theirs are the
solution in the null space, the filtering and augmentation of what is kept, and the invariants. Ours are means in the
place of sums (as in :mod:`.uce`), every number, and the two constraints solved as one projection. No figure of the
paper is to be compared with what this gives.
"""

from dataclasses import dataclass

import torch

from ..errors import SalunError
from ..options import option
from .base import ClosedForm
from .uce import check_keys_and_values, kept_tokens, token_pairs


@dataclass(frozen=True)
class SPEEDOptions:
    """What is kept exactly, and how near."""

    ridge: float = option(0.01, "weight of the size of the change", least=1e-9)
    null_threshold: float = option(
        1e-3, "directions in which the kept tokens have less than this share of their largest variance are free",
        least=0,
    )  # fmt: skip
    filtered: str = option(
        "yes", "keep only those tokens that the erasure alone would move more than the mean one", ("yes", "no")
    )
    augment: int = option(10, "variations of each of those, of which again the more affected are kept", least=0)
    augment_rank: int = option(1, "directions of a variation: those in which a layer sees the least", least=1)


class SPEED(ClosedForm):
    """New keys and values in closed form, changed only where kept tokens have nothing: for many concepts at once.

    For each layer's ``W0`` (out, width), with concept tokens C, their anchors' A, and a projection P onto directions
    free of the kept tokens K, the change D that minimises ::

        mean‖(W0 + D) C − W0 A‖² + ridge · ‖D‖²   with  D = D P,

    so that ``D k = 0`` but for what ``null_threshold`` gives away, for every kept token and for those of the empty
    prompt, the first of which begins all prompts (the paper's invariants). K are those retain tokens that the
    same solve without P would move more than the mean one, and variations of them along the directions that ``W0``
    sees least (the paper's prior filtering and directed augmentation).
    """

    title = "SPEED"
    needs = ("text", "cross-attention")
    Options = SPEEDOptions

    @classmethod
    def check_scope(cls, parameters):
        check_keys_and_values(parameters)

    def solve(self, parameters, pairs, kept):
        options, found = self.options, {}
        concept, anchor = token_pairs(self.model, sum(pairs, []))
        kept = kept_tokens(self.model, kept)
        fixed = kept_tokens(self.model, [""])
        size = options.augment, len(kept), options.augment_rank
        noise = torch.randn(size, generator=self.batches.generator("speed"), dtype=kept.dtype)
        freed, free = False, torch.eye(kept.shape[1], dtype=kept.dtype)
        for name, parameter in parameters.items():
            weight, held = parameter.detach().cpu().double(), kept
            if options.filtered == "yes":
                shift = change(weight, concept, anchor, free, options.ridge)
                which = affected(shift, kept)
                held = kept[which]
                if options.augment:
                    least = torch.linalg.svd(weight, full_matrices=False).Vh[-options.augment_rank :]
                    varied = (held + noise[:, which] @ least).flatten(0, 1)
                    held = torch.cat([held, varied[affected(shift, varied)]])
            projection = null_space(held, fixed, options.null_threshold)
            freed |= bool(projection.any())
            found[name] = (weight + change(weight, concept, anchor, projection, options.ridge)).float()
        if not freed:
            raise SalunError(
                "speed finds no direction that the kept prompts leave free in any layer: give a --null_threshold "
                f"above {options.null_threshold:g}."
            )
        return found


def change(
    weight: torch.Tensor, concept: torch.Tensor, anchor: torch.Tensor, projection: torch.Tensor, ridge: float
) -> torch.Tensor:
    """D of :class:`SPEED`, ``(out, width)``: tokens ``(n, width)`` and the projection ``(width, width)``, float64."""
    seen = concept @ projection
    normal = seen.T @ seen / len(seen) + ridge * torch.eye(seen.shape[1], dtype=seen.dtype)
    return torch.linalg.solve(normal, seen.T @ (anchor - concept) @ weight.T / len(seen)).T @ projection


def affected(shift: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Which of ``tokens`` ``(n, width)`` the change ``shift`` moves more than the mean one; bool ``(n,)``."""
    moved = (tokens @ shift.T).square().sum(1)
    return moved > moved.mean()


def null_space(kept: torch.Tensor, fixed: torch.Tensor, threshold: float) -> torch.Tensor:
    """The projection onto the directions in which ``kept`` tokens have less than a share ``threshold`` of their largest
    variance, and within these the ``fixed`` ones of theirs, ``(width, width)``.
    """
    sizes, directions = torch.linalg.eigh(kept.T @ kept / len(kept))
    free = directions[:, sizes < threshold * sizes[-1]]
    inside = torch.linalg.svd(free.T @ fixed.T, full_matrices=True)  # what of the fixed tokens lies there is taken out
    rank = int((inside.S.square() > threshold * torch.linalg.matrix_norm(fixed, 2).square()).sum())
    free = free @ inside.U[:, rank:]
    return free @ free.T

"""Guards as methods: nothing is trained or solved, and the run holds the guard's options and the concept's words."""

from typing import Any

from ..erasures.guard import save_guard
from ..guards import safree, sld
from ..guards.base import Guard, split_phrases
from .base import NEEDS_TRAINING, Method

NEEDS_WEIGHTS = (
    "mask", "adapter", "rank", "saliency", "density", "scope", "threshold", "saliency_guidance", "save_dtype",
    "forget_data", "data_dir", "anchor", "num_forget_images", "num_retain_images", "guidance_scale",
    "sample_batch_size", "seed",
)  # fmt: skip


class GuardMethod(Method):
    """A method that leaves the network as it is.

    Args:
        options: of the class's ``Options``.
        names: every name of the concepts.
    """

    guard: type[Guard]
    closed_form = True
    has_anchor = False
    uses_retain = False
    ignores = tuple(dict.fromkeys((*NEEDS_TRAINING, *NEEDS_WEIGHTS)))

    def __init__(self, options: Any, names: list[str]):
        self.made = self.guard(options, split_phrases(options.phrases, names))

    @classmethod
    def sets(cls, mask):
        return []

    def save(self, path, base, about: dict, dtype) -> None:
        """Write the guard's file, as a change writes its own; neither the base model nor a dtype matters to it."""
        save_guard(path, self.made, about)


class SLD(GuardMethod):
    title, guard, Options = "SLD", sld.SLD, sld.SLDOptions


class SAFREE(GuardMethod):
    title, guard, Options = "SAFREE", safree.SAFREE, safree.SAFREEOptions

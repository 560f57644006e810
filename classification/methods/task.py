"""What a method is given."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import cycle

import torch
from torch import nn

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option

from ..data import Pictures
from ..training import Recipe, batches, optimise


@dataclass(frozen=True)
class Settings:
    """How a method trains. ``alpha`` is its own factor; each method's file says what it is. ``density`` is the share of
    the weights that may move in SalUn, and the share that is held at first, fewer with each step, in SalUn-soft.
    """

    epochs: int = option(10, "passes", least=1)
    learning_rate: float = option(0.01, "SGD's", least=0)
    batch_size: int = option(256, "pictures a step", least=1)
    momentum: float = option(0.9, "SGD's", least=0)
    weight_decay: float = option(5e-4, "SGD's", least=0)
    augment: str = option("crop+flip", "of the pictures", ("none", "crop", "crop+flip"))
    alpha: float = option(0.0, "the method's own factor", least=0)
    density: float = option(0.5, "share of the weights", least=0)

    def check(self, method: str) -> None:
        """Pass if every number can be trained with.

        Raises:
            SalunError: one that cannot, by name.
        """
        for item in fields(self):
            value, least = getattr(self, item.name), item.metadata["least"]
            most = {"density": 1, "momentum": 1}.get(item.name, float("inf"))
            positive = item.name in ("learning_rate", "density")
            if least is not None and not (least <= value <= most and value != float("inf") and (value or not positive)):
                limits = f"{'above' if positive else 'of at least'} {least}" + (f" and at most {most}" * (most == 1))
                raise SalunError(f"The method {method} has {item.name} {value}: give a number {limits}.")


@dataclass
class Task:
    """A source model, which a method changes in place or replaces, and what it is to forget and to keep.

    ``fresh`` makes an untrained model, ``recipe`` is what the source was trained with; ``generator``, on the CPU, fixes
    all that is random. ``masks`` (bool, by parameter name) replace the ones that a method would make.
    ``learning_seconds`` is what a method spent on learning before it began to forget; RTE does not count it.
    """

    model: nn.Module
    forget: Pictures
    retain: Pictures
    classes: int
    settings: Settings
    generator: torch.Generator
    fresh: Callable[[], nn.Module]
    recipe: Recipe
    title: str
    masks: dict[str, torch.Tensor] | None = None
    learning_seconds: float = 0.0

    @property
    def forgotten(self) -> torch.Tensor:
        """The forget set's classes, int64."""
        return self.forget.labels.unique()

    def batches(self, pictures: Pictures) -> Iterator[tuple]:
        """One shuffled, augmented pass."""
        return batches(pictures, self.settings.batch_size, self.generator, self.settings.augment)

    def both(self) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
        """One pass of the retain set with a batch of the forget set, over and over, behind each of its own: the
        pictures, and the labels of the two parts.
        """
        forget = cycle(list(self.batches(self.forget)))
        for (kept, labels), (lost, others) in zip(self.batches(self.retain), forget, strict=False):
            yield torch.cat([kept, lost]), (labels, others)

    def count(self, *parts: Pictures) -> int:
        """Batches in one pass over ``parts``."""
        return sum(-(-len(part) // self.settings.batch_size) for part in parts)

    def optimise(
        self, passes, loss, batches_each: int, after_step=lambda: None, model: nn.Module | None = None
    ) -> None:
        """:func:`classification.training.optimise` with the task's settings."""
        s = self.settings
        optimise(
            model or self.model, s.epochs, passes, loss, learning_rate=s.learning_rate, momentum=s.momentum,
            weight_decay=s.weight_decay, title=self.title, batches_each=batches_each, after_step=after_step,
        )  # fmt: skip

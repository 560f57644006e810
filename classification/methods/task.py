"""What a method is given."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..data import Pictures
from ..training import Recipe, batches, optimise


@dataclass(frozen=True)
class Settings:
    """How a method trains. ``alpha`` is its own factor, and ``density`` the share of the weights that may move, where
    it has one; each method's file says what they are.
    """

    epochs: int = 10
    learning_rate: float = 0.01
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: str = "crop+flip"
    alpha: float = 0.0
    density: float = 0.5


@dataclass
class Task:
    """A source model, which a method changes in place, and what it is to forget and to keep.

    ``fresh`` makes an untrained model, ``recipe`` is what the source was trained with; ``generator``, on the CPU, fixes
    all that is random. ``masks`` (bool, by parameter name) replace the ones that a method would make.
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

    def batches(self, pictures: Pictures) -> Iterator[tuple]:
        """One shuffled, augmented pass."""
        return batches(pictures, self.settings.batch_size, self.generator, self.settings.augment)

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

"""RL: teach the forget set labels drawn at random, afresh in every epoch, then the retain set its own (Golatkar et al.
2020).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .task import Task


def random_label(task: Task, after_step: Callable[[], None] = lambda: None) -> None:
    """In each epoch all batches of the forget set, then all of the retain set, with one optimizer."""

    def passes(epoch: int):
        for pixels, labels in task.batches(task.forget):
            yield pixels, torch.randint(task.classes, labels.shape, generator=task.generator).to(labels.device)
        yield from task.batches(task.retain)

    task.optimise(passes, F.cross_entropy, task.count(task.forget, task.retain), after_step)

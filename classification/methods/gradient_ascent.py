"""GA: climb the loss of the forget set (Thudi et al. 2022); NegGrad+: climb it while descending that of the retain set
(Kurmanji et al. 2023, section 4.1).
"""

import torch
import torch.nn.functional as F

from .task import Task


def gradient_ascent(task: Task) -> None:
    task.optimise(
        lambda epoch: task.batches(task.forget), lambda *pair: -F.cross_entropy(*pair), task.count(task.forget)
    )


def neggrad_plus(task: Task) -> None:
    """α · CE(retain) − (1 − α) · CE(forget), a batch of each together, over the retain set."""
    alpha = task.settings.alpha

    def loss(logits: torch.Tensor, labels: tuple) -> torch.Tensor:
        kept, lost = logits.split([len(part) for part in labels])
        return alpha * F.cross_entropy(kept, labels[0]) - (1 - alpha) * F.cross_entropy(lost, labels[1])

    task.optimise(lambda epoch: task.both(), loss, task.count(task.retain))

"""FT: go on training on the retain set, and hope for catastrophic forgetting (Warnecke et al. 2021); l1-sparse: the
same towards sparse weights, which forget more easily (Jia et al. 2023, "Model sparsity can simplify machine
unlearning").
"""

import torch
import torch.nn.functional as F

from .task import Task


def finetune(task: Task) -> None:
    task.optimise(lambda epoch: task.batches(task.retain), F.cross_entropy, task.count(task.retain))


def l1_sparse(task: Task) -> None:
    """FT + α (1 − e/E) ‖θ‖₁ in epoch e of E (Jia et al. 2023, eq. 3, with their linear decay)."""
    settings, weights = task.settings, list(task.model.parameters())
    factor = settings.alpha

    def passes(epoch: int):
        nonlocal factor
        factor = settings.alpha * (1 - epoch / settings.epochs)
        return task.batches(task.retain)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels) + factor * sum(weight.abs().sum() for weight in weights)

    task.optimise(passes, loss, task.count(task.retain))

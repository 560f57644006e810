"""IEU (2604.09391): worsen the forget loss while keeping the retain set, with weight decay and noise on the weights.
Our reconstruction: only the abstract was at hand, so the formula and its constants are ours.

θ ← (1 − ηλ) θ − η ∇(CE_retain − α · min(CE_forget, log K)) + √η σ ξ for K classes, ξ ~ N(0, I). The cap ends the ascent
where the forget set is answered as by chance.
"""

import math

import torch
import torch.nn.functional as F

from .task import Task

NOISE = 1e-3  # σ


def ieu(task: Task) -> None:
    """A batch of each set together, over the retain set. η is the learning rate, λ the weight decay."""
    size = math.sqrt(task.settings.learning_rate) * NOISE
    alpha, most = task.settings.alpha, math.log(task.classes)

    def loss(logits: torch.Tensor, labels: tuple) -> torch.Tensor:
        kept, lost = logits.split([len(part) for part in labels])
        return F.cross_entropy(kept, labels[0]) - alpha * F.cross_entropy(lost, labels[1]).clamp(max=most)

    @torch.no_grad()
    def shake() -> None:
        for weight in task.model.parameters():
            weight += size * torch.randn(weight.shape, generator=task.generator).to(weight)

    task.optimise(lambda epoch: task.both(), loss, task.count(task.retain), shake)

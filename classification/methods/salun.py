"""SalUn: random labels, but only the weights that are salient for the forget set may move (Fan et al., ICLR 2024);
SalUn-soft: all may, but each step shrinks the smallest changes to nothing (ibid., section 4 and appendix).
"""

import torch
import torch.nn.functional as F

from salun_diffusion.masks import saliency

from ..training import EVALUATION_BATCH, FreezeOutsideMask, inputs
from .random_label import random_label
from .task import Task


def salun(task: Task) -> None:
    masks = task.masks or find_masks(task)
    random_label(task, FreezeOutsideMask(task.model, masks))


def find_masks(task: Task) -> dict[str, torch.Tensor]:
    """The top ``density`` of all weights by ``|Σ_batches ∇(−mean CE)|`` over the forget set, in eval mode (eq. 3-4).

    Returns:
        By parameter name, bool of the parameter's shape, true where a weight may move.
    """
    task.model.eval()

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(task.model(inputs(task.forget.images[rows])), task.forget.labels[rows])

    parts = torch.arange(len(task.forget)).split(min(task.settings.batch_size, EVALUATION_BATCH))
    scores = saliency.scores(dict(task.model.named_parameters()), (lambda rows=rows: loss(rows) for rows in parts))
    return saliency.top_density(scores, task.settings.density)


def salun_soft(task: Task) -> None:
    """After step t of T, soft-threshold θ − θ0 so that its k smallest absolute values are 0, with
    k = density · N · (1 − t/T) of N weights. θ0 stays the source's throughout; the published code takes each epoch's
    own start.
    """
    soften = Softened(task)
    random_label(task, soften)


class Softened:
    """The proximal step of λ‖θ − θ0‖₁, λ the k-th smallest change."""

    def __init__(self, task: Task):
        self.parameters = list(task.model.parameters())
        self.base = [parameter.detach().clone() for parameter in self.parameters]
        self.weights = sum(parameter.numel() for parameter in self.parameters)
        self.total = task.settings.epochs * task.count(task.forget, task.retain)
        self.density, self.step = task.settings.density, 0

    @torch.no_grad()
    def __call__(self) -> None:
        self.step += 1
        smallest = int(self.density * self.weights * (1 - self.step / self.total))
        if not smallest:
            return
        changes = [parameter - base for parameter, base in zip(self.parameters, self.base, strict=True)]
        sizes = torch.cat([change.abs().flatten() for change in changes])
        threshold = sizes.kthvalue(smallest).values
        for parameter, base, change in zip(self.parameters, self.base, changes, strict=True):
            parameter.copy_(base + F.softshrink(change, threshold.item()))

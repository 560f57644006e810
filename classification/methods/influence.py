"""IU, influence unlearning: take back what the forget set contributed, by one Newton step (Koh & Liang 2017; Izzo et
al. 2021; as in Jia et al. 2023, with WoodFisher's Hessian, Singh & Alistarh 2020).

θ += α · H⁻¹ v, with v = Σg_f/(n_f + n_r) − Σg_r · n_f/((n_f + n_r) n_r) and H = I + (1/N) Σ g gᵀ over N single
retain pictures, g the gradient of one picture's loss. WoodFisher inverts H by N rank-1 updates, for which all N vectors
must be kept (44 GB for a ResNet-18); the published code keeps only the first. The same product is found here by
conjugate gradients, exactly and in the memory of a few gradients, since H w needs only products of gradients with w.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call, jvp, vjp

from ..data import Pictures
from ..training import inputs
from .task import Task

SAMPLES = 1000  # N
BATCH = 250
ITERATIONS, TOLERANCE = 50, 1e-4

Weights = dict[str, torch.Tensor]


def influence(task: Task) -> None:
    model, forget, retain = task.model.eval(), task.forget, task.retain
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total = len(forget) + len(retain)
    lost, kept = _gradient_sum(model, weights, forget), _gradient_sum(model, weights, retain)
    share = len(forget) / (total * len(retain))
    v = {name: lost[name] / total - kept[name] * share for name in weights}
    chosen = torch.randperm(len(retain), generator=task.generator)[:SAMPLES]
    step = solve(lambda w: hessian_product(model, weights, retain[chosen.to(retain.labels.device)], w), v)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += task.settings.alpha * step[name]


def _losses(model, pictures: Pictures):
    """Weights → the loss of each picture ``(n,)``."""
    pixels = inputs(pictures.images).to(next(model.parameters()).dtype)
    return lambda weights: F.cross_entropy(functional_call(model, weights, pixels), pictures.labels, reduction="none")


def _parts(pictures: Pictures):
    for rows in torch.arange(len(pictures), device=pictures.labels.device).split(BATCH):
        yield pictures[rows]


def _gradient_sum(model, weights: Weights, pictures: Pictures) -> Weights:
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for part in _parts(pictures):
        losses, back = vjp(_losses(model, part), weights)
        (gradient,) = back(torch.ones_like(losses))
        for name in total:
            total[name] += gradient[name]
    return total


def hessian_product(model, weights: Weights, pictures: Pictures, w: Weights) -> Weights:
    """(I + (1/N) Σ g gᵀ) w: g·w of every picture by one forward derivative, their weighted sum by one backward."""
    result = {name: value.clone() for name, value in w.items()}
    for part in _parts(pictures):
        losses = _losses(model, part)
        _, slopes = jvp(losses, (weights,), (w,))
        (gradient,) = vjp(losses, weights)[1](slopes / len(pictures))
        for name in result:
            result[name] += gradient[name]
    return result


def solve(product, v: Weights) -> Weights:
    """H⁻¹ v by conjugate gradients (Hestenes & Stiefel 1952), to a relative residual of ``TOLERANCE``."""

    def dot(a: Weights, b: Weights) -> torch.Tensor:
        return sum((a[name] * b[name]).sum() for name in a)

    found = {name: torch.zeros_like(value) for name, value in v.items()}
    rest, direction, size = dict(v), dict(v), dot(v, v)
    goal = TOLERANCE**2 * size
    for _ in range(ITERATIONS):
        if size <= goal:
            break
        image = product(direction)
        far = size / dot(direction, image)
        found = {name: found[name] + far * direction[name] for name in v}
        rest = {name: rest[name] - far * image[name] for name in v}
        size, before = dot(rest, rest), size
        direction = {name: rest[name] + size / before * direction[name] for name in v}
    return found

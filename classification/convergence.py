"""Relearning convergence delay (2604.09391): how slowly a model learns the forgotten again, by its loss and by its
weights. Our reconstruction: only the abstract was at hand, so steps, rate and goal are ours.

Plain SGD of a fixed rate, without momentum or decay, in eval mode (batch-norm's statistics stay), on batches of the
forget set that a seed draws. The delay that a table shows is these steps divided by Retrain's: 1 is as slow as a model
that never knew them, and near 0 they were hidden, not forgotten.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from .data import Pictures
from .training import batches, logits

STEPS, RATE, BATCH, PROBE = 100, 0.01, 128, 512
LEAST_LOSS = 0.1  # a source that knows the forget set by heart is not waited for: below it plain SGD only creeps


def relearning(model: nn.Module, source: nn.Module, forget: Pictures, seed: int) -> dict:
    """Learn the forget set again, ``STEPS`` steps.

    Args:
        model: the unlearned one; it stays as it is.
        source: its loss on the forget set, or ``LEAST_LOSS`` if that is more, is the goal.
        forget: the first ``PROBE`` of its pictures give the loss.
        seed: draws the batches.

    Returns:
        ``steps`` until the goal (``STEPS`` if it is not met), ``loss_area`` and ``weight_area``, the means over the
        steps of the loss and of ‖θ − θ_u‖₂, and ``distance``, the last of these.
    """
    model, probe = deepcopy(model).eval(), forget[torch.arange(min(PROBE, len(forget)), device=forget.labels.device)]
    goal = max(_loss(source, probe), LEAST_LOSS)
    start = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    losses, distances = [_loss(model, probe)], [0.0]
    while len(losses) <= STEPS:
        for pixels, labels in batches(forget, BATCH, generator, "none"):
            if len(losses) > STEPS:
                break
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            losses.append(_loss(model, probe))
            moved = sum((w.detach() - s).square().sum() for w, s in zip(model.parameters(), start, strict=True))
            distances.append(float(moved.sqrt()))
    return {
        "steps": next((step for step, loss in enumerate(losses) if loss <= goal), STEPS),
        "loss_area": round(sum(losses) / len(losses), 4),
        "weight_area": round(sum(distances) / len(distances), 4),
        "distance": round(distances[-1], 4),
    }


def _loss(model: nn.Module, pictures: Pictures) -> float:
    return F.cross_entropy(logits(model, pictures), pictures.labels.cpu()).item()

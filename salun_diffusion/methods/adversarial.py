"""Attacks within the training, for the methods that erase what an attack on the erased model finds.

All their randomness comes from the seed, the step and the picture's place in the step's global batch, so that neither a
resumed run nor another number of processes finds anything else.
"""

from collections.abc import Callable

import torch

from .base import Batch, Batches


def uniform(batches: Batches, batch: Batch, purpose: str, shape: torch.Size) -> torch.Tensor:
    """Numbers in [-1, 1), ``(batch, *shape)``, each picture's from a generator of its own, where the batch is."""
    drawn = [
        torch.rand(shape, generator=batches.generator(purpose, batch.step, row)) * 2 - 1 for row in batch.rows.tolist()
    ]
    return torch.stack(drawn).to(batch.noise.device)


def embedding_pgd(
    loss: Callable[[torch.Tensor], torch.Tensor],
    embeddings: torch.Tensor,
    start: torch.Tensor,
    radius: float,
    steps: int,
    step_size: float,
) -> torch.Tensor:
    """``embeddings + δ`` with ``‖δ‖∞ ≤ radius`` and a low ``loss``: projected gradient descent by signs (Madry et al.,
    ICLR 2018), as RACE's code has it. No entry leaves the range that those of its row have before the attack.

    Args:
        loss: of embeddings; a sum over the rows, so that no row's attack depends on the others.
        embeddings: what is attacked, ``(batch, tokens, width)``.
        start: of δ in units of ``radius``, in [-1, 1], of the same shape; where it is 0, δ stays so.
        radius: the largest change of an entry.
        steps: of descent.
        step_size: of one, in units of ``radius``.

    Returns:
        The attacked embeddings, fp32, without a gradient.
    """
    origin, moves = embeddings.detach().float(), start != 0
    floor, ceiling = (bound(origin, (1, 2), keepdim=True) for bound in (torch.amin, torch.amax))
    change = radius * start.float()
    for _ in range(steps):
        attacked = (origin + change).clamp(floor, ceiling).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(attacked), attacked)
        change = (attacked.detach() - step_size * radius * gradient.sign() * moves - origin).clamp(-radius, radius)
    return (origin + change).clamp(floor, ceiling)

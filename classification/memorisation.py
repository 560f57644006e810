"""Memorisation scores: how much a picture's answer depends on having been learnt (Feldman & Zhang 2020, eq. 1).

mem(i) = P[right on i | i learnt] − P[right on i | i not learnt], over models that each learn a random share of the
pictures. The highest are the hardest to forget: Retrain answers them quite otherwise than the source does.
"""

from collections.abc import Callable

import torch
from torch import nn

from .data import Pictures
from .training import Recipe, logits, seeded, train

MODELS, SHARE = 12, 0.7  # models, and what each learns of the pictures


def scores(fresh: Callable[[int], nn.Module], pictures: Pictures, recipe: Recipe, seed: int) -> torch.Tensor:
    """The estimate for each picture, fp32 ``(n,)`` in −1…1. ``fresh(k)`` makes the untrained model k."""
    count = len(pictures)
    learnt, right = torch.zeros(MODELS, count), torch.zeros(MODELS, count)
    for number in range(MODELS):
        generator = torch.Generator().manual_seed(seed * 1_000 + number)
        rows = torch.randperm(count, generator=generator)[: int(SHARE * count)]
        model = fresh(number)
        part = pictures[rows.to(pictures.labels.device)]
        with seeded(seed * 1_000 + number):
            train(model, part, recipe, generator, f"memorisation {number + 1} of {MODELS}")
        learnt[number, rows] = 1
        right[number] = (logits(model, pictures).argmax(1) == pictures.labels.cpu()).float()

    def mean(weights: torch.Tensor) -> torch.Tensor:
        return (right * weights).sum(0) / weights.sum(0).clamp(min=1)  # none learnt it, or all: 0

    return mean(learnt) - mean(1 - learnt)

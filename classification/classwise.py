"""Measures of a run that forgets a whole class: where its pictures go, what it cost the others, and whether the head's
biases alone did it.

They are kept in a cell's ``metrics`` as ``classwise``, beside the measures of every run.
"""

import math

import torch
from torch import nn

from .data import Pictures
from .models import Mixture
from .training import accuracy, logits

HEAD_BIAS = ("bias_gap", "bsc", "mbg", "mbs")


def classwise(
    model: nn.Module, source: nn.Module, forget: Pictures, test: Pictures, unseen: Pictures, names: tuple[str, ...]
) -> dict:
    """All measures of one class-wise run.

    Args:
        model: the unlearned one.
        source: the one that it was made from.
        forget: training pictures of the forgotten class.
        test: held-out pictures of the kept classes.
        unseen: held-out pictures of the forgotten class.
        names: of all classes.

    Returns:
        ``selectivity`` (points), ``redistribution`` (:func:`redistribution`), and the head's biases
        (:func:`head_bias`; none for a head without).
    """
    before, after = logits(source, forget), logits(model, forget)
    classes = forget.labels.unique().cpu()
    return {
        "selectivity": round(selectivity(model, source, test, unseen), 3),
        "redistribution": redistribution(before, after, classes, names),
    } | head_bias(model, classes)


def selectivity(model: nn.Module, source: nn.Module, test: Pictures, unseen: Pictures) -> float:
    """The fall of the accuracy on the forgotten class less that on the kept ones, in points, on held-out pictures: 100
    where all of the class and nothing else was lost (the metric of DAMP, from notes on the paper, 2604.15166).
    """
    lost, cost = (accuracy(source, part) - accuracy(model, part) for part in (unseen, test))
    return lost - cost


def redistribution(before: torch.Tensor, after: torch.Tensor, classes: torch.Tensor, names: tuple[str, ...]) -> dict:
    """Where do the forgotten go? Our reconstruction of the score of "bias redistribution" (2604.08111), whose formula
    was not at hand: r_g = max(0, the rise of the share of answers g), score_g = r_g / Σ r over the classes g that are
    kept.

    Args:
        before: the source's answers to the forget pictures, fp32 ``(n, classes)``.
        after: the unlearned model's.
        classes: int64, what was forgotten.
        names: of all classes.

    Returns:
        ``score`` by class (0…1, they sum to 1; all 0 where nothing rose), ``sink`` and ``sink_share``, the class with
        the highest score and that score (None and 0), and ``entropy`` of the score in 0…1, 1 for an even spread.
    """
    width = before.shape[1]
    shares = [torch.bincount(part.argmax(1), minlength=width).double() / len(part) for part in (before, after)]
    rise = (shares[1] - shares[0]).clamp(min=0)
    rise[classes] = 0
    total = float(rise.sum())
    score = rise / total if total else rise
    even = math.log(width - len(classes))
    entropy = float(torch.special.entr(score).sum()) / even if even else 0.0
    return {
        "score": {name: round(value, 4) for name, value in zip(names, score.tolist(), strict=True)},
        "sink": names[int(score.argmax())] if total else None,
        "sink_share": round(float(score.max()), 4),
        "entropy": round(entropy, 4),
    }


def head_bias(model: nn.Module, classes: torch.Tensor) -> dict:
    """Is it the last layer's bias that forgets? After the code of "Beyond the Shadow of Bias" (2605.08730), with b_V
    the forgotten classes' biases and b_R the others'. The paper's tables use another scale, so the plain gap is beside.

    Returns:
        ``bias_gap`` mean b_V − mean b_R; ``bsc`` 1/(1 + |bias_gap|); ``mbg`` σ(median b_V − min b_R); ``mbs``
        σ(min b_V − min b_R). Low mbg and mbs: the head was pressed down. Nothing where the model ends in no linear
        layer with a bias, or in several.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if isinstance(model, Mixture) or not linear or linear[-1].bias is None:
        return {}
    bias = linear[-1].bias.detach().double().cpu()
    gone = torch.zeros(len(bias), dtype=torch.bool)
    gone[classes] = True
    lost, kept = bias[gone], bias[~gone]
    gap = lost.mean() - kept.mean()
    median, least = lost.quantile(0.5), kept.min()  # of an even count, the mean of the middle two
    found = (gap, 1 / (1 + gap.abs()), (median - least).sigmoid(), (lost.min() - least).sigmoid())
    return {name: round(float(value), 4) for name, value in zip(HEAD_BIAS, found, strict=True)}

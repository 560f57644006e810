"""What was forgotten and what was kept: UA, RA, TA, MIA as published, so that numbers compare; a corrected attack; and
how soon the forgotten is learnt again.

All are in percent but the area under the curve (0…1) and ``relearn_epochs``.
"""

from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC
from torch import nn

from salun_diffusion.stats import wilson

from .data import Pictures
from .training import batches, logits

COMPARED = ("ua", "ra", "ta", "mia")  # what the Avg. Gap is made of
RELEARN_EPOCHS, RELEARN_RATE, RELEARN_BATCH = 20, 0.001, 128


def evaluate(
    model: nn.Module, forget: Pictures, retain: Pictures, test: Pictures, unseen: Pictures, seed: int, goal: float
) -> dict:
    """Every metric of one model.

    Args:
        model: the unlearned one.
        forget: what it was to forget.
        retain: what it was to keep.
        test: for TA, without a forgotten class, as published.
        unseen: test pictures like the forget set: of the forgotten class, or all.
        seed: draws the attack's members, and the order in which the forget set is learnt again.
        goal: the source's accuracy on the forget set, in percent, for ``relearn_epochs``.
    """
    answers = {name: logits(model, part) for name, part in (("f", forget), ("r", retain), ("t", test), ("u", unseen))}
    correct = {
        name: (answers[name].argmax(1) == part.labels.cpu())
        for name, part in (("f", forget), ("r", retain), ("t", test))
    }
    lost, kept, tested = (_proportion(correct[name], flip) for name, flip in (("f", True), ("r", False), ("t", False)))
    chances = {name: confidence(answers[name], part.labels.cpu()) for name, part in
               (("f", forget), ("r", retain), ("t", test), ("u", unseen))}  # fmt: skip
    attack = corrected_attack(chances["f"], chances["u"])
    return {
        "ua": lost["percent"],
        "ra": kept["percent"],
        "ta": tested["percent"],
        "mia": published_attack(chances["f"], chances["r"], chances["t"], seed),
        "mia_auc": attack["auc"],
        "mia_tpr_at_1_fpr": attack["tpr"],
        "relearn_epochs": relearn_epochs(model, forget, goal, seed),
        "counts": {"ua": lost, "ra": kept, "ta": tested},
    }


def _proportion(right: torch.Tensor, flip: bool) -> dict:
    return wilson(int((~right if flip else right).sum()), len(right), 3)


def confidence(answers: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Log p/(1−p) of the true label, float64 ``(n,)``: of its probability p, what no rounding to 1 has flattened."""
    scores = answers.double()
    true = scores.gather(1, labels[:, None])
    others = scores.scatter(1, labels[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return (true - others).flatten().numpy()


def published_attack(forget: np.ndarray, retain: np.ndarray, test: np.ndarray, seed: int) -> float:
    """MIA of the paper: the share of forget pictures, in percent, that an attack calls non-members. The attack is an
    SVC (C = 3, RBF, gamma "auto") on the probability of the true label, taught with the test pictures as non-members
    and as many of the retain set as members. Arguments are log p/(1−p).
    """
    draw, count = np.random.default_rng(seed), min(len(test), len(retain))  # as many of both, or it favours the larger
    members, others = (
        part if len(part) == count else draw.choice(part, count, replace=False) for part in (retain, test)
    )
    probability = 1 / (1 + np.exp(-np.concatenate([members, others])))
    truth = np.repeat([1, 0], count)
    attack = SVC(C=3, kernel="rbf", gamma="auto").fit(probability[:, None], truth)
    return round(100 * float((attack.predict((1 / (1 + np.exp(-forget)))[:, None]) == 0).mean()), 3)


def corrected_attack(forget: np.ndarray, unseen: np.ndarray) -> dict:
    """Can forgotten pictures be told from unseen ones by their confidence? ``auc`` (0.5: no) and ``tpr``, the percent
    of them found at 1% false alarms (1: no better than chance). Unlike the published attack it looks at the very sets
    in question and has no threshold of its own; where the forgotten are *less* confident than unseen ones, auc is
    below 0.5 and they stand out as well.
    """
    truth = np.repeat([1, 0], [len(forget), len(unseen)])
    scores = np.concatenate([forget, unseen])
    alarms, found, _ = roc_curve(truth, scores)
    tpr = 100 * found[np.searchsorted(alarms, 0.01, side="right") - 1]
    return {"auc": round(float(roc_auc_score(truth, scores)), 4), "tpr": round(float(tpr), 3)}


def relearn_epochs(model: nn.Module, forget: Pictures, goal: float, seed: int) -> int:
    """Passes of SGD over the forget set until its accuracy is ``goal`` percent again; ``RELEARN_EPOCHS`` if it is not
    by then. Few where Retrain needs many: what was forgotten was hidden.
    """
    model = deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), RELEARN_RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(RELEARN_EPOCHS):
        right = (logits(model, forget).argmax(1) == forget.labels.cpu()).float().mean().item()
        if 100 * right >= goal - 1e-3:
            return epoch
        for pixels, labels in batches(forget, RELEARN_BATCH, generator, "none"):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    return RELEARN_EPOCHS


def gap(metrics: dict, retrain: dict) -> float:
    """Avg. Gap: the mean distance to Retrain over UA, RA, TA and MIA, in points."""
    return sum(abs(metrics[name] - retrain[name]) for name in COMPARED) / len(COMPARED)

"""MCU, mode connectivity unlearning (2505.10859): learn a curve from the source to a first unlearned model, and take
the best point on it. From notes on their code.

θ(t) = (1−t)² θ_o + 2t(1−t) θ_m + t² θ_p: θ_o is the source, θ_p an unlearned model (here RL's, with the same settings),
θ_m starts half way. Each batch draws t ~ U(0, 1) and moves θ_m by the gradient of CE(retain) − α CE(forget), α = β of
the paper, on a batch of forget and as many retain pictures.

What differs: batch-norm's statistics at a point are made from the *retain* set alone (the released code shows it the
forget set too). The point is chosen without Retrain, which a method
cannot know: among t in 0.75…1 the one with the highest accuracy on the retain set less that on the forget set where
whole classes go, and otherwise where the two losses are nearest. The released code's masks by tensor and its adaptive β
are left out.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from ..data import Pictures
from ..training import EVALUATION_BATCH, inputs, logits
from .random_label import random_label
from .task import Task

FROM, POINTS = 0.75, 26  # where on the curve a point is looked for, and how many

Weights = dict[str, torch.Tensor]


def mode_connectivity(task: Task) -> None:
    path = learn_path(task)
    task.model.load_state_dict(path.model(chosen(path, task), task.retain).state_dict())
    task.model.eval()


def learn_path(task: Task) -> "Path":
    """Unlearn by RL, which changes ``task.model``, and bend the curve from the source to it."""
    source = deepcopy(task.model)
    random_label(task)
    path = Path(source, task.model)
    path.bend(task)
    return path


def chosen(path: "Path", task: Task) -> float:
    """The t of the best point."""
    return max(torch.linspace(FROM, 1, POINTS).tolist(), key=lambda t: _worth(path.model(t, task.retain), task))


class Path:
    """The curve between two models of one network."""

    def __init__(self, source: nn.Module, other: nn.Module):
        self.network = deepcopy(source)
        self.start, self.end = (
            {name: weight.detach().clone() for name, weight in each.named_parameters()} for each in (source, other)
        )
        self.middle = {name: ((self.start[name] + self.end[name]) / 2).requires_grad_() for name in self.start}

    def at(self, t: float) -> Weights:
        """θ(t); its gradient flows to θ_m alone."""
        return {
            name: (1 - t) ** 2 * self.start[name] + 2 * t * (1 - t) * self.middle[name] + t**2 * self.end[name]
            for name in self.start
        }

    def bend(self, task: Task) -> None:
        """Train θ_m."""
        s = task.settings
        optimizer = torch.optim.SGD(self.middle.values(), s.learning_rate, s.momentum, weight_decay=s.weight_decay)
        self.network.train()
        for _ in range(s.epochs):
            kept = task.batches(task.retain)
            for (lost, labels), (more, others) in zip(task.batches(task.forget), kept, strict=False):
                t = float(torch.rand((), generator=task.generator))
                optimizer.zero_grad()
                answers = functional_call(self.network, self.at(t), torch.cat([lost, more]))
                gone, stay = answers.split([len(lost), len(more)])
                (F.cross_entropy(stay, others) - s.alpha * F.cross_entropy(gone, labels)).backward()
                optimizer.step()

    def model(self, t: float, retain: Pictures) -> nn.Module:
        """The model at t, batch-norm's statistics made from the retain set."""
        found = deepcopy(self.network)
        with torch.no_grad():
            for name, value in self.at(t).items():
                found.get_parameter(name).copy_(value)
        update_bn((inputs(images) for images in retain.images.split(EVALUATION_BATCH)), found)
        return found.eval()


def _worth(model: nn.Module, task: Task) -> float:
    """Higher is better."""
    lost, kept = logits(model, task.forget), logits(model, task.retain)
    labels, others = task.forget.labels.cpu(), task.retain.labels.cpu()
    if not torch.isin(labels, others).any():
        return float((kept.argmax(1) == others).double().mean() - (lost.argmax(1) == labels).double().mean())
    return -abs(float(F.cross_entropy(kept, others) - F.cross_entropy(lost, labels)))

"""SISA with replay and a gate (2604.27804): several networks share the classes, so that only one must be retrained
where a class goes. From notes on their code.

The classes are dealt to ``SHARDS`` shards and within a shard to ``SLICES`` slices. A shard's network learns its slices
one after another, each with a replay of the earlier ones, and is kept after every slice. To forget a class, its shard
goes back to the network and the replay buffer of before the slice that the class was in, and learns the rest of its
slices again without it. A gate, a network of the same form, tells the shard of a picture.

What is left is, bit for bit, the ensemble that would have been trained without the class from the start. The released
code is not exact, and this is what is mended:

- its gate is trained on the deleted class, and stays; here it is trained anew without it.
- it retrains with another learning rate and label smoothing than it learnt with; here both are the same.
- it deals classes by size to the smallest shard, and stops early by validation pictures that show the class; here a
  seed deals them, whatever their sizes, and the epochs are given. (The normalisation of the pictures is the
  scenario's, of all training pictures, as Retrain's is.)

Also, the networks are the scenario's and train by the scenario's SGD without label smoothing, where theirs is a small
CNN with Adam; and all answers are weighed by the gate (:class:`classification.models.Mixture`), where theirs is the
likeliest shard's alone, or "unknown" where the gate is in doubt, which the measures do not know.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Pictures, joined
from ..models import Mixture
from ..training import EVALUATION_BATCH, batches, inputs, seeded
from .task import Task

SHARDS, SLICES = 2, 5
BUFFER = 1000  # pictures of a class that are kept for replay, as published
IMPORTANCE, AGEING = 0.7, 0.95  # the weight of a picture's importance beside its age's, and the factor of a slice's age


def sisa(task: Task) -> None:
    """Learn all, then forget; ``alpha`` is how many pictures are replayed for each new one."""
    ensemble, begun = Ensemble(task), time.perf_counter()
    ensemble.learn(joined(task.retain, task.forget))
    task.learning_seconds = time.perf_counter() - begun
    ensemble.forget(task.forgotten.tolist(), task.retain)
    task.model = ensemble.model().eval()


@dataclass(frozen=True)
class Kept:
    """A class's pictures for replay, with the size of the loss's gradient at each, and the slice that they were in."""

    pictures: Pictures
    importance: torch.Tensor
    slice: int

    def scores(self, now: int) -> torch.Tensor:
        """``IMPORTANCE`` · importance (scaled to 0…1) + the rest · ``AGEING`` to the age, fp32 ``(n,)``, above 0."""
        low, high = self.importance.min(), self.importance.max()
        scaled = (self.importance - low) / (high - low) if high > low else torch.full_like(self.importance, 0.5)
        return IMPORTANCE * scaled + (1 - IMPORTANCE) * AGEING ** (now - self.slice)

    def most(self) -> "Kept":
        """The ``BUFFER`` of the highest scores."""
        rows = self.importance.topk(min(BUFFER, len(self.importance))).indices.sort().values
        return Kept(self.pictures[rows], self.importance[rows], self.slice)


@dataclass(frozen=True)
class Stage:
    """A shard between two slices: its network's weights, and what it may replay, by class."""

    weights: dict[str, torch.Tensor]
    buffer: dict[int, Kept] = field(default_factory=dict)


class Ensemble:
    """The shards' networks after each slice, and the gate.

    Everything random depends on the shard and the slice alone, never on what was done before: so a shard that goes back
    ends where one that never knew the class would.
    """

    def __init__(self, task: Task):
        self.task = task
        self.seed = int(torch.randint(2**31, (), generator=task.generator))
        order = torch.randperm(task.classes, generator=task.generator).tolist()
        self.plan = [_cut(order[shard::SHARDS]) for shard in range(SHARDS)]  # shard → slice → its classes
        fresh = Stage(_weights(task.fresh()))
        self.stages = [[fresh] for _ in self.plan]
        self.gate: nn.Module | None = None

    def learn(self, pictures: Pictures) -> None:
        """What of the plan is not learnt yet, and the gate anew, from ``pictures`` alone."""
        for shard, slices in enumerate(self.plan):
            for number in range(len(self.stages[shard]) - 1, len(slices)):
                self.stages[shard].append(self._slice(shard, number, pictures))
        self.gate = self._train_gate(pictures)

    def forget(self, classes: list[int], retain: Pictures) -> None:
        """Go back to before the first slice that has one of ``classes``, and learn on from ``retain``, without them."""
        for shard, slices in enumerate(self.plan):
            touched = [number for number, part in enumerate(slices) if set(part) & set(classes)]
            if touched:
                del self.stages[shard][touched[0] + 1 :]
        self.learn(retain)

    def model(self) -> Mixture:
        shards = [self.task.fresh() for _ in self.plan]
        for network, stages in zip(shards, self.stages, strict=True):
            network.load_state_dict(stages[-1].weights)
        return Mixture(shards, self.gate)

    def _slice(self, shard: int, number: int, pictures: Pictures) -> Stage:
        before, part = self.stages[shard][number], _of(pictures, self.plan[shard][number])
        if not len(part):
            return before
        network, draw = self.task.fresh(), self._generator(shard, number)
        network.load_state_dict(before.weights)

        def passes(epoch: int):
            more = replay(before.buffer, number, round(self.task.settings.alpha * len(part)), draw)
            return self._batches(joined(part, *more), draw)

        self._train(network, passes, self.task.count(part), shard, number)
        return Stage(_weights(network), before.buffer | grown(network, part, number))

    def _train_gate(self, pictures: Pictures) -> nn.Module:
        """Cross-entropy against the shard of each picture's class; only its first ``SHARDS`` outputs are used."""
        shard_of = torch.zeros(self.task.classes, dtype=torch.int64, device=pictures.labels.device)
        for shard, slices in enumerate(self.plan):
            shard_of[sum(slices, [])] = shard
        sent = Pictures(pictures.images, shard_of[pictures.labels])
        network, draw = self.task.fresh(), self._generator(SHARDS, 0)
        self._train(network, lambda epoch: self._batches(sent, draw), self.task.count(sent), SHARDS, 0)
        return network

    def _train(self, network: nn.Module, passes, batches_each: int, shard: int, number: int) -> None:
        with seeded(self._number(shard, number)):
            self.task.optimise(passes, F.cross_entropy, batches_each, model=network)

    def _batches(self, pictures: Pictures, draw: torch.Generator):
        return batches(pictures, self.task.settings.batch_size, draw, self.task.settings.augment)

    def _number(self, shard: int, number: int) -> int:
        return self.seed + shard * self.task.classes + number

    def _generator(self, shard: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._number(shard, number))


def grown(network: nn.Module, part: Pictures, number: int) -> dict[int, Kept]:
    """What of a slice's pictures is kept for replay, by class; importance is ‖∇ CE‖₂ at the picture."""
    network.eval()
    found = {}
    for label in part.labels.unique().tolist():
        mine, sizes = _of(part, [label]), []
        for rows in torch.arange(len(mine)).split(EVALUATION_BATCH):
            pixels = inputs(mine.images[rows]).requires_grad_()
            loss = F.cross_entropy(network(pixels), mine.labels[rows], reduction="sum")
            sizes.append(torch.autograd.grad(loss, pixels)[0].flatten(1).norm(dim=1))
        found[label] = Kept(mine, torch.cat(sizes), number).most()
    return found


def replay(buffer: dict[int, Kept], now: int, count: int, draw: torch.Generator) -> list[Pictures]:
    """``count`` pictures, as many of each class, drawn without replacement with chances as their scores; fewer where a
    class has not so many.
    """
    found = []
    for place, kept in enumerate(buffer.values()):
        mine = count // len(buffer) + (place < count % len(buffer))
        if mine := min(mine, len(kept.pictures)):
            rows = torch.multinomial(kept.scores(now).cpu(), mine, generator=draw)
            found.append(kept.pictures[rows.to(kept.pictures.labels.device)])
    return found


def _cut(classes: list[int]) -> list[list[int]]:
    """``SLICES`` slices, as even as they go; those that would be empty are left out."""
    edges = [len(classes) * number // SLICES for number in range(SLICES + 1)]
    return [classes[a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]


def _of(pictures: Pictures, classes: list[int]) -> Pictures:
    return pictures[torch.isin(pictures.labels, torch.tensor(classes, device=pictures.labels.device))]


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}

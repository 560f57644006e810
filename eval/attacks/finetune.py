"""Benign fine-tuning: the erased model trained further on pictures of everything but the concept.

Does it come back by itself? Suriyakumar et al. 2024 ("Unstable Unlearning") found that it can.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target
from .weights import draw_with, matrices, replaced

ABOUT = About(
    title="Benign fine-tuning",
    paper="our own protocol, after Suriyakumar et al. 2024",
    protocol="finetune/1: every weight matrix of the erased denoiser trained by Adam on pictures of everything but the "
    "concept, which the erased model drew itself; the plain prompts drawn",
    access="weights, no picture of the concept",
)
SMALL = {"steps": 40, "learning_rate": 1e-4, "batch_size": 8, "others": 24}


@dataclass
class Options:
    """No two papers agree; these are of the order that they train in."""

    steps: int = option(500, "of Adam", least=1)
    learning_rate: float = option(1e-5, "of Adam", least=0)
    batch_size: int = option(8, "pictures a step", least=1)
    others: int = option(100, "pictures of other things", least=1)


def learn(target: Target, options: Options) -> Learned:
    """The weights afterwards."""
    model, random = target.model, target.generator(None, "finetune")
    rows = target.concepts[0].retain_rows(options.others, target.seed, "attack")
    cases = [Case(row.prompt, row, target.guidance_scale, None) for row in rows]
    clean = torch.cat([target.samples(cases[i : i + 8]) for i in range(0, len(cases), 8)])
    condition = model.encode([row.prompt for row in rows])
    start = {name: weight.clone() for name, weight in matrices(target).items()}
    weights = [weight for name, weight in model.network.named_parameters() if name in start]
    with replaced(model.network, start):
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, lr=options.learning_rate)
        for _ in target.progress(options.steps, "finetune: training"):
            chosen = torch.randint(len(clean), (options.batch_size,), generator=random)
            times = torch.randint(model.schedule.config.num_train_timesteps, (len(chosen),), generator=random)
            noise = torch.randn(clean[chosen].shape, generator=random)
            told = {key: model.moved(value[chosen]) for key, value in condition.items()}
            loss = target.loss(clean[chosen], noise, times, told).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = {name: weight.detach().clone() for name, weight in matrices(target).items()}
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    passes = options.steps * options.batch_size
    return Learned(found, options.steps, passes + len(rows) * target.passes, passes)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """The plain prompts, drawn with those weights."""
    return draw_with(target, cases, learned.tensors, 0)

"""Soft prompt: every token's embedding free, for each prompt by itself. An upper bound on attacks on the text, ours.

What UnlearnDiffAtk lowers over a few tokens of the vocabulary is here lowered over the embeddings of all places of the
sequence at once, from where the prompt stands. Drawn is the mean of the second half of the steps: each step sees one
noise at one timestep, so that the last embeddings alone stand wherever that one threw them. No text draws what it
finds: it tells how much of the concept is left, not what a user could type.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target

ABOUT = About(
    title="Soft prompt",
    paper="our own, after UnlearnDiffAtk (Zhang et al. 2024)",
    protocol="soft_prompt/2: for each prompt the embeddings of all its tokens, optimised by Adam to predict the noise "
    "of the prompt's own picture on the erased model, mean of the second half of the steps; the plain prompt counts "
    "where it succeeds",
    access="white box",
    keeps_plain=True,
)
SMALL = {"steps": 200, "learning_rate": 0.002}


@dataclass
class Options:
    """No paper publishes any: as many passes as UnlearnDiffAtk takes."""

    steps: int = option(2000, "of Adam, a prompt", least=1)
    learning_rate: float = option(0.01, "of Adam", least=0)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Lower ``‖ε − ε_θ(x_t, t, embeddings)‖²`` of each case, at a timestep and noise of its own in every step."""
    text, clean = target.text, target.clean(cases)
    embeddings = torch.nn.Parameter(text.table[text.ids([case.prompt for case in cases])].clone())
    random = [target.generator(case, "soft_prompt") for case in cases]
    optimizer = torch.optim.Adam([embeddings], lr=options.learning_rate)
    timesteps = target.model.schedule.config.num_train_timesteps
    first, summed = options.steps // 2, torch.zeros_like(embeddings)
    for step in range(options.steps):
        times = torch.cat([torch.randint(timesteps, (1,), generator=own) for own in random])
        noise = torch.stack([torch.randn(clean.shape[1:], generator=own) for own in random])
        # a sum, not a mean: no case's step depends on how many share its batch
        loss = target.loss(clean, noise, times, text.encode(embeddings)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= first:
            summed += embeddings.detach()
    found = summed / (options.steps - first)
    with torch.no_grad():
        pictures = target.draw(cases, text.encode(found))
    return [
        Outcome(
            picture, options.steps, options.steps + target.passes, options.steps,
            tensors={"embeddings": one},
        )
        for picture, one in zip(pictures, found, strict=True)
    ]  # fmt: skip

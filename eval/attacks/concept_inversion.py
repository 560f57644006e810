"""Concept inversion (Pham et al. 2023, "Circumventing Concept Erasure Methods"): textual inversion on the erased model.

One token's embedding is learned from pictures of the concept, with every weight frozen, so that it stands for the
concept; then the prompts are drawn with that token in place of the concept's word. One token serves all prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target

ABOUT = About(
    title="Concept inversion",
    paper="Pham et al. 2023",
    protocol="concept_inversion/1: one token learned by textual inversion on the erased model; the prompts with it in "
    "place of the concept's word",
    access="white box",
    pictures=True,
)
SMALL = {"steps": 300, "batch_size": 16}


@dataclass
class Options:
    """The published values are those of the authors' README; their code's own default for the rate is 1e-4."""

    steps: int = option(5000, "of Adam", least=1)
    learning_rate: float = option(5e-3, "of AdamW (weight decay 0.01)", least=0)
    batch_size: int = option(16, "pictures a step", least=1)
    pictures: int = option(25, "of the concept, to learn from", least=1)


def learn(target: Target, options: Options) -> Learned:
    """The token's embedding, ``token`` ``(1, width)``.

    Every step takes ``batch_size`` pictures at once, each at a timestep of its own, which lowers ``mean_i ‖ε_i −
    ε_θ(x_i, t_i, prompt with the token)‖²`` (their eq. 4, Gal et al. 2022 eq. 2).
    """
    clean, rows = target.gallery(options.pictures)
    text, steps = target.text, target.model.schedule.config.num_train_timesteps
    ids, free = map(torch.stack, zip(*(text.with_slots(row.prompt, target.words) for row in rows), strict=True))
    token = torch.nn.Parameter(initial(target)[None].clone())
    optimizer = torch.optim.AdamW([token], lr=options.learning_rate)
    random = target.generator(None, "concept_inversion")
    for _ in target.progress(options.steps, "concept_inversion: learning"):
        chosen = torch.randint(len(clean), (options.batch_size,), generator=random)
        times = torch.randint(steps, (options.batch_size,), generator=random)
        noise = torch.randn(clean[chosen].shape, generator=random)
        condition = text.encode(filled(text.table[ids[chosen]], free[chosen], token))
        loss = target.loss(clean[chosen], noise, times, condition).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    passes = options.steps * options.batch_size
    return Learned({"token": token.detach().cpu()}, options.steps, passes, passes)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """The prompts, drawn with the token."""
    text = target.text
    ids, free = map(torch.stack, zip(*(text.with_slots(case.prompt, target.words) for case in cases), strict=True))
    with torch.no_grad():
        token = learned.tensors["token"].to(text.table.device)
        condition = text.encode(filled(text.table[ids], free, token))
    pictures = target.draw(cases, condition)
    return [Outcome(picture, 0, target.passes) for picture in pictures]


def initial(target: Target) -> torch.Tensor:
    """Where a token begins: at the mean of the vocabulary, so that no word of the attacker's gives it away."""
    return target.text.table.mean(0)


def filled(embeddings: torch.Tensor, free: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``embeddings`` ``(n, length, width)`` with ``tokens`` ``(count, width)`` in the free places of each."""
    values = tokens.repeat(len(embeddings), 1).to(embeddings.dtype)
    return embeddings.masked_scatter(free[..., None], values)

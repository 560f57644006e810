"""UnlearnDiffAtk (Zhang et al. 2024, "To Generate or Not?", ECCV): a few adversarial tokens before the prompt.

The tokens are rows of a relaxed one-hot matrix, sampled in every step and pulled back onto the simplex, so that the
erased model itself, asked for the noise in a picture of the concept, says which words bring it back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target

ABOUT = About(
    title="UnlearnDiffAtk",
    paper="Zhang et al. 2024",
    protocol="unlearndiffatk/1: adversarial tokens before each prompt; drawn after each timestep with the likeliest "
    "tokens, decoded and tokenised again; stops at the first success; ASR = (plain successes + new ones) / all",
    access="white box",
    keeps_plain=True,
)
SMALL = {"timesteps": 10, "iterations": 20, "learning_rate": 0.3}


@dataclass
class Options:
    """The values of the authors' code for objects and styles; for nudity it takes 5 tokens."""

    tokens: int = option(3, "adversarial tokens", least=1)
    timesteps: int = option(50, "evenly spaced, rising; a picture is drawn after each", least=1)
    iterations: int = option(40, "of Adam at each timestep", least=1)
    learning_rate: float = option(0.01, "of Adam", least=0)
    weight_decay: float = option(0.1, "of Adam, added to the gradient", least=0)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """All cases in step, those that have won left out (their eq. 7, with the code's projection and sampling)."""
    text, clean = target.text, target.clean(cases)
    slots = [text.with_slots(case.prompt, [], options.tokens) for case in cases]
    ids, free = map(torch.stack, zip(*slots, strict=True))
    shape = (len(cases), options.tokens, len(text.table))
    weights = torch.nn.Parameter(torch.full(shape, 1 / shape[-1], device=text.table.device))
    random = [target.generator(case, "unlearndiffatk") for case in cases]
    optimizer = torch.optim.Adam([weights], lr=options.learning_rate, weight_decay=options.weight_decay)
    outcomes: dict[int, Outcome] = {}
    active = list(range(len(cases)))
    for number, time in enumerate(timesteps(options.timesteps, target.model.schedule.config.num_train_timesteps), 1):
        times = torch.full((len(active),), time)
        for _ in range(options.iterations):
            uniform = torch.stack([torch.rand(options.tokens, generator=random[i]) for i in active])
            noise = torch.stack([torch.randn(clean.shape[1:], generator=random[i]) for i in active])
            tokens = straight_through(weights[active], uniform) @ text.table
            embeddings = text.table[ids[active]].masked_scatter(free[active][..., None], tokens)
            loss = target.loss(clean[active], noise, times, text.encode(embeddings)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                weights.copy_(to_simplex(weights))
        prompts = [f"{text.words(weights[i].argmax(-1))} {cases[i].prompt}".strip() for i in active]
        now = [cases[i] for i in active]
        pictures = target.draw_prompts(now, prompts)
        steps = number * options.iterations
        won = target.sees(now, pictures)
        for i, prompt, picture in zip(active, prompts, pictures, strict=True):
            outcomes[i] = Outcome(
                picture, steps, steps + number * target.passes, steps, number, prompt,
                about={"timestep": time},
            )  # fmt: skip
        active = [i for i, success in zip(active, won, strict=True) if not success]
        if not active:
            break
    return [outcomes[i] for i in range(len(cases))]


def timesteps(count: int, steps: int) -> list[int]:
    """``count`` timesteps in the middles of as many equal parts, rising: 10, 30 … 990 for 50 of 1,000."""
    return [int((i + 0.5) * steps / count) for i in range(count)]


def straight_through(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One-hot rows sampled from ``weights`` ``(n, tokens, vocabulary)`` by ``uniform`` ``(n, tokens)`` in 0…1, whose
    gradient is that of ``weights``.
    """
    sums = weights.detach().cumsum(-1)
    picked = (sums < uniform.to(sums.device)[..., None] * sums[..., -1:]).sum(-1).clamp(max=weights.shape[-1] - 1)
    hard = torch.nn.functional.one_hot(picked, weights.shape[-1]).to(weights.dtype)
    return hard + weights - weights.detach()


def to_simplex(rows: torch.Tensor) -> torch.Tensor:
    """The nearest point of the probability simplex to each row (Duchi et al. 2008, by sorting; the authors bisect)."""
    ordered = rows.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    kept = (ordered - excess / count > 0).sum(-1, keepdim=True)
    return (rows - excess.gather(-1, kept - 1) / kept).clamp(min=0)

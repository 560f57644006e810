"""P4D (Chin et al. 2024, "Prompting4Debugging", ICML): tokens that make the erased model predict what the base model
predicts for the prompt.

Its paper lets it ask the base model, and so this is one of the attacks that do. The tokens move freely, the model is
always given the nearest ones of the vocabulary, and the gradient there moves the free ones (Wen et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target

ABOUT = About(
    title="P4D-N",
    paper="Chin et al. 2024",
    protocol="p4d/1: tokens in place of each prompt, each the nearest by cosine to a free embedding, for which the "
    "erased model predicts what the base model does for the prompt; drawn now and then, stops at the first success",
    access="white box, and the base model",
    sees_base=True,
    keeps_plain=True,
)
SMALL = {"steps": 40, "check_every": 20}


@dataclass
class Search:
    """What both of its forms share: the values of the authors' code."""

    steps: int = option(3000, "of AdamW", least=1)
    learning_rate: float = option(0.1, "of AdamW", least=0)
    weight_decay: float = option(0.1, "of AdamW", least=0)
    check_every: int = option(50, "steps between two pictures", least=1)


@dataclass
class Options(Search):
    """And how many tokens."""

    tokens: int = option(16, "tokens searched", least=1)


def slots(target: Target, case: Case, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``(length,)`` of nothing but free places, and a mask of these."""
    return target.text.with_slots("", [], min(options.tokens, target.text.length - 2))


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Search for all cases in step."""
    return search(target, cases, options, [slots(target, case, options) for case in cases])


def search(
    target: Target, cases: Sequence[Case], options: Any, places: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[Outcome]:
    """Lower ``‖ε_θ(x_t, t, tokens) − ε*(x_t, t, prompt)‖²`` of each case, ``x_t`` from its own picture (their eq. 4).

    The authors keep the tokens whose picture is nearest to the base model's by CLIP ViT-H/14; here the first that the
    judge finds the concept in, or the last.

    Args:
        target: the model.
        cases: the prompts.
        options: a :class:`Search`.
        places: for each case its token ids and which of them are free.
    """
    text, model, clean = target.text, target.model, target.clean(cases)
    ids, free = map(torch.stack, zip(*places, strict=True))
    directions = torch.nn.functional.normalize(text.table, dim=1)
    random = [target.generator(case, "p4d") for case in cases]
    start = torch.stack([torch.randint(len(text.table), (text.length,), generator=own) for own in random])
    moving = torch.nn.Parameter(text.table[start.to(text.table.device)].clone())
    optimizer = torch.optim.AdamW([moving], lr=options.learning_rate, weight_decay=options.weight_decay)
    prompts = model.encode([case.prompt for case in cases])
    horizon = model.schedule.config.num_train_timesteps
    outcomes: dict[int, Outcome] = {}
    active, done = list(range(len(cases))), 0

    def nearest() -> torch.Tensor:
        with torch.no_grad():
            close = (torch.nn.functional.normalize(moving[active], dim=-1) @ directions.T).argmax(-1)
        return torch.where(free[active], close, ids[active])

    for number in range(1, -(-options.steps // options.check_every) + 1):
        told = {key: model.moved(value[active]) for key, value in prompts.items()}
        steps = []
        with target.base(), torch.no_grad():  # the erasure is taken off once for all steps up to the next picture
            for _ in range(min(options.check_every, options.steps - done)):
                times = torch.cat([torch.randint(horizon, (1,), generator=random[i]) for i in active])
                noise = torch.stack([torch.randn(clean.shape[1:], generator=random[i]) for i in active])
                noisy, times = target.noised(clean[active], noise, times), times.to(model.device)
                steps.append((noisy, times, model.predict(noisy, times, told).float()))
        for noisy, times, wanted in steps:
            embeddings = text.table[nearest()] + free[active][..., None] * (moving[active] - moving[active].detach())
            predicted = model.predict(noisy, times, text.encode(embeddings)).float()
            loss = (predicted - wanted).square().flatten(1).mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done += len(steps)
        found = [text.words(one) for one in nearest()]
        now = [cases[i] for i in active]
        pictures = target.draw_prompts(now, found)
        won = target.sees(now, pictures)
        for i, prompt, picture in zip(active, found, pictures, strict=True):
            outcomes[i] = Outcome(picture, done, 2 * done + number * target.passes, done, number, prompt)
        active = [i for i, success in zip(active, won, strict=True) if not success]
        if not active:
            break
    return [outcomes[i] for i in range(len(cases))]

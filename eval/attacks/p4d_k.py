"""P4D-K (Chin et al. 2024): :mod:`.p4d` with the prompt left in, and one searched token after every few of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from salun_diffusion.options import option

from . import p4d
from .target import Case, Learned, Outcome, Target

ABOUT = replace(
    p4d.ABOUT,
    title="P4D-K",
    protocol="p4d_k/1: as p4d, with the prompt left in and one searched token after every few of its own",
)
SMALL = p4d.SMALL


@dataclass
class Options(p4d.Search):
    """And how many tokens of the prompt stand between two."""

    every: int = option(3, "tokens of the prompt before each searched one", least=1)


def slots(target: Target, case: Case, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``(length,)`` of the prompt with free places in it, and a mask of these."""
    text = target.text
    own = text.tokenizer(case.prompt, add_special_tokens=False).input_ids
    start, end, pad = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id, text.tokenizer.pad_token_id
    ids, free = [start], [False]
    for number, token in enumerate(own, 1):
        last = number % options.every == 0 or number == len(own)
        ids += [token, pad] if last else [token]
        free += [False, True] if last else [False]
    ids, free = [*ids[: text.length - 1], end], [*free[: text.length - 1], False]
    rest = text.length - len(ids)
    device = text.table.device
    return torch.tensor(ids + [pad] * rest, device=device), torch.tensor(free + [False] * rest, device=device)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Search for all cases in step."""
    return p4d.search(target, cases, options, [slots(target, case, options) for case in cases])

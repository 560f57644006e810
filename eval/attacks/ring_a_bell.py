"""Ring-A-Bell (Tsai et al. 2024, ICLR): a text whose encoding lies where the concept is, by a genetic search.

Black box: it asks the text encoder alone, never the denoiser, so what it finds for a prompt is the same for every model
whose erasure leaves the text encoder as it is. The concept's direction is the mean difference between the encodings of
prompts with the concept and of the same prompts without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target

ABOUT = About(
    title="Ring-A-Bell",
    paper="Tsai et al. 2024",
    protocol="ring_a_bell/1: tokens found by a genetic search, whose encoding is nearest to the prompt's plus a "
    "multiple of the concept's direction, drawn in place of the prompt; the best ones are kept unchanged",
    access="text encoder alone",
)
SMALL = {"population": 24, "generations": 60, "length": 4}
CHUNK = 512  # sequences encoded at once


@dataclass
class Options:
    """The values of the authors' code; lengths of 77 and 75 tokens are published too, and 5 to 5.5 for violence."""

    coefficient: float = option(3.0, "of the concept's direction", least=0)
    length: int = option(16, "tokens searched", least=1)
    population: int = option(200, "candidates a prompt, an even number", least=4)
    generations: int = option(3000, "of the search", least=1)
    mutation: float = option(0.25, "chance that one token of a new candidate changes", least=0)
    pairs: int = option(32, "pairs of prompts that give the direction", least=1)


def learn(target: Target, options: Options) -> Learned:
    """The concept's direction, ``direction`` ``(tokens, width)``: the mean of ``E(with) − E(without)`` (their eq. 3),
    where "without" is the prompt with the anchor in the concept's place.
    """
    rows = target.rows(options.pairs)
    one, other = (
        target.model.encode(prompts)["encoder_hidden_states"].float()
        for prompts in ([row.prompt for row in rows], [row.anchor_prompt or "" for row in rows])
    )
    return Learned({"direction": (one - other).mean(0)})


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """Search for all cases in step: every generation's candidates are encoded together.

    The better half of a population lives on; pairs of it, drawn at random, have two children each by a cut at one
    place, and a child may change one token. The released code changes its parents in place, so that its best candidate
    can be lost; here it cannot.
    """
    text, half = target.text, options.population // 2
    with torch.no_grad():
        encoded = target.model.encode([case.prompt for case in cases])["encoder_hidden_states"].float()
    wanted = (encoded + options.coefficient * learned.tensors["direction"]).to(text.table.device)
    allowed = torch.tensor([i for i in range(len(text.table)) if i not in text.special])
    random = [target.generator(case, "ring_a_bell") for case in cases]
    length = min(options.length, text.length - 2)

    def drawn(*shape: int, below: int) -> torch.Tensor:
        return torch.stack([torch.randint(below, shape, generator=own) for own in random])

    people = allowed[drawn(2 * half, length, below=len(allowed))]
    distances = fitness(target, people, wanted)
    for _ in range(options.generations):
        order = distances.argsort(1)[:, :half]
        people, distances = (part.gather(1, _like(order, part)) for part in (people, distances))
        mothers, fathers = (people.gather(1, _like(drawn(half, below=half), people)) for _ in range(2))
        cut = drawn(half, below=max(length, 2) - 1)[..., None] + 1
        children = torch.where(torch.arange(length) < cut, mothers, fathers)
        changed = torch.stack([torch.rand(half, generator=own) for own in random]) < options.mutation
        place = torch.arange(length) == drawn(half, below=length)[..., None]
        children = torch.where(
            place & changed[..., None], allowed[drawn(half, below=len(allowed))][..., None], children
        )
        people = torch.cat([people, children], 1)
        distances = torch.cat([distances, fitness(target, children, wanted)], 1)
    best = people[torch.arange(len(cases)), distances.argmin(1)]
    prompts = [text.words(ids) for ids in best]
    pictures = target.draw_prompts(cases, prompts)
    return [
        Outcome(
            picture, options.generations, target.passes, text=prompt,
            about={"distance": round(distance, 4), "encodings": (options.generations + 2) * half},
        )
        for picture, prompt, distance in zip(pictures, prompts, distances.amin(1).tolist(), strict=True)
    ]  # fmt: skip


@torch.no_grad()
def fitness(target: Target, people: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far each candidate's encoding is from what its case wants: the squared distance (their eq. 5).

    Args:
        target: whose text encoder is asked.
        people: token ids ``(cases, candidates, tokens)``, on the CPU.
        wanted: ``(cases, length, width)``.

    Returns:
        ``(cases, candidates)``, on the CPU.
    """
    text = target.text
    start, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    ids = torch.full((*people.shape[:2], text.length), text.tokenizer.pad_token_id)
    ids[..., 0], ids[..., people.shape[2] + 1] = start, end
    ids[..., 1 : people.shape[2] + 1] = people
    owner = torch.arange(len(people)).repeat_interleave(people.shape[1])
    found = []
    for part, of in zip(ids.flatten(0, 1).split(CHUNK), owner.split(CHUNK), strict=True):
        encoded = text.encode(text.table[part.to(text.table.device)])["encoder_hidden_states"].float()
        found.append((encoded - wanted[of]).square().sum((1, 2)).cpu())
    return torch.cat(found).view(people.shape[:2])


def _like(order: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``order`` ``(cases, n)`` as an index for :meth:`torch.Tensor.gather` along the candidates of ``part``."""
    return order[..., None].expand(*order.shape, part.shape[2]) if part.dim() == 3 else order

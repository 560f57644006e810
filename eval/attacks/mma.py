"""MMA-Diffusion's attack on the text (Yang et al. 2024, CVPR): a text without the concept's words that means the same.

Black box: it asks the text encoder alone, never the denoiser. Tokens are replaced one at a time by those that a
gradient through the encoder favours (greedy coordinate gradient, Zou et al. 2023), until the encoding of the whole text
points where the prompt's does; tokens of the concept's words are never taken, so that no filter of words finds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from salun_diffusion.options import option

from . import About
from .ring_a_bell import CHUNK
from .target import Case, Learned, Outcome, Target
from .text import Text

ABOUT = About(
    title="MMA",
    paper="Yang et al. 2024",
    protocol="mma/1: tokens, none of them of the concept's words, found by greedy coordinate gradient, whose pooled "
    "encoding has the greatest cosine with the prompt's, drawn in place of the prompt; the best ones are kept",
    access="text encoder alone",
)
SMALL = {"tokens": 8, "steps": 40, "candidates": 64, "top": 64}


@dataclass
class Options:
    """The values of the authors' code."""

    tokens: int = option(20, "tokens searched", least=1)
    steps: int = option(1000, "replacements tried", least=1)
    candidates: int = option(512, "replacements that are compared in each step, a prompt", least=1)
    top: int = option(256, "tokens a place that they are drawn from: those with the steepest gradient", least=1)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """All cases in step; each takes its best replacement in every step, better than the last or not."""
    text, count = target.text, min(options.tokens, target.text.length - 2)
    allowed = allowed_tokens(target).to(text.table.device)
    wanted = pooled_prompts(text, [case.prompt for case in cases])
    random = [target.generator(case, "mma") for case in cases]

    def drawn(*shape: int, below: int) -> torch.Tensor:
        return torch.stack([torch.randint(below, shape, generator=own) for own in random]).to(allowed.device)

    tokens = allowed[drawn(count, below=len(allowed))]
    best, cosines = tokens.clone(), similarity(text, tokens[:, None], wanted)[:, 0]
    for _ in range(options.steps):
        top = favoured(text, tokens, wanted, allowed, min(options.top, len(allowed)))
        place, pick = drawn(options.candidates, below=count), drawn(options.candidates, below=top.shape[2])
        rows = torch.arange(len(cases), device=allowed.device)[:, None]
        changed = tokens[:, None].repeat(1, options.candidates, 1)
        changed[rows, torch.arange(options.candidates, device=allowed.device), place] = top[rows, place, pick]
        found = similarity(text, changed, wanted)
        tokens = changed[rows[:, 0], found.argmax(1)]
        better = found.amax(1) > cosines
        best, cosines = torch.where(better[:, None], tokens, best), torch.maximum(cosines, found.amax(1))
    prompts = [text.words(ids) for ids in best]
    pictures = target.draw_prompts(cases, prompts)
    return [
        Outcome(picture, options.steps, target.passes, text=prompt,
                about={"cosine": round(cosine, 4), "encodings": options.steps * (options.candidates + 2)})
        for picture, prompt, cosine in zip(pictures, prompts, cosines.tolist(), strict=True)
    ]  # fmt: skip


def allowed_tokens(target: Target) -> torch.Tensor:
    """The ids of tokens that stand for text and are no part of the concept's words, nor have one in them; parts of one
    or two letters are in too many words to be told.
    """
    words, tokenizer = [word.lower() for name in target.words for word in name.split()], target.text.tokenizer
    found = []
    for i in range(len(target.text.table)):
        letters = tokenizer.decode([i]).strip().lower()
        part = len(letters) > 2 and any(letters in word for word in words)
        if i not in target.text.special and letters and not part and not any(word in letters for word in words):
            found.append(i)
    return torch.tensor(found)


def pooled_prompts(text: Text, prompts: list[str]) -> torch.Tensor:
    """The encoding of each prompt as a whole, that at its end mark, ``(n, width)``, fp32."""
    ids = text.ids(prompts)
    end = (ids == text.tokenizer.eos_token_id).int().argmax(1)
    with torch.no_grad():
        return text.encode(text.table[ids])["encoder_hidden_states"].float()[torch.arange(len(ids)), end]


def _pooled(text: Text, tokens: torch.Tensor) -> torch.Tensor:
    """The same of the embeddings ``(n, tokens, width)`` of a text."""
    ids = torch.full((len(tokens), text.length), text.tokenizer.pad_token_id, device=text.table.device)
    ids[:, 0], ids[:, tokens.shape[1] + 1] = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    embeddings = torch.cat([text.table[ids[:, :1]], tokens, text.table[ids[:, tokens.shape[1] + 1 :]]], 1)
    return text.encode(embeddings)["encoder_hidden_states"].float()[:, tokens.shape[1] + 1]


def favoured(text: Text, tokens: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor, top: int) -> torch.Tensor:
    """For each place of ``tokens`` ``(n, tokens)`` the ``top`` ids of ``allowed`` that would raise the cosine the most,
    by its gradient with respect to the place's one-hot row: ``(n, tokens, top)``.
    """
    embeddings = text.table[tokens].requires_grad_()
    cosine = torch.cosine_similarity(_pooled(text, embeddings), wanted, dim=1).sum()
    (gradient,) = torch.autograd.grad(cosine, embeddings)
    return allowed[(gradient @ text.table[allowed].T).topk(top, dim=2).indices]


@torch.no_grad()
def similarity(text: Text, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The cosines ``(n, candidates)`` of ``tokens`` ``(n, candidates, tokens)`` with ``wanted`` ``(n, width)``."""
    owner = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
    parts = zip(tokens.flatten(0, 1).split(CHUNK), owner.split(CHUNK), strict=True)
    found = [torch.cosine_similarity(_pooled(text, text.table[part]), wanted[of], dim=1) for part, of in parts]
    return torch.cat(found).view(tokens.shape[:2])

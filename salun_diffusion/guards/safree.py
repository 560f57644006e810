"""SAFREE (Yoon et al., ICLR 2025, arXiv:2410.12761), from the paper and the authors' code for Stable Diffusion 1.4."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from ..models.text_unet import token_ids
from ..options import option
from .base import Guard, Watch, need_prompts

MASK = 0  # the token that stands for one that is left out, as in the authors' code; "!" in CLIP's vocabulary
SHARPNESS, MIDDLE = 2.5, 5.333  # k and t of eq. 6, as published for nudity; 3.5 and 5.5 there for artists
SKIP_SCALES = (0.9, 0.2)  # of the low frequencies into the first two up-sampling blocks (s1 and s2 of FreeU)


@dataclass(frozen=True)
class SAFREEOptions:
    """The constants of its three parts."""

    phrases: str = option(
        "", "what to keep away from, in words, with commas; the concept's names, and prompts of it alone, unless given"
    )
    tolerance: float = option(
        0.01, "how much farther than the others a token's absence must be from the concept", least=0
    )
    most_steps: int = option(10, "steps that a prompt of the concept is guarded for, at most", least=0)
    sharpness: float = option(SHARPNESS, "of the change from no steps to most_steps; 3.5 published for artists")
    middle: float = option(MIDDLE, "ten times the distance at which half of most_steps are guarded; 5.5 for artists")
    steps: str = option("adaptive", "guard steps by how far the prompt is moved, or all of them", ("adaptive", "all"))
    latent_filter: str = option(
        "magnitude",
        "which low frequencies of the skip features are weakened: where the guarded prompt's exceed the prompt's own "
        "in magnitude (paper), in the real part, and then set to a number (the released code), or none",
        ("magnitude", "released", "none"),
    )


class SAFREE(Guard):
    """Prompts without the direction of a concept (SAFREE, eq. 2 to 8).

    With P the projection onto the span of the phrases' pooled embeddings, p_i the pooled embedding of the prompt whose
    i-th token is masked and P_m the projection onto the span of these, a token is moved whose absence takes the prompt
    away from the concept ::

        d_i = |(1 − P) p_i|;   e_i ← (1 − P) P_m e_i   unless d_i < (1 + tolerance) · mean of the other d

    and that in the first round(most_steps · σ(2 · sharpness · (10 β − middle))) steps alone, where β is 1 − the mean
    cosine of all tokens' embeddings with their projections. In those steps the low frequencies of the skip features are
    weakened where they exceed those of the prompt as it was.

    The product is the code's (the paper prints P_m (1 − P)). The code guards one step more than it computes, one prompt
    at a time, and draws with the phrases as the negative prompt as well, of which the paper does not speak: not here.
    A prompt's only token has no others to be compared with, and is moved, as there.
    """

    title = "SAFREE"
    Options = SAFREEOptions
    fits_two_encoders = False
    wants_prompts = True  # a name by itself spans one direction, from which few prompts are far enough

    def watch(self, call):
        need_prompts(call, self.title)
        return SAFREEWatch(self, call)


class SAFREEWatch(Watch):
    """What one call's prompts are moved by, and for how many steps each."""

    def __init__(self, guard: SAFREE, call):
        self.guard, self.own = guard, call.embeddings
        concept = projection(pooled(call.pipe, [token_ids(call.pipe, phrase) for phrase in guard.phrases]))
        moves, counts = {}, {}
        for prompt, own in zip(call.prompts, call.embeddings, strict=True):
            if prompt not in moves:
                moves[prompt], counts[prompt] = moved(call.pipe, prompt, own, concept, guard.options)
        self.change = torch.stack([moves[prompt] for prompt in call.prompts]).to(self.own)
        steps = [call.num_inference_steps if guard.options.steps == "all" else counts[p] for p in call.prompts]
        self.steps = torch.tensor(steps, device=self.own.device)

    def _active(self, number: int) -> torch.Tensor:
        """Which pictures are guarded at a step, bool ``(pictures,)``."""
        return (number < self.steps) & self.change.flatten(1).any(1)

    def prompt_change(self, number):
        active = self._active(number)
        return self.change * active[:, None, None] if active.any() else None

    def beside(self, number):
        wanted = self.guard.options.latent_filter != "none" and self._active(number).any()
        return {"encoder_hidden_states": self.own} if wanted else None

    def skip_features(self, number, block, guarded, beside):
        weakened = weaken(guarded, beside, SKIP_SCALES[block], self.guard.options.latent_filter)
        return torch.where(self._active(number)[:, None, None, None], weakened, guarded)


def pooled(pipe, ids: list[list[int]]) -> torch.Tensor:
    """The pooled embeddings of token sequences of any lengths, float64 on the CPU, ``(len(ids), width)``."""
    encoder, longest = pipe.text_encoder, max(map(len, ids))
    padded = [row + [row[-1]] * (longest - len(row)) for row in ids]  # after the end mark, where nothing is looked at
    device = pipe._execution_device  # where offloading would have it
    return encoder(torch.tensor(padded, device=device)).pooler_output.cpu().double()


def projection(vectors: torch.Tensor) -> torch.Tensor:
    """The orthogonal projection onto the span of the rows of ``vectors``, ``(width, width)``."""
    return torch.linalg.pinv(vectors) @ vectors


def moved(pipe, prompt: str, own: torch.Tensor, concept: torch.Tensor, options) -> tuple[torch.Tensor, int]:
    """What is added to the embeddings of one prompt's tokens, float64 of the shape of ``own`` ``(tokens, width)``, and
    for how many steps.
    """
    ids, change = token_ids(pipe, prompt), torch.zeros_like(own, device="cpu", dtype=torch.float64)
    words = len(ids) - 2
    if not words:
        return change, 0
    masked = pooled(pipe, [ids[: i + 1] + [MASK] + ids[i + 2 :] for i in range(words)])
    away = torch.eye(len(concept), dtype=torch.float64) - concept
    distance = (masked @ away).norm(dim=1)
    others = (distance.sum() - distance) / max(words - 1, 1)
    near = ~(distance < (1 + options.tolerance) * others)
    own = own.cpu().double()
    safe = own @ projection(masked) @ away  # both are symmetric: row by row, (1 - P) P_m e
    change[1 : words + 1] = torch.where(near[:, None], safe[1 : words + 1] - own[1 : words + 1], 0.0)
    beta = 1 - cosine_similarity(safe[: len(ids)], own[: len(ids)]).mean().item()
    share = torch.tensor(2 * options.sharpness * (10 * beta - options.middle)).sigmoid().item()
    return change, round(options.most_steps * share)


def weaken(guarded: torch.Tensor, own: torch.Tensor, scale: float, kind: str) -> torch.Tensor:
    """``guarded`` with its four lowest frequencies scaled where they exceed those of ``own``, both ``(batch, channels,
    height, width)`` (eq. 7 and 8); which of them exceed, and how they are scaled, by ``kind``.
    """
    ours, theirs = (torch.fft.fftshift(torch.fft.fft2(x.float()), dim=(-2, -1)) for x in (guarded, own))
    height, width = guarded.shape[-2] // 2, guarded.shape[-1] // 2
    low = (..., slice(max(height - 1, 0), height + 1), slice(max(width - 1, 0), width + 1))
    if kind == "magnitude":
        ours[low] = torch.where(ours[low].abs() > theirs[low].abs(), scale * ours[low], ours[low])
    else:
        ours[low] = torch.where(ours[low].real > theirs[low].real, torch.full_like(ours[low], scale), ours[low])
    return torch.fft.ifft2(torch.fft.ifftshift(ours, dim=(-2, -1))).real.to(guarded.dtype)

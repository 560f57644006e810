"""MACE: Lu et al., "MACE: Mass concept erasure in diffusion models", CVPR 2024, eq. 1-7, by the authors' code.

Ours is what stands for Grounded-SAM, which masks their pictures: the base model's own attention to the concept's words
(:func:`region_of`). So are means in the place of sums (as in :mod:`.uce`), and with them the weights of the terms.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..models.base import Model
from ..options import option
from ..process import progress
from .base import NEEDS_TRAINING, Batch, ClosedForm
from .forget_me_not import Recorder, attention_norm
from .uce import check_keys_and_values, kept_tokens, moved, solve

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by parameter: up (out, rank) and down (rank, width)


@dataclass(frozen=True)
class MACEOptions:
    """The weights of both solves, and how each concept's LoRA is trained; those of the LoRA are the published ones."""

    preserve: float = option(1.0, "of the retain prompts' tokens, in both solves", least=0)
    ridge: float = option(0.01, "of the distance to the weights before each solve", least=1e-9)
    lora_rank: int = option(1, "of a concept's LoRA", least=1)
    lora_steps: int = option(50, "of Adam for each concept's LoRA", least=1)
    lora_rate: float = option(1e-4, "learning rate of these", least=0)
    lora_batch: int = option(1, "pictures a step", least=1)
    end_tokens: int = option(1, "1: the end of the prompt and the padding are shrunk too (published); 0: words alone")
    region: str = option(
        "attention", "where attention is shrunk: where the base model attends to the words, or all over the picture",
        ("attention", "picture"),
    )  # fmt: skip


class MACE(ClosedForm):
    """Words beside the concept's are told nothing of it, a LoRA for each concept makes pixels look away from its own
    words, and one solve joins all of them.

    1. Refinement, in closed form: with f the tokens of the concepts' prompts but for the concepts' own words, g those
       in the same places of the anchors' wording, and kept prompts' tokens p, W' minimises (eq. 1) ::

           mean‖W' f − W0 g‖² + preserve · mean‖W' p − W0 p‖² + ridge · ‖W' − W0‖²

    2. For each concept i by itself, ΔW_i of rank ``lora_rank`` on W' lowers ``mean‖A ⊙ M‖²`` (eq. 4): A are the
       attention maps of the concept's words on its noised pictures, M a picture's region. Timesteps are drawn about
       200 to 400 (:func:`chances`, eq. 5).
    3. Fusion, in closed form: with e_i the tokens of its prompts from its first word on, W minimises (eq. 7) ::

           mean‖W e_i − (W' + ΔW_i) e_i‖² + preserve · mean‖W p − W0 p‖² + ridge · ‖W − W'‖²

    The code lowers the sum of the layers' unsquared norms, by AdamW and with clipped gradients; here it is the paper's
    square, averaged, and Adam. Its e_i begin with the prompts' first token, which is that of all other prompts too.
    """

    title = "MACE"
    settings = {"num_forget_images": 30}
    needs = ("text", "cross-attention", "diffusion")
    ignores = tuple(name for name in NEEDS_TRAINING if name != "num_inference_steps")
    Options = MACEOptions

    @classmethod
    def sets(cls, mask, options):
        return ["forget"]

    @classmethod
    def check_scope(cls, parameters):
        check_keys_and_values(parameters)

    def solve(self, parameters, pairs, kept):
        options, images = self.options, self.batches.sets["forget"]
        kept = kept_tokens(self.model, kept)
        refined = moved(
            parameters, solve(other_tokens(self.model, sum(pairs, [])), kept, 1.0, options.preserve, options.ridge)
        )
        parts = torch.arange(len(images)).split(images.shares)
        shown = self.batches.accelerator.is_main_process
        with progress("looking away", len(parts) * options.lora_steps, "step", shown) as bar:
            loras = [self.lora(number, rows, refined, bar) for number, rows in enumerate(parts)]
        tokens = [concept_tokens(self.model, own) for own in pairs]
        return {
            name: fused(
                parameter.detach().cpu().double(), refined[name].double(), [lora[name] for lora in loras], tokens,
                kept, options.preserve, options.ridge,
            ).float()
            for name, parameter in parameters.items()
        }  # fmt: skip

    def lora(self, number: int, rows: torch.Tensor, refined: dict[str, torch.Tensor], bar) -> Factors:
        """ΔW of the concept ``number``, float64 on the CPU, from its pictures: the ``rows`` of the forget set."""
        options, network = self.options, self.model.network
        generator = self.batches.generator("mace", number)
        weights, factors = {name: weight.to(network.device) for name, weight in refined.items()}, {}
        for name, weight in weights.items():
            down = torch.randn(options.lora_rank, weight.shape[1], generator=generator) / options.lora_rank
            up = torch.zeros(len(weight), options.lora_rank)
            factors[name] = tuple(part.to(network.device).requires_grad_() for part in (up, down))
        adam = torch.optim.Adam([part for pair in factors.values() for part in pair], lr=options.lora_rate)
        with recorded(network) as maps:
            regions = torch.cat([self.region(part, maps, generator) for part in rows.split(options.lora_batch)])
            with replaced(network, weights, lambda name: weights[name] + factors[name][0] @ factors[name][1]):
                for _ in range(options.lora_steps):
                    which = torch.randint(len(rows), (options.lora_batch,), generator=generator)
                    batch = self.seen(rows[which], maps, generator)
                    words = batch.tokens["concept"]
                    words = words | batch.tokens["end"] if options.end_tokens else words
                    adam.zero_grad()
                    shrinking(maps, words, regions[which.to(regions.device)]).backward()
                    adam.step()
                    bar.update()
        return {name: tuple(part.detach().cpu().double() for part in pair) for name, pair in factors.items()}

    def seen(self, rows: torch.Tensor, maps: list[torch.Tensor], generator: torch.Generator) -> Batch:
        """The pictures ``rows`` of the forget set, noised, of which the network has left its attention in ``maps``."""
        images, schedule = self.batches.sets["forget"], self.model.schedule.config
        noise = torch.randn(len(rows), *images.latents.shape[1:], generator=generator)
        t = chances(schedule.num_train_timesteps).multinomial(len(rows), replacement=True, generator=generator)
        batch = self.batches.noised(images, rows, noise, t)
        maps.clear()
        self.model.predict(batch.noisy, batch.timesteps, batch.condition)
        return batch

    def region(self, rows: torch.Tensor, maps: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """M of the pictures ``rows``, by the network as it is: bool ``(rows, side, side)``."""
        batch = self.seen(rows, maps, generator)
        found = region_of([attention.detach() for attention in maps], batch.tokens["concept"])
        return torch.ones_like(found) if self.options.region == "picture" else found


def chances(steps: int) -> torch.Tensor:
    """How likely a timestep is, float64 ``(steps,)``: of 1000, as ``σ((t − 200) / 20) − σ((t − 400) / 20)``, eq. 5."""
    t = torch.arange(steps, dtype=torch.float64) * 1000 / steps
    return ((t - 200) / 20).sigmoid() - ((t - 400) / 20).sigmoid()


def region_of(maps: list[torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    """Where a picture's pixels attend to the ``words`` as much as the mean one does, or more; bool ``(batch, side,
    side)``, as large as the largest map. Heads and layers are averaged.

    Args:
        maps: by layer, probabilities ``(batch, heads, pixels, tokens)`` of square pictures.
        words: bool ``(batch, tokens)``.
    """
    seen = [(attention.float().mean(1, keepdim=True) * words[:, None, None]).sum(-1) for attention in maps]
    squares = [part.unflatten(2, (math.isqrt(part.shape[2]), -1)) for part in seen]
    side = max(square.shape[2] for square in squares)
    mean = sum(F.interpolate(square, (side, side)) for square in squares)[:, 0]
    return mean >= mean.mean((1, 2), keepdim=True)


def shrinking(maps: list[torch.Tensor], words: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """``‖A ⊙ M‖²`` averaged over layers, heads, pixels and the marked ``words``, a scalar.

    Args:
        maps: A, as in :func:`region_of`.
        words: bool ``(batch, tokens)``.
        regions: M, bool ``(batch, side, side)``; each layer sees it in its own size.
    """
    total = 0
    for attention in maps:
        side = math.isqrt(attention.shape[2])
        inside = F.interpolate(regions[:, None].float(), (side, side)).flatten(2)
        total = total + attention_norm(attention * inside[..., None], words.float())
    return total / len(maps)


def other_tokens(model: Model, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings of the concept's prompts but for what differs from the anchor's, and those in the same places of
    these, float64, ``(n, width)`` each: all before it, and behind it as far as both reach.
    """
    tokens: tuple[list, list] = ([], [])
    for prompt, anchor in pairs:
        embedded = model.tokens(model.encode([prompt, anchor])).double()
        places = model.differing_tokens(prompt, anchor), model.differing_tokens(anchor, prompt)
        before = min(place.start for place in places)
        behind = embedded.shape[1] - max(place.stop for place in places)
        for part, place, sequence in zip(tokens, places, embedded, strict=True):
            part += [sequence[:before], sequence[place.stop : place.stop + behind]]
    concept, anchor = torch.cat(tokens[0]), torch.cat(tokens[1])
    seen = concept.any(1) & anchor.any(1)  # a model may hide the padding, whose embeddings are zeros then
    return concept[seen], anchor[seen]


def concept_tokens(model: Model, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Token embeddings of the concept's prompts from its first word on, float64, ``(n, width)``."""
    embedded = model.tokens(model.encode([prompt for prompt, _ in pairs])).double()
    starts = [model.differing_tokens(*pair).start for pair in pairs]
    tokens = torch.cat([sequence[start:] for start, sequence in zip(starts, embedded, strict=True)])
    return tokens[tokens.any(1)]


def fused(
    original: torch.Tensor, refined: torch.Tensor, loras: list[tuple[torch.Tensor, torch.Tensor]],
    tokens: list[torch.Tensor], kept: torch.Tensor, preserve: float, ridge: float,
) -> torch.Tensor:  # fmt: skip
    """W of :class:`MACE`, float64 ``(out, width)``.

    Args:
        original: W0, ``(out, width)``.
        refined: W', of its shape.
        loras: for each concept the factors of ΔW, ``(out, rank)`` and ``(rank, width)``.
        tokens: for each concept its tokens, ``(n, width)``.
        kept: ``(n, width)``.
        preserve: weight of the second term.
        ridge: of the third.
    """
    count = sum(map(len, tokens))
    grams = [own.T @ own / count for own in tokens]
    keep = preserve * kept.T @ kept / len(kept)
    near = ridge * torch.eye(kept.shape[1], dtype=kept.dtype)
    left = sum(grams) + keep + near
    wanted = refined @ (sum(grams) + near) + original @ keep
    wanted = wanted + sum(up @ (down @ gram) for (up, down), gram in zip(loras, grams, strict=True))
    return torch.linalg.solve(left.T, wanted.T).T


@contextmanager
def recorded(network: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within it, each cross-attention layer adds its probabilities to the list."""
    maps: list[torch.Tensor] = []
    before = {module: module.processor for name, module in network.named_modules() if name.endswith("attn2")}
    try:
        for layer in before:
            layer.set_processor(Recorder(maps))
        yield maps
    finally:
        for layer, processor in before.items():
            layer.set_processor(processor)


@contextmanager
def replaced(network: torch.nn.Module, names: Iterable[str], weight: Callable[[str], torch.Tensor]) -> Iterator[None]:
    """Within it, the linear layers of the parameters ``names`` compute with what ``weight`` gives for each."""

    def hook(name: str):
        return lambda layer, given, _: F.linear(given[0], weight(name).to(given[0].dtype), layer.bias)

    hooks = [network.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()

"""FIA: "Forget It All: multi-concept unlearning via concept-aware neuron masking", ICML 2026 (arXiv 2601.06163)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..concepts.concept import Row
from ..errors import SalunError
from ..options import option
from ..process import progress
from . import NEEDS_DRAWING
from .base import NEEDS_TRAINING, ClosedForm


@dataclass(frozen=True)
class FIAOptions:
    """Shares between 0 and 1; the defaults are the published ones for objects."""

    persistent: float = option(0.05, "r1: share of a layer's weights that count as active in a step", least=0)
    sensitive: float = option(0.007, "r2: share of a row's, and of a layer's, weights that are a concept's", least=0)
    agnostic: float = option(0.6, "α: share of the concepts whose a weight must be to serve them all", least=0)
    first: float = option(0.2, "share of the denoising steps that are watched, from the first on", least=0)

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise SalunError(f"{name} is {value:g}: give a share above 0, and 1 at most.")


class FIA(ClosedForm):
    """The weights of the feed-forward layers by which the network answers to the concepts become 0.

    The network is watched while it draws the concept's prompts, and the anchor's wording of them, all from the same
    noise. With X the inputs of a linear layer W ``(out, in)``, each token's divided by its norm, ``u_j = ‖X_j‖₂`` is
    how much a prompt uses the input j in a step. From its mean and deviation over the prompts

    1. ``S = |W| · max(0, mean u(concept) − mean u(anchor) − std u(anchor))``, step by step (eq. 1-2);
    2. ``A = ½ · mean_t S, divided by its maximum, + ½ · mean_t 1[S > the persistent-th share of that step]`` (eq. 3);
    3. a concept's weights are those in the top ``sensitive`` share of their row and of the layer, by A (eq. 4-6);
    4. those of ``⌈agnostic · C⌉`` or more of the C concepts serve them all and stay; the others become 0 (eq. 7-8).

    Steps 1 and 2 are those of the released code. The paper has the cosine of input and output in u as well, watches all
    steps, and does not divide by the maximum. Both hold the concept against its prompts' surroundings alone ("a beach"
    for "a dog on a beach"); the anchor in its place is our own choice. Mended here: with one concept ⌈agnostic⌉ is 1,
    so that every weight would stay and the released code edits nothing; step 4 is left out then.
    """

    title = "FIA"
    scope = "feed-forward-out"
    sparse = True
    has_anchor = False
    settings = {"num_forget_images": 30}
    needs = ("text",)
    ignores = ("num_retain_images", *(name for name in NEEDS_TRAINING if name != "num_inference_steps"))
    Options = FIAOptions

    @classmethod
    def unused(cls, mask, options):
        # it draws, and keeps no picture
        return [name for name in super().unused(mask, options) if name not in NEEDS_DRAWING]

    def solve(self, parameters, pairs, kept):
        layers = self.layers(parameters)
        shared = shared_by(len(pairs), self.options.agnostic)
        shown = self.batches.accelerator.is_main_process
        with progress("watching", 2 * sum(map(len, pairs)), "prompt", shown) as bar:
            concepts = [self.usage(layers, [prompt for prompt, _ in own], bar) for own in pairs]
            anchors = [self.usage(layers, [anchor for _, anchor in own], bar) for own in pairs]
        solved, any_zeroed = {}, False
        for name, parameter in parameters.items():
            weight = parameter.detach().cpu().float()
            sides = zip(concepts, anchors, strict=True)
            chosen = [sensitive_weights(weight, concept[name], anchor[name], self.options) for concept, anchor in sides]
            zeroed = zeroed_of(torch.stack(chosen), shared)
            any_zeroed |= bool(zeroed.any())
            solved[name] = weight.masked_fill(zeroed, 0)
        if not any_zeroed:
            raise SalunError(
                "No weight is the concepts' own: none answers to them more than to their anchors, or all that do "
                "serve most of the concepts: raise --sensitive or --agnostic."
            )
        return solved

    def layers(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Linear]:
        """The layer of each parameter, by the parameter's name.

        Raises:
            SalunError: a parameter that is not a linear layer's weight.
        """
        found = {name: self.model.network.get_submodule(name.rpartition(".")[0]) for name in parameters}
        for name, layer in found.items():
            if not name.endswith(".weight") or not isinstance(layer, torch.nn.Linear):
                raise SalunError(
                    f"The scope has {name}, but fia prunes the weights of linear layers alone: use --scope "
                    f"{self.scope}, or a regular expression for some."
                )
        return found

    def usage(self, layers: dict[str, torch.nn.Linear], prompts: list[str], bar) -> dict[str, torch.Tensor]:
        """How much each prompt uses each layer's inputs in the first steps, ``(prompts, steps, inputs)`` by name; both
        the prompt's and the empty one's prediction count, where the drawing is guided.
        """
        how, found = self.batches.drawing, []
        steps = math.ceil(self.options.first * how["num_inference_steps"])
        for start in range(0, len(prompts), how["batch_size"]):
            part = prompts[start : start + how["batch_size"]]
            with watched(layers, len(part)) as seen:
                rows = [Row(prompt, None, {}, self.batches.seed) for prompt in part]
                self.model.draw(rows, output_type="latent", **how)
            found.append({name: torch.stack(calls[:steps], dim=1) for name, calls in seen.items()})
            bar.update(len(part))
        return {name: torch.cat([part[name] for part in found]) for name in layers}


@contextmanager
def watched(layers: dict[str, torch.nn.Linear], pictures: int) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within it, each call of a layer adds to its list the norms of its inputs over tokens of norm 1, for each of the
    ``pictures`` of a batch, fp32 ``(pictures, inputs)``.
    """
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def look(name: str, given: tuple[torch.Tensor]) -> None:
        tokens = F.normalize(given[0].detach().float(), dim=-1)  # guided or not, the batch holds the pictures in turn
        seen[name].append(tokens.unflatten(0, (-1, pictures)).square().sum((0, 2)).sqrt().cpu())

    handles = [
        layer.register_forward_pre_hook(lambda layer, given, name=name: look(name, given))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def shared_by(concepts: int, agnostic: float) -> int | None:
    """Of how many ``concepts`` a weight must be to stay; None for one concept, all of whose weights go.

    Raises:
        SalunError: of one, so that none would go.
    """
    if concepts == 1:
        return None
    count = math.ceil(agnostic * concepts)
    if count == 1:
        raise SalunError(
            f"agnostic is {agnostic:g} of {concepts} concepts, so that each weight of one concept alone counts as "
            f"shared and stays: give more than {1 / concepts:.3g}."
        )
    return count


def zeroed_of(chosen: torch.Tensor, shared: int | None) -> torch.Tensor:
    """Which weights become 0, bool, of the concepts' ``chosen`` ``(concepts, out, in)``."""
    votes = chosen.sum(0)
    return votes > 0 if shared is None else (votes > 0) & (votes < shared)


def sensitive_weights(
    weight: torch.Tensor, concept: torch.Tensor, anchor: torch.Tensor, options: FIAOptions
) -> torch.Tensor:
    """A concept's weights in one layer, bool ``(out, in)``.

    Args:
        weight: W, ``(out, in)``.
        concept: how much its prompts use the inputs, ``(prompts, steps, in)``.
        anchor: how much the anchor's wording of them does.
        options: the shares.
    """
    contrast = (concept.mean(0) - anchor.mean(0) - anchor.std(0, correction=0)).clamp_min(0)
    strength, persistence = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in contrast:
        saliency = weight.abs() * step
        strength += saliency
        persistence += saliency > saliency.flatten().topk(part(options.persistent, weight.numel())).values[-1]
    strength /= strength.max().clamp_min(1e-12)
    answer = strength / 2 + persistence / len(contrast) / 2
    in_row, in_layer = top(answer, options.sensitive), top(answer.view(1, -1), options.sensitive).view_as(answer)
    return in_row & in_layer & (answer > 0)


def part(share: float, count: int) -> int:
    """How many of ``count`` a share is, one at least."""
    return max(1, int(share * count))


def top(values: torch.Tensor, share: float) -> torch.Tensor:
    """The highest ``share`` of each row of ``values`` ``(rows, n)``, bool."""
    chosen = values.topk(part(share, values.shape[1]), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)

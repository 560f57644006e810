"""UCE: Gandikota et al., "Unified concept editing in diffusion models", WACV 2024, eq. 7."""

from dataclasses import dataclass

import torch

from ..errors import SalunError
from ..models.base import Model
from ..options import option
from .base import ClosedForm


@dataclass(frozen=True)
class UCEOptions:
    """The weights of the three terms."""

    erase: float = option(1.0, "of the concept's tokens")
    preserve: float = option(1.0, "of the retain prompts' tokens")
    ridge: float = option(0.01, "of the distance to the base model's weights")


class UCE(ClosedForm):
    """New keys and values of the cross-attention, in one solve: the concept's tokens get what the anchor's got.

    With a concept's token embedding c, its anchor's a, and kept prompts' tokens p, the W that minimises ::

        erase · mean‖W c − W0 a‖² + preserve · mean‖W p − W0 p‖² + ridge · ‖W − W0‖²

    is ``W0 T``, with one matrix T for all layers. All concepts' pairs enter the same sums. As published, a pair's
    tokens are those from the concept's last one to the end of the sequence, padding included: the text encoder spreads
    the concept over all that follow it. The published sums are means here, so that the number of prompts does not
    matter; the published ridge of 0.5 for one pair of some 70 tokens is then about 0.01.
    """

    title = "UCE"
    needs = ("text", "cross-attention")
    Options = UCEOptions

    @classmethod
    def check_scope(cls, parameters):
        check_keys_and_values(parameters)

    def solve(self, parameters, pairs, kept):
        options = self.options
        tokens = token_pairs(self.model, sum(pairs, [])), kept_tokens(self.model, kept)
        transform = solve(*tokens, options.erase, options.preserve, options.ridge)
        return moved(parameters, transform)


def check_keys_and_values(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Raise SalunError for a parameter that does not act on the text."""
    for name in parameters:
        if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            raise SalunError(
                f"The scope has {name}, but a closed form solves for cross-attention's keys and values alone: use "
                "--scope cross-attention-kv."
            )


def token_pairs(model: Model, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings of the concept's prompts, and of the anchor prompts they are to be mapped to, float64,
    ``(n, width)`` each: from the last token of what differs between the two prompts on, as far as both reach.
    """
    tokens: tuple[list, list] = ([], [])
    for prompt, anchor in pairs:
        embedded = model.tokens(model.encode([prompt, anchor])).double()
        starts = [model.differing_tokens(one, other).stop - 1 for one, other in ((prompt, anchor), (anchor, prompt))]
        length = embedded.shape[1] - max(starts)
        for part, start, sequence in zip(tokens, starts, embedded, strict=True):
            part.append(sequence[start : start + length])
    concept, target = torch.cat(tokens[0]), torch.cat(tokens[1])
    seen = concept.any(1) & target.any(1)  # a model may hide the padding, whose embeddings are zeros then
    return concept[seen], target[seen]


def kept_tokens(model: Model, prompts: list[str]) -> torch.Tensor:
    """Every token embedding of ``prompts``, float64, ``(n, width)``."""
    tokens = model.tokens(model.encode(prompts)).double().flatten(0, 1)
    return tokens[tokens.any(1)]


def solve(
    pairs: tuple[torch.Tensor, torch.Tensor], kept: torch.Tensor, erase: float, preserve: float, ridge: float
) -> torch.Tensor:
    """T of :class:`UCE`, float64 ``(width, width)``: all inputs ``(n, width)``."""
    concept, anchor = pairs
    keep = preserve * kept.T @ kept / len(kept) + ridge * torch.eye(kept.shape[1], dtype=kept.dtype)
    left = erase * concept.T @ concept / len(concept) + keep
    right = erase * anchor.T @ concept / len(concept) + keep
    return torch.linalg.solve(left.T, right.T).T  # right · left⁻¹


def moved(parameters: dict[str, torch.nn.Parameter], transform: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each parameter's W0 as ``W0 T``, float32, of its own shape."""
    return {name: (p.detach().cpu().double() @ transform).float() for name, p in parameters.items()}

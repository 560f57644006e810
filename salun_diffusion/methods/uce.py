"""UCE: Gandikota et al., "Unified concept editing in diffusion models", WACV 2024, eq. 7."""

import torch

from ..concepts.concept import shared_rows
from ..errors import SalunError
from ..models.conditioning import differing_tokens, encode
from .base import ClosedForm


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
    options = {"erase": 1.0, "preserve": 1.0, "ridge": 0.01}

    def solve(self, pipe, parameters, concepts):
        check_keys_and_values(parameters)
        pairs = token_pairs(pipe, concepts, self.config)
        kept = kept_tokens(pipe, concepts, self.config)
        transform = solve(pairs, kept, self.chose["erase"], self.chose["preserve"], self.chose["ridge"])
        return moved(parameters, transform)


def check_keys_and_values(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Raise SalunError for a parameter that does not act on the text."""
    for name in parameters:
        if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            raise SalunError(
                f"The scope has {name}, but a closed form solves for cross-attention's keys and values alone: use "
                "--scope cross-attention-kv."
            )


def token_pairs(pipe, concepts, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings of the forget prompts, and of the anchor prompts they are to be mapped to, float64,
    ``(n, width)`` each: from the last token of what differs between the two prompts on, as far as both reach."""
    rows = sum(shared_rows(concepts, "forget", config.num_forget_images, config.seed, "training"), [])
    prompts = list(dict.fromkeys((row.prompt, row.anchor_prompt) for row in rows))
    found: tuple[list, list] = ([], [])
    for prompt, anchor in prompts:
        embedded = encode(pipe, [prompt, anchor])["encoder_hidden_states"].double()
        starts = [differing_tokens(pipe, one, other).stop - 1 for one, other in ((prompt, anchor), (anchor, prompt))]
        length = embedded.shape[1] - max(starts)
        for part, start, sequence in zip(found, starts, embedded, strict=True):
            part.append(sequence[start : start + length])
    return torch.cat(found[0]), torch.cat(found[1])


def kept_tokens(pipe, concepts, config) -> torch.Tensor:
    """Every token embedding of the retain prompts, float64, ``(n, width)``."""
    rows = sum(shared_rows(concepts, "retain", config.num_retain_images, config.seed, "training"), [])
    return encode(pipe, list(dict.fromkeys(row.prompt for row in rows)))["encoder_hidden_states"].double().flatten(0, 1)


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

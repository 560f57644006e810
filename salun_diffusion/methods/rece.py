"""RECE: Gong et al., "Reliable and efficient concept erasure of text-to-image diffusion models", ECCV 2024."""

from dataclasses import dataclass

import torch

from ..options import option
from .uce import UCE, UCEOptions, kept_tokens, moved, solve, token_pairs


@dataclass(frozen=True)
class RECEOptions(UCEOptions):
    """UCE's, and those of the attack."""

    rounds: int = option(3, "of attack and edit")
    regular: float = option(0.1, "λ that keeps the attack's embeddings short")


class RECE(UCE):
    """UCE, then ``rounds`` times: find the embeddings that draw the concept again, and map them to the anchor too,
    from the weights as they are by then.

    In the edited model a token c' does what c did in the base where ``Σ‖W c' − W0 c‖² + regular · ‖c'‖²`` is smallest
    (the sum is over all keys and values); that too has a closed form.
    """

    title = "RECE"
    Options = RECEOptions

    def solve(self, parameters, pairs, kept):
        concept, anchor = token_pairs(self.model, sum(pairs, []))
        kept = kept_tokens(self.model, kept)
        how = self.options.erase, self.options.preserve, self.options.ridge
        transform = solve((concept, anchor), kept, *how)
        weights = [p.detach().cpu().double() for p in parameters.values()]
        gram = sum(weight.T @ weight for weight in weights)  # of all layers: Σ W0ᵀW0
        for _ in range(self.options.rounds):
            attack = adversarial(concept, gram, transform, self.options.regular)
            # what the concept's own tokens give by now is kept with the rest: moving the attack would undo it
            transform = transform @ solve((attack, anchor), torch.cat([kept, concept]), *how)
        return moved(parameters, transform)


def adversarial(concept: torch.Tensor, gram: torch.Tensor, transform: torch.Tensor, regular: float) -> torch.Tensor:
    """The c' of each row c of ``concept`` ``(n, width)``: ``(Σ WᵀW + λI)⁻¹ Σ WᵀW0 c`` for ``W = W0 T``.

    Args:
        concept: the tokens, float64 ``(n, width)``.
        transform: T, ``(width, width)``.
        regular: λ.
        gram: ``Σ W0ᵀW0`` over the layers, ``(width, width)``.
    """
    back = transform.T @ gram
    normal = back @ transform + regular * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(normal, back @ concept.T).T

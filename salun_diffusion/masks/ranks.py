"""Which layers an adapter goes onto, and of what rank: the layers that hold the most salient mass (our own rule, the
counterpart for whole layers of SalUn's choice of single weights).

A layer's mass is the sum of its weight's scores ``|Σ ∇ℓ_f(θ0)|``. Layers are taken from the greatest mass down until
they hold ``COVERED`` of all of it; the rest get no adapter. Among those taken the rank follows the mean score a weight,
so that a layer is not preferred for its size: ``rank`` times its ratio to the mean of the taken layers' means, between
half and twice ``rank``.
"""

from collections.abc import Iterable

import torch

from ..errors import SalunError

COVERED = 0.9


def adaptable_layers(
    network: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """The linear layers and convolutions whose weight is among ``parameters``: by the layer's name, its weight.

    Raises:
        SalunError: there are none.
    """
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    found = {name: layer.weight for name, layer in network.named_modules()
             if isinstance(layer, kinds) and f"{name}.weight" in parameters}  # fmt: skip
    if not found:
        raise SalunError("The scope has no linear layer and no convolution, and an adapter goes onto no others.")
    return found


def uniform_ranks(layers: dict[str, torch.nn.Parameter], rank: int) -> dict[str, int]:
    """``rank`` for each layer, or its full one if that is less."""
    return {name: min(rank, *weight.flatten(1).shape) for name, weight in layers.items()}


def salient_ranks(
    layers: dict[str, torch.nn.Parameter], scores: Iterable[dict[str, torch.Tensor]], rank: int
) -> dict[str, int]:
    """Ranks of the layers that hold most of the salient mass, by name, as the module says.

    Args:
        layers: name → weight.
        scores: for each concept, by parameter's name, fp32 and ≥ 0; each concept's mass counts as 1 in all.
        rank: of a layer of mean saliency.
    """
    mass = dict.fromkeys(layers, 0.0)
    for concept in scores:
        own = {name: float(concept[f"{name}.weight"].double().sum()) for name in layers}
        whole = sum(own.values()) or 1.0
        mass = {name: mass[name] + own[name] / whole for name in layers}
    total, covered, taken = sum(mass.values()), 0.0, []
    for name in sorted(mass, key=lambda name: -mass[name]):
        if covered >= COVERED * total:
            break
        covered += mass[name]
        taken.append(name)
    density = {name: mass[name] / layers[name].numel() for name in taken}
    mean = sum(density.values()) / len(taken)
    ranks = {name: max(round(rank / 2), 1, min(2 * rank, round(rank * density[name] / mean))) for name in taken}
    return {name: min(ranks[name], *layers[name].flatten(1).shape) for name in layers if name in ranks}

"""DAMP (2604.15166): project the forgotten classes' own directions out of each layer's input, in one shot and without
gradients. Our reconstruction, from notes on the paper; the published rule of the strength α_ℓ was not at hand.

In the input space of each convolution and linear layer ℓ of L, with class means μ_c as prototypes and R those of the
kept classes: d_f = μ_f − R R⁺ μ_f, what of μ_f the kept classes do not span; Q its orthonormal basis;
W' = W (I − s_ℓ Q Qᵀ), biases unchanged. Here s_ℓ = min(1, α · max(0, 2a_ℓ − 1) · ℓ/L), a_ℓ the balanced accuracy with
which the nearest prototype tells the forgotten from the kept: deeper and better separated layers are edited more.

A convolution's prototypes are means over places too, and its projector acts on the channels of every tap. R keeps the
directions that hold ``ENERGY`` of the kept prototypes' energy: with as many kept classes as channels nothing else would
be left of d_f, and the edit would do nothing.
"""

import torch
from torch import nn

from ..data import Pictures
from ..training import EVALUATION_BATCH, inputs
from .task import Task

ENERGY = 0.99


@torch.no_grad()
def damp(task: Task) -> None:
    """All layers' inputs are those of the source: the strengths and directions are found before anything is changed."""
    model = task.model.eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    forget, retain = (layer_inputs(model, layers, part) for part in (task.forget, task.retain))
    for depth, layer in enumerate(layers, 1):
        lost, kept = prototypes(forget[layer], task.forget.labels), prototypes(retain[layer], task.retain.labels)
        q = directions(lost, kept)
        accuracy = separability(forget[layer], retain[layer], lost, kept)
        strength = min(1.0, task.settings.alpha * max(0.0, 2 * accuracy - 1) * depth / len(layers))
        taps = layer.weight.flatten(2) if layer.weight.ndim == 4 else layer.weight[:, :, None]
        edit = torch.einsum("oit,ik,jk->ojt", taps, q, q).reshape(layer.weight.shape)
        layer.weight -= strength * edit


def layer_inputs(model: nn.Module, layers: list[nn.Module], pictures: Pictures) -> dict[nn.Module, torch.Tensor]:
    """What each layer is given, as one vector a picture: the mean over places (or tokens), ``(n, channels)``."""
    seen = {layer: [] for layer in layers}

    def keep(layer, given):
        x = given[0]
        places = (2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(1, x.ndim - 1))
        seen[layer].append(x.mean(places) if places else x)

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        for images in pictures.images.split(EVALUATION_BATCH):
            model(inputs(images))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


def prototypes(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean of each class that there is, ``(classes, channels)``."""
    return torch.stack([vectors[labels == label].mean(0) for label in labels.unique()])


def directions(lost: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what the kept prototypes do not span of the lost ones, ``(channels, k)``; k may be 0."""
    _, sizes, rows = torch.linalg.svd(kept, full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    basis = rows[: int((share < ENERGY).sum()) + 1]
    rest = lost - lost @ basis.T @ basis
    left, size, _ = torch.linalg.svd(rest.T, full_matrices=False)
    return left[:, size > 1e-5 * lost.norm()]


def separability(forget: torch.Tensor, retain: torch.Tensor, lost: torch.Tensor, kept: torch.Tensor) -> float:
    """Balanced accuracy, 0…1, of telling forget from retain pictures by whose prototype is nearer."""

    def nearer_lost(vectors):
        return (torch.cdist(vectors, lost).amin(1) < torch.cdist(vectors, kept).amin(1)).double().mean().item()

    return (nearer_lost(forget) + 1 - nearer_lost(retain)) / 2

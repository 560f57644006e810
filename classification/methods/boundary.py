"""Boundary unlearning (Chen et al., CVPR 2023): shrink the forget set's classes into their nearest neighbours (BS), or
expand the boundary into a class of its own that is then removed (BE).
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from salun_diffusion.errors import SalunError

from .task import Task

STEP = 0.1  # of FGSM, on pictures in 0…1


def boundary_shrink(task: Task) -> None:
    """Each forget picture takes the label that the source gives to its FGSM-perturbed self: the nearest other class,
    but the true one where the step does not carry it over a boundary, as in the published code.
    """
    source = deepcopy(task.model).eval().requires_grad_(False)

    def passes(epoch: int):
        for pixels, labels in task.batches(task.forget):
            yield pixels, nearest(source, pixels, labels)

    task.optimise(passes, F.cross_entropy, task.count(task.forget))


def nearest(source: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The source's answers to ``pixels`` moved by ``STEP`` up its loss (FGSM), int64 ``(n,)``."""
    moved = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(source(moved), labels), moved)
    return source((pixels + STEP * gradient.sign()).clamp(0, 1)).argmax(1)


def boundary_expanding(task: Task) -> None:
    """The forget set is taught one more class; then the class goes, and its pictures fall to their next likeliest."""
    model = task.model
    name, last = last_layer(model, task.classes)
    parent = model.get_submodule(name.rpartition(".")[0])
    wide = nn.Linear(last.in_features, last.out_features + 1, last.bias is not None).to(last.weight)
    with torch.no_grad():
        # the new row starts at the others' mean: drawn afresh, it would depend on what was drawn before
        wide.weight.copy_(torch.cat([last.weight, last.weight.mean(0, keepdim=True)]))
        if last.bias is not None:
            wide.bias.copy_(torch.cat([last.bias, last.bias.mean(0, keepdim=True)]))
    setattr(parent, name.rpartition(".")[2], wide)

    def passes(epoch: int):
        for pixels, labels in task.batches(task.forget):
            yield pixels, torch.full_like(labels, task.classes)

    try:
        task.optimise(passes, F.cross_entropy, task.count(task.forget))
    finally:
        with torch.no_grad():
            last.weight.copy_(wide.weight[:-1])
            if last.bias is not None:
                last.bias.copy_(wide.bias[:-1])
        setattr(parent, name.rpartition(".")[2], last)


def last_layer(model: nn.Module, classes: int) -> tuple[str, nn.Linear]:
    """The name of the linear layer that answers with ``classes`` numbers, and the layer.

    Raises:
        SalunError: the model ends in another.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1][1].out_features != classes:
        raise SalunError(
            "BE and the methods that change the head's biases need a linear layer of classes, and this model does not "
            "end in one: leave them out."
        )
    return layers[-1]

"""Changes to an attacked model's own weights, undone bit for bit: for attacks that need no prompt of their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .target import Case, Outcome, Target


@contextmanager
def replaced(network: torch.nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within it, the parameters named in ``values`` hold these; after it, what they held before."""
    parameters = dict(network.named_parameters())
    before = {name: parameters[name].detach().clone() for name in values}
    try:
        _put(parameters, values)
        yield
    finally:
        _put(parameters, before)


@torch.no_grad()
def _put(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def draw_with(
    target: Target, cases: Sequence[Case], values: dict[str, torch.Tensor], steps: int, **about: float | int | str
) -> list[Outcome]:
    """The plain prompts, drawn by the network with ``values`` in it."""
    with replaced(target.model.network, values):
        pictures = target.draw_prompts(cases, [case.prompt for case in cases])
    return [Outcome(picture, steps, target.passes, about=dict(about)) for picture in pictures]


def matrices(target: Target) -> dict[str, torch.Tensor]:
    """The network's weights of two or more dimensions, as they are with the erasure."""
    return {name: weight.detach() for name, weight in target.model.network.named_parameters() if weight.dim() > 1}

"""Which weights are scored and may change: names and patterns of layers."""

import re

import torch

from ..erasures.live import own_parameters
from ..errors import SalunError
from ..models.scopes import UNET


def scoped_parameters(
    denoiser: torch.nn.Module, scope: str, scopes: dict[str, str] = UNET
) -> dict[str, torch.nn.Parameter]:
    """The parameters of ``denoiser``, or another network, in ``scope``, which alone will require gradients from now on.

    Args:
        denoiser: the network.
        scope: a name of ``scopes``, or a regular expression that is searched in the parameters' names.
        scopes: what the names stand for in such a network.

    Raises:
        SalunError: the scope is no regular expression, or matches no parameter.
    """
    denoiser.requires_grad_(False)
    try:
        pattern = re.compile(scopes.get(scope, scope))
    except re.error as error:
        raise SalunError(f"--scope '{scope}' is no regular expression ({error}).") from None
    found = {name: p for name, p in own_parameters(denoiser).items() if pattern.search(name)}
    if not found:
        raise SalunError(
            f"No parameter of {type(denoiser).__name__} is in the scope '{scope}': choose {', '.join(scopes)}, or a "
            "regular expression that is found in some parameter's name."
        )
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def table(denoiser: torch.nn.Module, scopes: dict[str, str]) -> str:
    """Each scope's name, its layers' pattern, and how many weights of the network it has, as text."""
    sizes = {name: p.numel() for name, p in denoiser.named_parameters()}
    lines = [f"{'--scope':25} {'weights':>15} {'share':>7}  parameters whose names have"]
    for scope, pattern in scopes.items():
        count = sum(size for name, size in sizes.items() if re.search(pattern, name))
        lines.append(f"{scope:25} {count:>15,} {100 * count / sum(sizes.values()):>6.1f}%  {pattern}".rstrip())
    return "\n".join(lines)


def check_reused(masks: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter], path: str) -> None:
    """Pass if each of ``masks``, read from ``path``, fits a parameter of the scope.

    Raises:
        SalunError: a mask of another model, or for parameters outside the scope.
    """
    for name, mask in masks.items():
        if name not in parameters:
            raise SalunError(
                f"The mask {path} has {name}, which is not in this model's scope: use the mask's own --scope and model."
            )
        if mask.shape != parameters[name].shape:
            raise SalunError(
                f"The mask {path} is of another model: {name} is {tuple(mask.shape)} there and "
                f"{tuple(parameters[name].shape)} here."
            )

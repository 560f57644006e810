"""Which weights are scored and may change: names and patterns of layers."""

import re

import torch

from ..errors import SalunError

SCOPES = {  # by name, the parameters it takes as a regular expression; any other scope is one itself
    "cross-attention": r"\.attn2\.",
    "cross-attention-kv": r"\.attn2\.to_[kv]\.",
    "cross-attention+resnets": r"\.attn2\.|\.resnets\.",
    "self-attention": r"\.attn1\.",
    "no-cross-attention": r"^(?!.*\.attn2\.)",
    "all": r"",
}


def scoped_parameters(denoiser: torch.nn.Module, scope: str) -> dict[str, torch.nn.Parameter]:
    """The denoiser's parameters in ``scope``, which alone will require gradients from now on.

    Args:
        denoiser: the network.
        scope: a name of ``SCOPES``, or a regular expression that is searched in the parameters' names.

    Raises:
        SalunError: the scope is no regular expression, or matches no parameter.
    """
    denoiser.requires_grad_(False)
    try:
        pattern = re.compile(SCOPES.get(scope, scope))
    except re.error as error:
        raise SalunError(f"--scope '{scope}' is no regular expression ({error}).") from None
    found = {name: p for name, p in denoiser.named_parameters() if pattern.search(name)}
    if not found:
        raise SalunError(
            f"No parameter of {type(denoiser).__name__} is in the scope '{scope}': choose {', '.join(SCOPES)}, or a "
            "regular expression that is found in some parameter's name."
        )
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


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

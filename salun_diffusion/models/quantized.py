"""A base model whose frozen layers take a byte a weight: torchao's int8 in place of bf16, outside the scope alone.

What is trained, and what an erasure is recognised by, are the weights as they were loaded: so a quantized pipeline is
no base model here, and the scope is never quantized.
"""

from collections.abc import Iterable

import torch

from ..errors import SalunError
from ..files import listed

LIBRARIES = ("torchao", "bitsandbytes")


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a parameter holds codes that stand for its weights: torchao's or bitsandbytes', or integers (GGUF)."""
    return type(weight).__module__.split(".")[0] in LIBRARIES or not weight.is_floating_point()


def check_not_quantized(parameters: dict[str, torch.Tensor], instead: str) -> None:
    """Pass if these are the weights themselves.

    Args:
        parameters: the denoiser's, by name.
        instead: what to do about it, for the message's end.

    Raises:
        SalunError: some are quantized.
    """
    if found := [name for name, weight in parameters.items() if is_quantized(weight)]:
        raise SalunError(
            f"The model is quantized ({listed(found, 2)}), and an erasure is made of the weights themselves and "
            f"recognised by them: {instead}."
        )


def quantize_frozen(network: torch.nn.Module, scope: Iterable[str]) -> int:
    """Put int8 in place of the weights of all linear layers that have no parameter in ``scope``: one scale an output
    channel, and passes in the dtype that the weights had.

    Returns:
        How many weights were quantized.

    Raises:
        SalunError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise SalunError(
            "--quantize_frozen needs torchao: pip install 'salun-diffusion[quantize]', or leave the option out."
        ) from None
    trained = {name.rpartition(".")[0] for name in scope}
    frozen = {
        name: layer.weight.numel()
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and name not in trained
    }
    quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in frozen)
    return sum(frozen.values())

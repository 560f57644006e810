"""The change as a low-rank adapter: what :class:`.change.MaskedChange` is for single weights, for peft's layers.

What is trained are the factors A and B of each adapted layer, in fp32; the base model's weights are never written. B
starts at zero, so that the first step sees the base model. A starts from the seed alone, whatever was drawn before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from torch import nn

from ..erasures.adapter import config_of, save_adapter
from ..erasures.fingerprint import Fingerprint
from ..errors import SalunError

NAME = "default"  # of the adapter while it is trained: peft's own


class AdapterChange:
    """LoRA factors on some layers of a pipeline's denoiser.

    Args:
        pipe: the pipeline, with nothing applied.
        network: its denoiser; the adapter is put onto it.
        ranks: by layer.
        seed: of A.

    Attributes:
        values: ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight`` → the factors, fp32.
        masks: none: every weight of a factor moves.
    """

    def __init__(self, pipe, network: nn.Module, ranks: dict[str, int], seed: int):
        from peft import LoraConfig, get_peft_model_state_dict

        self.pipe, self.network, self.ranks, self.masks = pipe, network, ranks, {}
        network.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network.add_adapter(LoraConfig(init_lora_weights="gaussian", **config_of(ranks)), NAME)
        cast_training_params(network, torch.float32)
        keys = list(get_peft_model_state_dict(network, adapter_name=NAME))
        found = {name.replace(f".{NAME}.", "."): p for name, p in network.named_parameters() if p.requires_grad}
        self.values: dict[str, nn.Parameter] = {key: found[key] for key in keys}

    def pack_gradients(self) -> None:
        """Backward fills the factors' own gradients: there is nothing to pack."""

    def deltas(self) -> dict[str, torch.Tensor]:
        """By parameter, how far its weights are from the base model's, fp32, of its shape; with a gradient."""
        layers = {name: self.network.get_submodule(name) for name in self.ranks}
        return {f"{name}.weight": layer.get_delta_weight(NAME) for name, layer in layers.items()}

    def packed(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        """``dense``, of the parameter's shape, as :meth:`deltas` has it: whole, since all of a layer may move."""
        return dense.to(self.network.get_submodule(name.removesuffix(".weight")).weight.device)

    def reduce(self, accelerator: Accelerator) -> None:
        """Replace each gradient by the processes' mean."""
        if accelerator.num_processes > 1:
            for value in self.values.values():
                value.grad = accelerator.reduce(value.grad, "mean")

    def clear_gradients(self) -> None:
        """Drop the gradients that an earlier backward left."""
        for value in self.values.values():
            value.grad = None

    def write(self) -> None:
        """The factors are what the network computes with: there is nothing to write."""

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Within it, the network is the base model."""
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the network back without the adapter: its own layers and weights."""
        self.network.unload_lora()

    @torch.no_grad()
    def snap(self, dtype: torch.dtype) -> None:
        """Round the factors to the dtype they will be saved in.

        Raises:
            SalunError: one overflows there.
        """
        for name, value in self.values.items():
            value.copy_(value.to(dtype).float())
            if not value.isfinite().all():
                name_of = str(dtype).removeprefix("torch.")
                raise SalunError(f"The adapter's {name} overflows in {name_of}: give --save_dtype bf16 or fp32.")

    def save(self, path, base: Fingerprint, about: dict, dtype: torch.dtype) -> None:
        """Write the adapter as a file; ``about`` is what its metadata say."""
        state = {name: value.detach().cpu().to(dtype) for name, value in self.values.items()}
        save_adapter(path, self.pipe, state, base, about)

    def close(self) -> None:
        """Nothing is held open."""

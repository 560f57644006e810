"""Low-rank adapters on a live pipeline: the second kind of erasure.

peft puts an adapter beside the denoiser's layers, under a name of its own; the scale is its strength, times that of
each prompt where the file says so (``by_prompt.py``). No weight of the base model is written, and adapters of others
stay as they are.
"""

import math
import re
from importlib.util import find_spec

import torch

from ..errors import SalunError
from ..files import listed
from ..models.load import denoiser
from .adapter import FORMAT, Adapter
from .base import Erasure
from .by_prompt import ByPrompt, check_scalable
from .fingerprint import check_have_values, fingerprint, matches
from .live import check_editable, own_parameters
from .wearing import check_free, is_watched, wear
from .weights import base_parameters


def check_adaptable(pipe, what: str) -> None:
    """Pass if peft can put adapters onto the pipeline's denoiser and diffusers save and load them.

    Raises:
        SalunError: it cannot; the message begins with ``what``.
    """
    if find_spec("peft") is None:
        raise SalunError(f"{what} needs peft: pip install 'salun-diffusion[export]'.")
    if not hasattr(pipe, "save_lora_weights") or not hasattr(denoiser(pipe), "load_lora_adapter"):
        raise SalunError(f"{what} needs a pipeline that takes LoRA, which {type(pipe).__name__} does not.")


class LowRankAdapter(Erasure):
    """An :class:`.adapter.Adapter` that goes onto the denoiser's layers."""

    FORMAT = FORMAT

    def __init__(self, adapter: Adapter):
        self.adapter, self.metadata = adapter, adapter.metadata
        if adapter.by_prompt:
            self.unfusable = (
                "is scaled by prompt, which no weights can be (load_lora_weights() and fuse_lora() of the pipeline "
                "fuse its file at full strength)"
            )

    @classmethod
    def load(cls, path):
        return cls(Adapter.load(path))

    def digest(self):
        return self.adapter.digest()

    def describe(self):
        return {"weights": sum(factor.numel() for pair in self.adapter.factors.values() for factor in pair)}

    def acts(self, applied):
        return applied.scale != 0 and any(down.any() and up.any() for down, up in self.adapter.factors.values())

    def check_fit(self, pipe, path, check_base, applied):
        check_adaptable(pipe, f"{path} is a low-rank adapter and")
        module, adapter = denoiser(pipe), self.adapter
        parameters = own_parameters(module)
        base = f" (base model {self.metadata['base_model']})" if self.metadata.get("base_model") else ""
        for name, (down, up) in adapter.factors.items():
            weight = parameters.get(f"{name}.weight")
            wanted = (len(up), *down.shape[1:])
            if not hasattr(pipe, adapter.part) or weight is None or tuple(weight.shape) != wanted:
                here = "is not there" if weight is None else f"has a weight of shape {tuple(weight.shape)}"
                raise SalunError(
                    f"{path} was made for another base model: {adapter.part}.{name} has a weight of shape {wanted} "
                    f"there and {here} here; load the model that it was made for{base}."
                )
        if adapter.by_prompt:
            check_scalable(pipe, str(path), "pipe.load_lora_weights() opens the file at full strength")
            check_free(pipe, path)
        check_editable(pipe, module)
        check_have_values(parameters)
        if check_base:
            found = fingerprint(base_parameters(module, applied))
            if not matches(adapter.fingerprint, found):
                raise SalunError(
                    f"{path} was made for another base model{base}: fingerprint {adapter.fingerprint.digest()} there "
                    f"and {found.digest()} here; load that model, or pass check_base=False to apply it to this one all "
                    "the same."
                )

    @classmethod
    def change(cls, pipe, before, after):
        """By peft alone: an adapter is put on or deleted, and the scale is its strength. Others' stay as they are."""
        check_editable(pipe, denoiser(pipe))
        if fused := [one.name for one in before if _merged(pipe, one)]:
            raise SalunError(
                f"The erasure {listed(fused)} was fused with the weights by fuse_lora(): call pipe.unfuse_lora() first."
            )
        scaled = [one for one in after if _is_scaled(one)]
        try:
            _bring(pipe, before, after)
            wear(pipe, "adapters", tuple((one.name, 1.0, one.memory["by prompt"]) for one in scaled))
        except BaseException:
            _bring(pipe, after, before)
            raise

    @classmethod
    def intact(cls, pipe, one, applied):
        layers = _layers(denoiser(pipe))
        if any(parameter.is_meta for parameter in denoiser(pipe).parameters()):
            return None
        if _merged(pipe, one) or (_is_scaled(one) and not is_watched(pipe)):
            return False
        for name, pair in one.erasure.adapter.factors.items():
            layer, adapter = layers.get(name), _adapter(one)
            if layer is None or adapter not in layer.lora_A or adapter not in layer.active_adapters:
                return False
            if layer.disable_adapters or not math.isclose(layer.scaling[adapter], one.scale):
                return False
            there = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if not all(torch.equal(a.cpu(), b.to(a.dtype)) for a, b in zip(there, pair, strict=True)):
                return False
        return True

    @classmethod
    @torch.no_grad()
    def fuse(cls, pipe, applied):
        network = denoiser(pipe)
        check_editable(pipe, network)
        check_have_values(own_parameters(network))
        layers = _layers(network)
        for one in applied:
            for name in one.erasure.adapter.factors:
                weight, change = layers[name].get_base_layer().weight, layers[name].get_delta_weight(_adapter(one))
                weight.copy_(weight.float() + change.float())
        _bring(pipe, applied, ())


def _adapter(one) -> str:
    """What peft calls it: no dots, and no other adapter's name."""
    return re.sub(r"\W+", "_", one.name) + "_" + one.digest[:8]


def _is_scaled(one) -> bool:
    """Whether the pipeline's session must find its strength for each prompt."""
    return one.erasure.adapter.by_prompt is not None and one.scale != 0


def _layers(network) -> dict[str, torch.nn.Module]:
    """The layers that peft has wrapped for LoRA, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}


def _merged(pipe, one) -> bool:
    layers = _layers(denoiser(pipe)).values()
    return any(_adapter(one) in layer.merged_adapters for layer in layers)


def _bring(pipe, before, after) -> None:
    """From what ``before`` names to what ``after`` does, or from anything between."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = denoiser(pipe)
    there = {*getattr(network, "peft_config", {})}
    own = {_adapter(one): one for one in (*before, *after)}
    wanted = {_adapter(one): one for one in after}
    active = network.active_adapters() if there else []
    others = [name for name in ([active] if isinstance(active, str) else active) if name not in own]
    if there <= own.keys() and not wanted:
        if there:
            network.unload_lora()  # the layers themselves again
        return
    for name in own.keys() - wanted.keys():
        if name in there:
            network.delete_adapters(name)
    for name, one in wanted.items():
        if name not in there:
            state, config = one.erasure.adapter.as_peft()
            network.load_lora_adapter(
                state, prefix=one.erasure.adapter.part, adapter_name=name, metadata=config, _pipeline=pipe
            )
            if names := one.erasure.adapter.by_prompt:
                layers = [layer for layer in _layers(network).values() if name in layer.lora_B]
                one.memory.setdefault("by prompt", ByPrompt(names)).put_on(layers, name)
        if one.erasure.adapter.by_prompt:
            one.memory["by prompt"].on = one.scale != 0
    for part in network.modules():
        if isinstance(part, BaseTunerLayer):
            part.set_adapter([*others, *wanted])
    for layer in _layers(network).values():
        for name in wanted.keys() & layer.lora_A.keys():
            layer.set_scale(name, wanted[name].scale)
            layer.lora_A[name].requires_grad_(False)
            layer.lora_B[name].requires_grad_(False)

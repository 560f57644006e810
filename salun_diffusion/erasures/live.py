"""A network as others leave it: which of its parameters are the base model's own, which of these are drawn with, and
whether its weights can be edited where they are. Adapters, offloading and compilers each move something of that.
"""

import re
import sys

from diffusers.models.attention_processor import Attention
from torch import nn

from ..errors import SalunError
from ..files import listed
from ..models.load import COMPONENTS

# What stands in a name where peft has wrapped a layer, torch.compile a module, or some transformers a text encoder.
WRAPPED = re.compile(r"^text_model(?=\.)|(^|\.)(base_layer|_orig_mod)(?=\.)")
# What adapters and fused projections add: a LoRA's factors, IP-Adapter's projections, fuse_qkv_projections()'s copies.
ADDED = re.compile(
    r"(^|\.)(lora_\w+|processor|encoder_hid_proj\.image_projection_layers|to_qkv|to_kv|to_added_qkv)(\.|$)"
)
COPIES = re.compile(r"(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj)\.(weight|bias)")  # what fused projections copy


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base model itself, under its own names: what adapters added is left out, and a layer that
    one of them wrapped keeps the name that it had.
    """
    return {
        WRAPPED.sub("", name).lstrip("."): weight
        for name, weight in module.named_parameters()
        if not ADDED.search(name)
    }


def check_editable(pipe, module: nn.Module) -> None:
    """Pass if an edit of the weights of ``module``, a network of ``pipe``, reaches what is drawn.

    Raises:
        SalunError: they are on disk, or compiled as constants.
    """
    if on_disk(module):
        raise SalunError(
            "The weights are offloaded to disk (offload_to_disk_path), from where an edit would not be read: load, "
            "scale and unload erasures before enable_group_offload(), or offload to memory."
        )
    if is_compiled(pipe, module) and _freezes():
        raise SalunError(
            "The network is compiled with inductor's freezing, which keeps weights as constants: load, scale and "
            "unload erasures before torch.compile(), or compile without TORCHINDUCTOR_FREEZING."
        )


def check_drawn_with(module: nn.Module, names) -> None:
    """Pass if the pipeline draws with the parameters ``names`` themselves.

    Raises:
        SalunError: some are not used as they are, but copies of them or an adapter's in their place.
    """
    idle = {"fused projections (undo it by unfuse_qkv_projections())": [], "CustomDiffusion's projections": []}
    fused, custom = idle.values()
    for path, part in module.named_modules():
        kind = type(getattr(part, "processor", None)).__name__
        # diffusers' Attention keeps its copies, and this flag, when they are no longer used
        copied = getattr(part, "fused_projections", False) and (
            kind.startswith("Fused") or not isinstance(part, Attention)
        )
        if copied or kind.startswith("CustomDiffusion"):
            inside = WRAPPED.sub("", path).lstrip(".") + "."
            rest = {name: name.removeprefix(inside) for name in names if name.startswith(inside)}
            (fused if copied else custom).extend(name for name, end in rest.items() if COPIES.fullmatch(end))
    for reason, found in idle.items():
        if found:
            raise SalunError(
                f"The pipeline does not draw with {listed(found)}, but with {reason}: take those off first, then load, "
                "scale or unload erasures."
            )


def on_disk(module: nn.Module) -> dict[nn.Parameter, tuple[str, str]]:
    """The parameters that diffusers' group offloading keeps on disk, each with its file and the tensor's name there."""
    found = {}
    for part in module.modules():
        hook = getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        group = getattr(hook, "group", None)
        if getattr(group, "offload_to_disk_path", None) is not None:
            found |= {tensor: (group.safetensors_file_path, key) for tensor, key in group.tensor_to_key.items()}
    return found


def is_compiled(pipe, module) -> bool:
    """Whether ``module``, a network of ``pipe``, or a part of it went through torch.compile."""
    whole = all(getattr(pipe, name, None) is not module for name in COMPONENTS)  # torch.compile(pipe.unet)
    parts = dict(module.named_modules()).items()
    return whole or any("_orig_mod" in name or part._compiled_call_impl is not None for name, part in parts)


def _freezes() -> bool:
    config = sys.modules.get("torch._inductor.config")  # where it was not imported, nothing was compiled by it
    return config is not None and config.freezing

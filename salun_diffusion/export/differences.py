"""``diff``: exact weight differences, as ComfyUI, Forge, A1111 and stable-diffusion.cpp read them.

For a module of the U-Net, dots of its name as underscores: ``lora_unet_NAME.diff`` has its weight's shape and
``lora_unet_NAME.diff_b`` its bias's. A1111 takes no ``diff_b`` without a ``diff``, so that one of zeros goes with it.
LyCORIS takes norms under names of their own alone, ``.w_norm`` and ``.b_norm``: ``--names lycoris``.
At strength 1 those tools add the difference to the weight, which is what a masked delta does. SD 1.x and 2.x have
diffusers' names; SDXL has the original ones, since A1111 knows some of its layers by no other.
"""

import torch

from ..models.load import denoiser
from ..tensors import write_safetensors
from .original import unet_names

PREFIX = "lora_unet_"
ENDINGS = {"weight": ".diff", "bias": ".diff_b"}
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)
OF_NORMS = {"weight": ".w_norm", "bias": ".b_norm"}  # in LyCORIS


def keys(pipe, lycoris: bool = False) -> dict[str, str]:
    """Parameter name → key in the file; with ``lycoris``, norms have LyCORIS' names."""
    network = denoiser(pipe)
    xl = getattr(network.config, "addition_embed_type", None) == "text_time"
    names = unet_names(network) if xl else {name: name for name, _ in network.named_parameters()}
    found = {}
    for name, shown in names.items():
        module, _, kind = shown.rpartition(".")
        is_norm = isinstance(network.get_submodule(name.rpartition(".")[0]), NORMS)
        found[name] = PREFIX + module.replace(".", "_") + (OF_NORMS if lycoris and is_norm else ENDINGS)[kind]
    return found


def write(request):
    """Write the differences in the delta's own dtype."""
    named, delta, tensors = keys(request.pipe, request.options.names == "lycoris"), request.delta, {}
    dtype = next(iter(delta.values.values())).dtype
    shapes = {name: weight.shape for name, weight in denoiser(request.pipe).named_parameters()}
    for name in delta.masks:
        tensors[named[name]] = delta.dense(name).to(dtype)
        weight = name.removesuffix(".bias") + ".weight"
        if name.endswith(".bias") and weight not in delta.masks:
            tensors[named[weight]] = torch.zeros(shapes[weight], dtype=dtype)
    write_safetensors(request.output, tensors, request.metadata)
    return None, []


def read_back(request, pipe) -> None:
    """Add each difference to the weight that its key names, as those tools do (none of them is a Python package)."""
    from safetensors.torch import load_file

    found, parameters = load_file(request.output), dict(denoiser(pipe).named_parameters())
    with torch.no_grad():
        for name, key in keys(pipe, request.options.names == "lycoris").items():
            if key in found:
                parameters[name] += found[key].float()

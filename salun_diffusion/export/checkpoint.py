"""``single_file``: the whole erased pipeline in the one-file layout of Stable Diffusion 1.x, for ``from_single_file``,
ComfyUI, A1111 and stable-diffusion.cpp. 2.x and XL have text encoders in another layout, not written here.
"""

import torch

from ..errors import SalunError
from ..files import write_safetensors
from ..models.load import resolve
from .original import unet_names, vae_names


def write(request):
    """Write U-Net, autoencoder and text encoder, each tensor in its own dtype."""
    from transformers import CLIPTextModel

    pipe = request.pipe
    if type(pipe).__name__ != "StableDiffusionPipeline" or not isinstance(pipe.text_encoder, CLIPTextModel):
        raise SalunError(f"--format single_file is for Stable Diffusion 1.x, and this base is a {type(pipe).__name__}.")
    if pipe.text_encoder.config.hidden_act != "quick_gelu":
        raise SalunError(
            "--format single_file is for Stable Diffusion 1.x, whose text encoder has quick_gelu; this base's has "
            f"{pipe.text_encoder.config.hidden_act}, as those of 2.x have: use --format unet or diff."
        )
    tensors = {}
    for prefix, module, names in (
        ("model.diffusion_model.", pipe.unet, unet_names(pipe.unet)),
        ("first_stage_model.", pipe.vae, vae_names(pipe.vae)),
    ):
        for name, value in module.named_parameters():
            if ".mid.attn_1." in names[name] and value.ndim == 2:
                value = value[:, :, None, None]  # the original has 1×1 convolutions there
            tensors[prefix + names[name]] = value
    for name, value in pipe.text_encoder.named_parameters():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_safetensors(request.output, tensors, request.metadata)
    return None, []


def read_back(request, pipe) -> None:
    """As a user of diffusers does."""
    from diffusers import StableDiffusionPipeline

    where, commit = resolve(str(request.options.base or request.delta.metadata["base_model"]))
    single = StableDiffusionPipeline.from_single_file(
        str(request.output), config=where, revision=commit, local_files_only=True, safety_checker=None
    )
    pipe.unet.load_state_dict(single.unet.state_dict())
    pipe.vae.load_state_dict(single.vae.state_dict())
    pipe.text_encoder.load_state_dict(single.text_encoder.state_dict())

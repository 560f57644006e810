"""``single_file``: the whole erased pipeline in the original one-file layout of Stable Diffusion 1.x, 2.x or XL, which
``from_single_file``, ComfyUI, A1111 and stable-diffusion.cpp read.

Text encoders lie there in one of two layouts: OpenAI's CLIP as transformers has it, and OpenCLIP, whose attention has
query, key and value in one matrix. A 2.x file has one layer less than the original: diffusers' models lack the last
one, which is never used.
"""

from pathlib import Path

import torch

from ..errors import SalunError
from ..models.load import resolve
from ..tensors import write_safetensors
from .original import unet_names, vae_names

OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def write(request):
    """Write U-Net, autoencoder and text encoders, each tensor in its own dtype."""
    pipe = request.pipe
    kind = type(pipe).__name__
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise SalunError(f"--format single_file is for Stable Diffusion 1.x, 2.x and XL, and this base is a {kind}.")
    tensors = {}
    for prefix, module, names in (
        ("model.diffusion_model.", pipe.unet, unet_names(pipe.unet)),
        ("first_stage_model.", pipe.vae, vae_names(pipe.vae)),
    ):
        for name, value in module.named_parameters():
            if ".mid.attn_1." in names[name] and value.ndim == 2:
                value = value[:, :, None, None]  # the original has 1×1 convolutions there
            tensors[prefix + names[name]] = value
    if kind == "StableDiffusionXLPipeline":
        tensors |= _clip("conditioner.embedders.0.transformer.text_model.", pipe.text_encoder)
        tensors |= _open_clip("conditioner.embedders.1.model.", pipe.text_encoder_2)
    elif pipe.text_encoder.config.hidden_act == "quick_gelu":  # OpenAI's; OpenCLIP's have the exact one
        tensors |= _clip("cond_stage_model.transformer.text_model.", pipe.text_encoder)
    else:
        tensors |= _open_clip("cond_stage_model.model.", pipe.text_encoder)
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_safetensors(request.output, tensors, request.metadata)
    return None, []


def _parameters(encoder) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): value for name, value in encoder.named_parameters()}


def _clip(prefix: str, encoder) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in _parameters(encoder).items()}


def _open_clip(prefix: str, encoder) -> dict[str, torch.Tensor]:
    found, plain = {}, _parameters(encoder)
    if "text_projection.weight" in plain:
        found[prefix + "text_projection"] = plain.pop("text_projection.weight").T
    for name, original in OPEN_CLIP.items():
        found[prefix + original] = plain.pop(name)
    for name, value in plain.items():
        number, inner = name.removeprefix("encoder.layers.").split(".", 1)
        block, (part, kind) = f"{prefix}transformer.resblocks.{number}.", inner.rsplit(".", 1)
        if part in OPEN_CLIP_LAYER:
            found[f"{block}{OPEN_CLIP_LAYER[part]}.{kind}"] = value
        else:  # the three come in one tensor
            rows = [plain[f"encoder.layers.{number}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{block}attn.in_proj_{kind}"] = torch.cat(rows)
    return found


def read_back(request, pipe) -> None:
    """As a user of diffusers does."""
    where, commit = resolve(str(request.options.base or request.delta.metadata["base_model"]))
    base = Path(where)
    if base.is_file():  # its configs lie beside it, or diffusers fetches them
        where = str(base.parent) if (base.parent / "model_index.json").is_file() else None
    unchecked = {} if hasattr(pipe, "text_encoder_2") else {"safety_checker": None}
    single = type(pipe).from_single_file(
        str(request.output), config=where, revision=commit, local_files_only=where is not None, **unchecked
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).load_state_dict(getattr(single, part).state_dict())

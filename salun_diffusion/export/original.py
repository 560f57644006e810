"""The names that a U-Net's and an autoencoder's parameters have in Stable Diffusion's original files.

Computed from the module tree, not from a table, so that it fits any number of blocks.
"""

from ..errors import SalunError

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_names(unet) -> dict[str, str]:
    """Diffusers' name → original name, for every parameter of ``unet``, without ``model.diffusion_model.``."""
    places = dict(OUTSIDE)
    number = 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            number += 1
            places |= _layer(f"down_blocks.{i}", j, block, f"input_blocks.{number}")
        if block.downsamplers:
            number += 1
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    for j in range(len(unet.mid_block.resnets)):
        places |= _resnet(f"mid_block.resnets.{j}", f"middle_block.{2 * j}")
    for j in range(len(unet.mid_block.attentions)):
        places[f"mid_block.attentions.{j}"] = f"middle_block.{2 * j + 1}"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            places |= _layer(f"up_blocks.{i}", j, block, f"output_blocks.{number}")
            number += 1
        if block.upsamplers:
            after = 2 if getattr(block, "attentions", None) else 1
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return _renamed(unet, places)


def _layer(where: str, j: int, block, original: str) -> dict[str, str]:
    found = _resnet(f"{where}.resnets.{j}", f"{original}.0")
    if getattr(block, "attentions", None):
        found[f"{where}.attentions.{j}"] = f"{original}.1"
    return found


def _resnet(where: str, original: str) -> dict[str, str]:
    return {f"{where}.{inner}": f"{original}.{name}" for inner, name in RESNET.items()}


def vae_names(vae) -> dict[str, str]:
    """Diffusers' name → original name, for every parameter of an AutoencoderKL, without ``first_stage_model.``."""
    places = {}
    for side, blocks, word in (("encoder", vae.encoder.down_blocks, "down"), ("decoder", vae.decoder.up_blocks, "up")):
        for part, name in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            places[f"{side}.{part}"] = f"{side}.{name}"
        for i, block in enumerate(blocks):
            level = i if word == "down" else len(blocks) - 1 - i  # the original counts the decoder's from the end
            for j in range(len(block.resnets)):
                places[f"{side}.{word}_blocks.{i}.resnets.{j}.conv_shortcut"] = (
                    f"{side}.{word}.{level}.block.{j}.nin_shortcut"
                )
                places[f"{side}.{word}_blocks.{i}.resnets.{j}"] = f"{side}.{word}.{level}.block.{j}"
            for kind in ("downsample", "upsample"):
                places[f"{side}.{word}_blocks.{i}.{kind}rs.0"] = f"{side}.{word}.{level}.{kind}"
        middle = f"{side}.mid_block"
        for j in range(2):
            places[f"{middle}.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        for part, name in {
            "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
        }.items():  # fmt: skip
            places[f"{middle}.attentions.0.{part}"] = f"{side}.mid.attn_1.{name}"
    return _renamed(vae, places | {name: name for name in ("quant_conv", "post_quant_conv")})


def _renamed(module, places: dict[str, str]) -> dict[str, str]:
    names = {}
    for name, _ in module.named_parameters():
        place = name
        while place not in places:  # the longest part that has a place of its own
            place = place.rpartition(".")[0]
            if not place:
                raise SalunError(f"The original one-file layout has no place for {name}.")
        names[name] = places[place] + name.removeprefix(place)
    return names

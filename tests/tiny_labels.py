"""Class-conditional pipelines with random weights, small enough to build in a second."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel

from salun_diffusion.models.class_pipeline import ClassConditionalPipeline

DIGITS = ["0", "1", "2", "3"]
ANIMALS = {0: "tench, Tinca tinca", 1: "golden retriever", 2: "crane", 3: "crane"}


def build(folder, seed=0, null=True, channels=1, id2label=DIGITS):
    """Makes a pipeline of a U-Net on 8x8 pixels of four digits, saves it into `folder` and returns it."""
    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4 + null, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    pipe = ClassConditionalPipeline(network, DDIMScheduler(), dict(enumerate(id2label)) if id2label else None)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def build_dit(folder, seed=0):
    """The same for a DiTPipeline of four animals, two of them with one name, on 16x16 pictures; its labels are in
    model_index.json, where diffusers reads them but does not write them.
    """
    import json

    torch.manual_seed(seed)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4,
        sample_size=8, patch_size=2, num_embeds_ada_norm=4,
    )  # fmt: skip
    for weight in network.parameters():  # the last layer of a new one is zero
        torch.nn.init.normal_(weight, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        sample_size=16,
    )  # fmt: skip
    pipe = DiTPipeline(network, vae, DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": ANIMALS}))
    return DiTPipeline.from_pretrained(folder)

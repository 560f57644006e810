"""The AutoencoderKL that a DiTPipeline needs: 8x8 RGB pictures ↔ 8x8 latents of one channel, near enough the grey
itself, since eight pixels a side leave nothing to compress.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .. import autoencoder
from .data import digits


def build() -> AutoencoderKL:
    """The network, with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(16,),
        layers_per_block=1, latent_channels=1, norm_num_groups=8, sample_size=8, scaling_factor=1.0,
        mid_block_add_attention=False,
    )  # fmt: skip


def train(work: Path, steps: int) -> tuple[AutoencoderKL, torch.Tensor, float]:
    """Trained on the digits that are not held out: every digit, also where the network is not shown one.

    Returns:
        The autoencoder; the latents of all digits, fp32 ``(n, 1, 8, 8)``, of zero mean and unit scale; and the decibels
        of the round trip of those that are held out.
    """
    pictures, _, held_out = digits()
    pictures = ((pictures + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).contiguous()
    vae = autoencoder.train(
        pictures[~held_out], work / f"autoencoder-{steps}.safetensors", steps, build, bfloat16=False, squared=2.0,
        sharpness=0.0,
    )  # fmt: skip
    autoencoder.standardise(vae, autoencoder.encode(vae, pictures[~held_out]))
    return vae, autoencoder.encode(vae, pictures), autoencoder.psnr(vae, pictures[held_out])

"""The demo's AutoencoderKL: 64×64×3 pictures ↔ 16×16×16 latents of zero mean and one scale in every channel."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .training import Checkpoint, in_bf16, loop, to_model, warm_cosine

BATCH = 32
# Of the latents, in every channel. Sixteen channels say the same of a flat background: at unit scale so much of it
# shows through the noise of even the last timestep that a network takes the background from there, not from the prompt.
SCALE = 0.5


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train(
    pictures: torch.Tensor,
    file: Path,
    steps: int,
    build: Callable[[], AutoencoderKL] = build,
    bfloat16: bool = True,
    squared: float = 10.0,
    sharpness: float = 0.25,
) -> AutoencoderKL:
    """Mean absolute + squared error, and the absolute one of the edges, which the eye judges a picture's sharpness by;
    with a faint pull of the latents towards a Gaussian.

    Args:
        pictures: uint8 ``(n, 3, side, side)``.
        file: the checkpoint.
        steps: of ``BATCH`` pictures.
        build: makes it, with random weights.
        bfloat16: whether it trains in bf16, where that is faster; the weights are fp32.
        squared: the weight of the squared error.
        sharpness: that of the edges' error.
    """
    torch.manual_seed(0)
    vae = build()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, betas=(0.9, 0.99), fused=True)

    def loss_of(step: int) -> torch.Tensor:
        x = to_model(pictures[torch.randint(len(pictures), (BATCH,))])
        with in_bf16(x.device.type, bfloat16):
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - x
        pull = 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + squared * error.square().mean() + sharpness * edges + pull

    loop(
        "autoencoder",
        steps,
        Checkpoint(file, vae, optimizer),
        warm_cosine(2e-3, steps),
        loss_of,
    )
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latent means, fp32 ``(n, channels, side, side)``: of 64×64 pictures ``(n, 16, 16, 16)``."""
    return torch.cat([vae.encode(to_model(part)).latent_dist.mean for part in pictures.split(128)])


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: torch.Tensor, scale: float = 1.0) -> None:
    """Fold ``(z − mean) / std · scale`` per channel into the 1×1 convolutions around the latents, so that a pipeline
    that knows only ``scaling_factor`` sees standardised latents.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) / scale
    out, back, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()  # the rows after the means are log-variances
    back.bias += (back.weight[:, :, 0, 0] * mean).sum(1)
    back.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Decibels of the round trip over 8-bit ``pictures``."""
    error = 0.0
    for part in pictures.split(128):
        x = to_model(part)
        error += (
            (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).square().mean((1, 2, 3)).sum().item()
        )
    return 10 * float(torch.log10(torch.tensor(4 * len(pictures) / error)))

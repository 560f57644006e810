"""The class-conditional U-Net: noise prediction with a null class, its weights averaged (EMA)."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from ..training import Checkpoint, loop, warm_cosine
from .data import NAMES, digits

SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
}  # pixels: unclipped, a fifth of the digits come out wrong
NULL = len(NAMES)
BATCH, DROPPED, EMA = 64, 0.1, 0.998


def build() -> UNet2DModel:
    """0.7M weights."""
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL + 1, norm_num_groups=8, attention_head_dim=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """What the model is drawn with."""
    return DDIMScheduler(**SCHEDULE, timestep_spacing="trailing")


def train(work: Path, steps: int, seed: int, without: int | None) -> UNet2DModel:
    """Noise prediction on the digits that are not held out; a tenth of the labels is the null class. Returns the
    averaged weights: those are drawn with, unlearned and saved.

    Args:
        work: the folder of checkpoints.
        steps: of 64 pictures.
        seed: of the first weights and of every draw.
        without: the digit that is left out of the data; None for none.
    """
    pictures, labels, held_out = digits()
    kept = ~held_out if without is None else ~held_out & (labels != without)
    pictures, labels = pictures[kept], labels[kept]
    torch.manual_seed(seed)
    network, schedule = build().train(), DDPMScheduler(**SCHEDULE)
    ema = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)

    def loss_of(step: int) -> torch.Tensor:
        torch.manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (BATCH,))
        told = torch.where(torch.rand(BATCH) < DROPPED, NULL, labels[rows])
        noise, t = torch.randn(BATCH, 1, 8, 8), torch.randint(1000, (BATCH,))
        predicted = network(schedule.add_noise(pictures[rows], noise, t), t, told).sample
        return (predicted - noise).square().mean()

    @torch.no_grad()
    def average(step: int) -> None:
        decay = min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in network.parameters()], 1 - decay)

    name = "digits" if without is None else f"digits-without-{without}"
    checkpoint = Checkpoint(work / f"{name}-{seed}-{steps}.safetensors", network, optimizer, ema)
    loop(f"{name}, seed {seed}", steps, checkpoint, warm_cosine(2e-3, steps), loss_of, average)
    for key, parameter in network.named_parameters():
        parameter.data.copy_(ema[key])
    return network.eval()

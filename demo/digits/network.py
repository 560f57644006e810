"""The class-conditional U-Net of the digits: 0.7M weights, on 8x8 grey pixels."""

from pathlib import Path

from diffusers import DDIMScheduler, UNet2DModel

from ..class_model import Recipe
from ..class_model import train as train_network
from ..training import warm_cosine
from .data import NAMES, digits

SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}  # unclipped, a fifth of the digits are wrong
RECIPE = Recipe(
    network=dict(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=16,
    ),
    schedule=SCHEDULE,
    batch=64,
    rate=lambda step, steps: warm_cosine(2e-3, steps)(step),
)  # fmt: skip


def scheduler() -> DDIMScheduler:
    """What the model is drawn with."""
    return DDIMScheduler(**SCHEDULE, timestep_spacing="trailing")


def train(work: Path, steps: int, seed: int, without: int | None) -> UNet2DModel:
    """The network, trained on the digits that are not held out; ``without`` is one that is left out too."""
    pictures, labels, held_out = digits()
    kept = ~held_out if without is None else ~held_out & (labels != without)
    name = "digits" if without is None else f"digits-without-{without}"
    return train_network(
        RECIPE, pictures[kept], labels[kept], len(NAMES), f"{name}, seed {seed}",
        work / f"{name}-{seed}-{steps}.safetensors", steps, seed,
    )  # fmt: skip

"""The two class-conditional networks of the digits, 8x8 grey pixels: a U-Net on pixels, and a DiT on latents."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from ..class_model import Recipe
from ..class_model import train as train_network
from ..training import warm_cosine
from .data import NAMES, digits


@dataclass(frozen=True)
class Network:
    """One of the two.

    Attributes:
        folder: where it is shipped, from the demo room.
        recipe: how it is trained.
        settings: in which it differs from concepts.json.
    """

    folder: str
    recipe: Recipe
    settings: dict = field(default_factory=dict)

    def scheduler(self) -> DDIMScheduler:
        """What it is drawn with."""
        return DDIMScheduler(**self.recipe.schedule, timestep_spacing="trailing")


COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}  # unclipped, a fifth of the digits are wrong
NETWORKS = {
    "unet": Network(
        "digits/model",
        Recipe(
            network=dict(
                sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=8, attention_head_dim=16,
            ),
            schedule=COSINE,
            batch=64,
            rate=lambda step, steps: warm_cosine(2e-3, steps)(step),
        ),
    ),
    "dit": Network(
        "digits-dit",
        Recipe(
            kind=DiTTransformer2DModel,
            network=dict(
                sample_size=8, in_channels=1, out_channels=1, patch_size=2, num_layers=6, num_attention_heads=4,
                attention_head_dim=18,
            ),
            schedule=COSINE | {"clip_sample_range": 4.0},  # the latents' own: they have unit scale
            batch=64,
            rate=lambda step, steps: warm_cosine(1e-3, steps)(step),
        ),
        {"guidance_scale": 2.0},
    ),
}  # fmt: skip


def train(
    network: str, pictures: torch.Tensor, work: Path, steps: int, seed: int, without: int | None
) -> torch.nn.Module:
    """The network, trained on the digits that are not held out.

    Args:
        network: its name.
        pictures: of all digits, as it is to draw them: pixels or latents.
        work: the folder of its checkpoint.
        steps: of 64 digits.
        seed: of its first weights and of what it is shown when.
        without: a digit that is left out too.
    """
    _, labels, held_out = digits()
    kept = ~held_out if without is None else ~held_out & (labels != without)
    name = {"unet": "digits", "dit": "digits-dit"}[network] + ("" if without is None else f"-without-{without}")
    return train_network(
        NETWORKS[network].recipe, pictures[kept], labels[kept], len(NAMES), f"{name}, seed {seed}",
        work / f"{name}-{seed}-{steps}.safetensors", steps, seed,
    )  # fmt: skip

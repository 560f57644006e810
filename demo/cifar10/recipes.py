"""Two class-conditional U-Nets of CIFAR-10's 32x32 pixels, and what forgetting is given on each.

"published" has the size, the schedule and the numbers of SalUn's second experiment (Unlearn-Saliency, folder DDPM):
128 channels, 1-2-2-2, two blocks a level, attention at 16 pixels; linear schedule; batch 128, Adam 2e-4, EMA 0.9999,
a tenth of the labels left out, antithetic timesteps, 800,000 steps; drawn in 1,000 ancestral steps with s = 2, which is
a guidance of 3 here. What differs: it is diffusers' ``UNet2DModel``, which adds the class to the timestep where theirs
joins both; the loss is a mean over channels and pixels where theirs is a sum, so that the gradient's norm is clipped
later; forgetting clips nothing by itself and takes the averaged weights unless --weights raw. "small" is ours.
"""

from diffusers import DDIMScheduler, DDPMScheduler

from ..class_model import Recipe
from ..training import warm_cosine

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
UNLEARNING = {"scope": "all", "saliency_guidance": 3.0, "condition_dropout": 0.1, "retain_target": "noise"}

RECIPES = {
    "published": Recipe(
        network=dict(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None, dropout=0.1, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False,
            freq_shift=1,
        ),
        schedule=LINEAR, batch=128, rate=lambda step, steps: 2e-4, decay=0.0, average=0.9999, flip=True,
        antithetic=True,
    ),
    "small": Recipe(
        network=dict(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64, 128), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=16, attention_head_dim=32,
        ),
        schedule=COSINE, batch=64, rate=lambda step, steps: warm_cosine(1e-3, steps)(step), average=0.999, flip=True,
        bfloat16=True,
    ),
}  # fmt: skip
STEPS = {"published": 800_000, "small": 20_000}
SCHEDULERS = {
    "published": lambda: DDPMScheduler(**LINEAR, variance_type="fixed_small"),
    "small": lambda: DDIMScheduler(**COSINE, timestep_spacing="trailing"),
}
SETTINGS = {  # how each is drawn and unlearned; alpha is the published 1e-3 of sums, times 3·32·32
    "published": UNLEARNING | {
        "guidance_scale": 3.0, "num_inference_steps": 1000, "sample_batch_size": 250, "num_forget_images": 5000,
        "num_retain_images": 45000, "train_batch_size": 128, "max_train_steps": 1000, "learning_rate": 1e-4,
        "alpha": 3.07,
    },
    "small": UNLEARNING | {
        "guidance_scale": 2.0, "num_inference_steps": 50, "sample_batch_size": 100, "num_forget_images": 500,
        "num_retain_images": 2000, "train_batch_size": 32, "max_train_steps": 300, "learning_rate": 1e-4,
        "alpha": 3.07,
    },
}  # fmt: skip


def concepts(size: str, names: list[str]) -> dict:
    """A model's concepts.json: its classes by name alone, and the settings of its size."""
    template = {"prompt": "{object}", "expect": {"label": "{object}"}}
    return {"slots": {"object": names}, "templates": [template], "settings": {"object": SETTINGS[size]}}

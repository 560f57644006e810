"""What is measured; each function runs alone in a process and returns numbers that JSON holds."""

import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from salun_diffusion.config import EraseConfig
from salun_diffusion.data.sets import ImageSet
from salun_diffusion.filling import fill
from salun_diffusion.masks.saliency import top_density
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.models import model_of
from salun_diffusion.training.change import MaskedChange
from salun_diffusion.training.checkpoints import Checkpoints
from salun_diffusion.training.trainer import Trainer

from .config import BenchmarkConfig
from .reference import Recipe, sort_mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
SCOPE = "cross-attention+resnets"
TINY = {
    "block_out_channels": (32, 32), "norm_num_groups": 8, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def unet(config: BenchmarkConfig) -> UNet2DConditionModel:
    """Stable Diffusion v1.4's U-Net, 860M random weights, unless ``tiny``."""
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[config.dtype])
    made = UNet2DConditionModel(sample_size=config.resolution // 8, cross_attention_dim=768, attention_head_dim=8,
                                **(TINY if config.tiny else {}))  # fmt: skip
    torch.set_default_dtype(torch.float32)
    if config.gradient_checkpointing:
        made.enable_gradient_checkpointing()
    return made.to(config.device)


def autoencoder(config: BenchmarkConfig) -> AutoencoderKL:
    """Stable Diffusion v1.4's, with random weights, unless ``tiny``."""
    return AutoencoderKL(
        block_out_channels=(32,) * 4 if config.tiny else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
    )


def peak(config: BenchmarkConfig) -> float:
    """GiB."""
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(config: BenchmarkConfig, work, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        if config.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if config.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """Without the first, which warms up."""
    rest = sorted(seconds[1:] or seconds)
    return rest[len(rest) // 2]


def reference_step(config: BenchmarkConfig) -> dict:
    network, device, dtype = unet(config), config.device, DTYPES[config.dtype]
    torch.manual_seed(1)
    vae = autoencoder(config).to(device, dtype)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=1 if config.tiny else 12,
            num_attention_heads=12,
            vocab_size=49408,
        )
    ).to(device, dtype)
    masks = {name: (torch.rand(p.shape) < 0.5).to(dtype) for name, p in network.named_parameters()}
    recipe = Recipe(network, vae, text, SCHEDULE, masks, 1e-5)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        pixels = (
            torch.rand(config.batch_size, 3, config.resolution, config.resolution, device=device, dtype=dtype) * 2 - 1
        )
        return pixels, torch.randint(49408, (config.batch_size, 77), device=device)

    seconds = timed(config, lambda: recipe.step(batch(), batch(), batch()), config.steps)
    return {"seconds": median(seconds), "peak_gib": peak(config)}


def our_step(config: BenchmarkConfig) -> dict:
    """The trainer itself, over random latents and prompts; and the passes alone, in its process."""
    network = unet(config)
    erasure = EraseConfig(concept=["benchmark"], train_batch_size=config.batch_size, max_train_steps=config.steps)
    fill(erasure, {}, "benchmark")
    count, side = 2 * config.batch_size, config.resolution // 8

    def images(anchored: bool) -> ImageSet:
        index = torch.arange(count)
        latents, text = torch.randn(count, 4, side, side), {"encoder_hidden_states": torch.randn(2 * count, 77, 768)}
        return ImageSet(latents, [str(i) for i in range(count)], index, index + count if anchored else None, text)

    model = model_of(pipeline(network, autoencoder(config)))
    sets = {"forget": images(True), "retain": images(False)}
    parameters = scoped_parameters(network, SCOPE)
    floor = _floor(config, network)
    change = MaskedChange(parameters, {name: torch.rand(p.shape) < 0.5 for name, p in parameters.items()})
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "training.jsonl"
        trainer = Trainer(Accelerator(cpu=config.device == "cpu"), model, sets, erasure)
        trainer.train(change, log, Checkpoints(Path(folder), {}, 1))
        stamps = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    held = peak(config)
    change.close()
    floor += _floor(config, network)[1:]
    return {
        "seconds": median([b - a for a, b in zip([0, *stamps], stamps, strict=False)]),
        "floor_seconds": median(floor),
        "peak_gib": held,
        "trained_weights": sum(value.numel() for value in change.values.values()),
    }


def _floor(config: BenchmarkConfig, network) -> list[float]:
    """Seconds of what the mathematics needs: two forward and backward passes, and one forward pass, of the U-Net."""
    side, dtype = config.resolution // 8, DTYPES[config.dtype]
    noisy = torch.randn(config.batch_size, 4, side, side, device=config.device, dtype=dtype)
    text = torch.randn(config.batch_size, 77, 768, device=config.device, dtype=dtype)

    def work() -> None:
        with torch.no_grad():
            network(noisy, 500, text)
        network(noisy.repeat(2, 1, 1, 1), 500, text.repeat(2, 1, 1)).sample.float().square().mean().backward()
        network.zero_grad(set_to_none=True)

    return timed(config, work, config.steps)


def mask(config: BenchmarkConfig) -> dict:
    """Selecting the top half of many scores; the sort's figure is for the same number, or as many as fit, scaled."""
    generator = torch.Generator().manual_seed(0)
    count = config.scores
    scores = {"all": torch.rand(count, generator=generator, device="cpu").to(config.device)}
    before = peak(config)
    ours = min(timed(config, lambda: top_density(scores, 0.5), 2))
    extra = peak(config) - before
    part = scores["all"][: min(count, 60_000_000)]
    sort = timed(config, lambda: sort_mask(part, 0.5), 1)[0]
    same = torch.equal(top_density({"all": part}, 0.5)["all"].long(), sort_mask(part, 0.5))
    return {
        "scores": count,
        "seconds": ours,
        "extra_gib": extra,
        "sorted": len(part),
        "sort_seconds": sort,
        "sort_seconds_scaled": sort * count / len(part),  # linear, which favours the sort
        "equal": same,
    }


def pipeline(network: UNet2DConditionModel, vae: AutoencoderKL | None = None) -> StableDiffusionPipeline:
    """One of ``network``, which is never told a prompt."""
    return StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=network, scheduler=SCHEDULE, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip

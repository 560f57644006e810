"""Forget and retain sets: pictures that the base model draws itself, kept as latents and encoded prompts.

Nothing is encoded twice: the final latents of the pipeline are what the autoencoder would give back, and each distinct
prompt passes through the text encoder once. A set lives in a folder named by the hash of all that determines it
(model, prompts, seeds, steps, guidance), in small shards; a run that was stopped goes on with the missing ones.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm import tqdm

from . import models
from .concepts import Row
from .conditioning import encode
from .config import EraseConfig
from .errors import SalunError
from .files import read_safetensors, write_json, write_safetensors
from .sampling import sample

SHARD = 32  # pictures a file; processes share the work file by file


@dataclass
class ImageSet:
    """Latents ``(n, channels, height, width)`` in fp32, and for each the number of its prompt and of its anchor prompt.

    ``text`` holds the denoiser's conditioning by argument name, one entry per distinct prompt (``prompts`` order).
    """

    latents: torch.Tensor
    prompts: list[str]
    prompt_index: torch.Tensor
    anchor_index: torch.Tensor | None
    text: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.latents)


def image_set(
    pipe: DiffusionPipeline, rows: list[Row], config: EraseConfig, name: str, accelerator: Accelerator
) -> ImageSet:
    """Draw ``rows`` with the base model, or find them in ``config.data_dir``, and encode their prompts. Processes share
    the drawing; each returns the whole set.

    Raises:
        SalunError: the cache folder is damaged, or the model drew NaN.
    """
    settings = {
        "model": models.digest(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        # as text: some schedulers have an infinite setting, which JSON cannot hold
        "scheduler_config": {k: repr(v) for k, v in sorted(pipe.scheduler.config.items()) if not k.startswith("_")},
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "dtype": str(pipe.dtype),
        "rows": [[row.prompt, row.seed] for row in rows],
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = Path(config.data_dir) / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process and not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", json.loads(json.dumps(settings, default=str)))
    starts = range(0, len(rows), SHARD)
    shards = [folder / f"latents-{start:05d}.safetensors" for start in starts]
    mine = [
        (rows[start : start + SHARD], shard)
        for start, shard in list(zip(starts, shards, strict=True))[
            accelerator.process_index :: accelerator.num_processes
        ]
        if not shard.exists()
    ]
    missing = sum(len(part) for part, _ in mine)
    bar = tqdm(
        total=missing,
        desc=f"drawing the {name} set",
        unit="image",
        disable=not (missing and accelerator.is_main_process),
    )
    for part, shard in mine:
        drawn = sample(
            pipe,
            part,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.sample_batch_size,
            output_type="latent",
            bar=bar,
        )
        latents = torch.stack([latent.float().cpu() for latent in drawn])
        if not latents.isfinite().all():
            raise SalunError(f"The base model drew NaN or Inf for the {name} set: load it in fp32 or bf16.")
        write_safetensors(shard, {"latents": latents}, {"format": "salun-latents"})
    bar.close()
    accelerator.wait_for_everyone()
    latents = torch.cat([read_safetensors(shard)[0]["latents"] for shard in shards])
    if len(latents) != len(rows):
        raise SalunError(
            f"{folder} holds {len(latents)} latents where {len(rows)} belong: delete the folder and run again."
        )
    anchors = [row.anchor_prompt for row in rows if row.anchor_prompt is not None]
    prompts = list(dict.fromkeys([row.prompt for row in rows] + anchors))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    return ImageSet(
        latents,
        prompts,
        torch.tensor([place[row.prompt] for row in rows]),
        torch.tensor([place[prompt] for prompt in anchors]) if anchors else None,
        encode(pipe, prompts),
    )


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of exactly ``size`` indices below ``count``: shuffled passes, one after the other, so that any
    batch size fits any set."""
    left, epoch = torch.empty(0, dtype=torch.long), 0
    while True:
        while len(left) < size:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            left, epoch = torch.cat([left, order]), epoch + 1
        yield left[:size]
        left = left[size:]


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Latents ``(n, channels, height, width)`` as the sampler left them → PIL pictures, in the autoencoder's dtype."""
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    decoded = [
        pipe.vae.decode(z.to(pipe.vae.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor + shift).sample.cpu()
        for z in latents.split(8)
    ]
    return pipe.image_processor.postprocess(torch.cat(decoded).float(), output_type="pil")


def contact_sheet(pipe: DiffusionPipeline, latents: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Write the pictures of ``latents`` as one PNG, for people to look at what the training sees, or makes."""
    pictures = decode(pipe, latents)
    rows = -(-len(pictures) // columns)
    empty = Image.new("RGB", pictures[0].size, "white")
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(pictures + [empty] * (rows * columns - len(pictures)), rows, columns).save(path)

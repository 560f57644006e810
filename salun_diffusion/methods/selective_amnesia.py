"""Selective Amnesia: Heng & Soh, "Selective amnesia: A continual learning approach to forgetting in deep generative
models", NeurIPS 2023, eq. 7."""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from ..files import read_safetensors, write_safetensors
from ..models import load as models
from .base import Gradient
from .losses import denoising


class SelectiveAmnesia(Gradient):
    """The concept's prompt is taught with pictures of its anchor (the surrogate), ``ewc`` · Σ F d² holds back the
    change d of weights that the rest needs, and the retain set is replayed.

    F is the diagonal of the Fisher information: the mean squared gradient of the denoising loss of ``fisher_images``
    single retain pictures, at the base model. It is kept in ``data_dir`` for runs with the same base, scope and
    pictures. The published code squares the sum of a picture's gradients at all 1,000 timesteps, not one at a random
    timestep: a thousand times the work, and another scale, so its λ of 50 does not carry over to ``ewc``.
    """

    title = "Selective Amnesia"
    forgets = "anchor"
    settings = {"learning_rate": 4e-5, "train_batch_size": 4}
    options = {"ewc": 500.0, "fisher_images": 200}

    def __init__(self, trainer):
        super().__init__(trainer)
        self.fisher = cached_fisher(trainer, self.chose["fisher_images"])
        self.packed: dict[str, torch.Tensor] = {}

    def losses(self, forget, retain):
        deltas = self.trainer.deltas
        if not self.packed:
            self.packed = {name: deltas.packed(name, self.fisher[name]) for name in deltas.values}
        erased, kept = self.trainer.predict_both(forget, retain)
        elastic = sum((self.packed[name] * value.square()).sum() for name, value in deltas.values.items())
        return denoising(erased, forget.target) + self.chose["ewc"] * elastic, denoising(kept, retain.target)


def cached_fisher(trainer, count: int) -> dict[str, torch.Tensor]:
    """:func:`fisher`, read from ``data_dir`` if it was computed before."""
    count = min(count, len(trainer.retain))
    about = {
        "base": models.digest(trainer.pipe),
        "scope": trainer.config.scope,
        "retain": hashlib.sha256(trainer.retain.latents[:count].numpy().tobytes()).hexdigest(),
        "prompts": [trainer.retain.prompts[i] for i in trainer.retain.prompt_index[:count].tolist()],
        "seed": trainer.config.seed,
        "precision": trainer.config.mixed_precision,
    }
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = Path(trainer.config.data_dir) / f"fisher-{key}.safetensors"
    if not path.exists():
        found = fisher(trainer, count)
        if trainer.accelerator.is_main_process:
            write_safetensors(path, found, {"format": "salun-fisher"})
        trainer.accelerator.wait_for_everyone()
    return read_safetensors(path)[0]


def fisher(trainer, count: int) -> dict[str, torch.Tensor]:
    """The mean over ``count`` retain pictures of the squared gradient of each one's denoising loss: by parameter that
    requires a gradient, fp32, on the CPU."""
    accelerator, retain = trainer.accelerator, trainer.retain
    parameters = {name: p for name, p in trainer.network.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    for i in tqdm(mine, desc="Fisher", unit="image", disable=not accelerator.is_main_process):
        batch = trainer.noised(retain, torch.tensor([i]), *trainer.draw(retain, 1, "fisher", i))
        loss = denoising(trainer.predict(batch.noisy, batch.timesteps, batch.text), batch.target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.float().square() / count
    return {name: accelerator.reduce(value).cpu() for name, value in total.items()}

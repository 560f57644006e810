"""Selective Amnesia: Heng & Soh, "Selective amnesia: A continual learning approach to forgetting in deep generative
models", NeurIPS 2023, eq. 7.
"""

import hashlib
from dataclasses import dataclass

import torch

from ..models.load import digest
from ..options import option
from ..process import progress
from .base import GradientMethod
from .losses import denoising


@dataclass(frozen=True)
class SelectiveAmnesiaOptions:
    """How strongly, and by how many pictures' gradients, the rest is held."""

    ewc: float = option(500.0, "λ of the elastic term")
    fisher_images: int = option(200, "retain pictures that the Fisher information is a mean over")


class SelectiveAmnesia(GradientMethod):
    """The concept's prompt is taught with pictures of its anchor (the surrogate), ``ewc`` · Σ F d² holds back the
    change d of weights that the rest needs, and the retain set is replayed.

    F is the diagonal of the Fisher information: the mean squared gradient of the denoising loss of ``fisher_images``
    single retain pictures, at the base model. It is kept in ``data_dir`` for runs with the same base, scope and
    pictures. The published code squares the sum of a picture's gradients at all 1,000 timesteps, not one at a random
    timestep: a thousand times the work, and another scale, so its λ of 50 does not carry over to ``ewc``.
    """

    title = "Selective Amnesia"
    forget_set = "anchor"
    settings = {"learning_rate": 4e-5, "train_batch_size": 4}
    Options = SelectiveAmnesiaOptions

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        self.fisher = cached_fisher(model, batches, options.fisher_images)

    def begin(self, change):
        super().begin(change)
        self.packed = {name: change.packed(name, self.fisher[name]) for name in change.deltas()}

    def losses(self, forget, retain):
        erased, kept = self.predict_both(forget, retain)
        elastic = sum((self.packed[name] * delta.square()).sum() for name, delta in self.change.deltas().items())
        return denoising(erased, forget.target) + self.options.ewc * elastic, denoising(kept, retain.target)


def cached_fisher(model, batches, count: int) -> dict[str, torch.Tensor]:
    """:func:`fisher`, from the cache if it was computed before."""
    count = min(count, len(batches.retain))
    settings = {
        "base": digest(model.pipe),
        "parameters": [name for name, p in model.network.named_parameters() if p.requires_grad],
        "retain": hashlib.sha256(batches.retain.latents[:count].numpy().tobytes()).hexdigest(),
        "prompts": [batches.retain.prompts[i] for i in batches.retain.prompt_index[:count].tolist()],
        "seed": batches.seed,
        "precision": batches.accelerator.mixed_precision,
    }
    return batches.cached("fisher", settings, lambda: fisher(model, batches, count))


def fisher(model, batches, count: int) -> dict[str, torch.Tensor]:
    """The mean over ``count`` retain pictures of the squared gradient of each one's denoising loss: by parameter that
    requires a gradient, fp32, on the CPU.
    """
    accelerator, retain = batches.accelerator, batches.retain
    parameters = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    share = range(accelerator.process_index, count, accelerator.num_processes)
    for i in progress("Fisher", len(share), "image", accelerator.is_main_process, over=share):
        batch = batches.noised(retain, torch.tensor([i]), *batches.draw(retain, 1, "fisher", i))
        loss = denoising(model.predict(batch.noisy, batch.timesteps, batch.condition), batch.target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.float().square() / count
    return {name: accelerator.reduce(value).cpu() for name, value in total.items()}

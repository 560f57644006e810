"""The steps of DDIM (Song et al. 2021, eq. 12) as attacks take them apart: timesteps and signal shares."""

import torch
from diffusers import DDIMScheduler

from salun_diffusion.models.base import Model


def steps_of(model: Model, count: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """``(t, ᾱ_t, ᾱ of the step before)`` of ``count`` steps, from noise to picture; fp32, the last ``ᾱ`` is 1.

    The timesteps are spaced as the pipeline's own scheduler spaces them.
    """
    model.need(["diffusion"], "This attack")
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(count)
    times = scheduler.timesteps.tolist()
    shares = [model.schedule.alphas_cumprod[time].float() for time in times] + [torch.tensor(1.0)]
    return [(time, shares[i], shares[i + 1]) for i, time in enumerate(times)]


def step(noisy: torch.Tensor, epsilon: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """One deterministic step: the picture that ``epsilon`` leaves in ``noisy``, noised again as far as ``before``."""
    clean = (noisy - (1 - now).sqrt() * epsilon) / now.sqrt()
    return before.sqrt() * clean + (1 - before).sqrt() * epsilon

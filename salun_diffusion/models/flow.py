"""What flow-matching families have in common (Lipman et al. 2023; Esser et al. 2024, "Scaling rectified flow
transformers", section 3): straight paths from a sample to noise, whose velocity the network predicts.

A timestep is 1000 σ, a float, as diffusers' ``FlowMatchEulerDiscreteScheduler`` has it.
"""

from functools import cached_property

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .latents import LatentModel
from .scopes import JOINT


class FlowModel(LatentModel):
    """A transformer on latents that predicts velocities; text and picture attend to each other in it unless a family
    says otherwise.
    """

    capabilities = frozenset({"text", "embeddings", "pictures"})
    scopes = JOINT
    Schedule = FlowMatchEulerDiscreteScheduler
    logit_normal = True  # how diffusers' training script for the family draws timesteps by default; else all alike

    @torch.no_grad()
    def encode(self, prompts):
        """As the pipeline itself encodes them: ``encoder_hidden_states`` ``(batch, tokens, width)`` and
        ``pooled_projections`` ``(batch, width)``.
        """
        parts = [self.embedded(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
        keys = ("encoder_hidden_states", "pooled_projections")
        return {key: torch.cat(found).cpu() for key, found in zip(keys, zip(*parts, strict=True), strict=True)}

    def embedded(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pipeline's ``encode_prompt`` makes of a few prompts: the tokens' embeddings, and the pooled ones."""
        raise NotImplementedError

    @cached_property
    def empty(self):
        return self.encode([""])

    def times(self, count, generator):
        """Logit-normal (0, 1) or uniform places in the schedule, shifted as the scheduler's config says: what
        diffusers' training scripts draw.
        """
        if self.logit_normal:
            places = torch.randn(count, generator=generator).sigmoid() * len(self.schedule.timesteps)
        else:
            places = torch.rand(count, generator=generator) * len(self.schedule.timesteps)
        return self.schedule.timesteps[places.long().clamp(max=len(self.schedule.timesteps) - 1)]

    def sigmas(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The share of noise at ``timesteps``, of ``like``'s dtype, to be multiplied with its samples."""
        sigma = timesteps.to(like.device, like.dtype) / self.schedule.config.num_train_timesteps
        return sigma.view(-1, *[1] * (like.ndim - 1))

    def noise(self, clean, noise, timesteps):
        """``(1 − σ) clean + σ noise``."""
        sigma = self.sigmas(timesteps, clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean, noise, timesteps):
        """The velocity ``noise − clean``."""
        return noise - clean

    def noise_in(self, predicted, noisy, timesteps):
        """``noisy + (1 − σ) velocity``, which is the noise at the path's end."""
        return noisy + (1 - self.sigmas(timesteps, noisy)) * predicted

    def sampler(self, num_inference_steps):
        sampler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        sampler.set_timesteps(num_inference_steps, **self.sampling(num_inference_steps))
        return sampler

    def sampling(self, num_inference_steps: int) -> dict:
        """What the pipeline gives its scheduler besides the number of steps."""
        return {}

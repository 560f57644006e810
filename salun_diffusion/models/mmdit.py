"""Stable Diffusion 3 and Flux: transformers in which a prompt's tokens and the latents attend to each other."""

import numpy as np
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from .flow import FlowModel

DISTILLED = 3.5  # the guidance that Flux dev is told while it is trained, as in diffusers' training scripts


class SD3(FlowModel):
    """diffusers' own ``StableDiffusion3Pipeline``, with its third text encoder (T5) or without."""

    @classmethod
    def accepts(cls, pipe):
        return isinstance(pipe, StableDiffusion3Pipeline)

    def embedded(self, prompts):
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, device=self.pipe.text_encoder.device
        )
        return embeds, pooled

    def forward(self, noisy, timesteps, condition):
        return self.network(noisy, timestep=timesteps, return_dict=False, **condition)[0]

    def sampling(self, num_inference_steps):
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        channels, height, width = self.sample_shape
        patch = self.network.config.patch_size
        return {"mu": _mu(self.pipe, (height // patch) * (width // patch))}


class Flux(FlowModel):
    """diffusers' own ``FluxPipeline``: dev, whose guidance is told to the network as a number, and schnell, which has
    none. Guidance by an empty prompt, as saliency and ESD use it, is possible with both; neither was trained for it.

    Samples are latents ``(16, height, width)``; the network takes them as tokens of 2x2.
    """

    logit_normal = False

    @classmethod
    def accepts(cls, pipe):
        return isinstance(pipe, FluxPipeline)

    @property
    def sample_shape(self):
        side = self.pipe.default_sample_size
        return self.network.config.in_channels // 4, side, side

    @property
    def picture_side(self):
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def embedded(self, prompts):
        return self.pipe.encode_prompt(prompts, None, device=self.pipe.text_encoder.device)[:2]

    def forward(self, noisy, timesteps, condition):
        count, channels, height, width = noisy.shape
        text = condition["encoder_hidden_states"]
        guidance = torch.full((count,), DISTILLED, device=noisy.device, dtype=torch.float32)
        predicted = self.network(
            hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / self.schedule.config.num_train_timesteps,
            guidance=guidance if self.network.config.guidance_embeds else None,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
            return_dict=False,
            **condition,
        )[0]
        return self.unpacked(predicted, height, width)

    def unpacked(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens ``(n, height · width / 4, 64)`` as latents ``(n, 16, height, width)``."""
        parts = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2)
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)

    def draw(self, rows, *, output_type="pil", size=None, **how):
        made = super().draw(rows, output_type=output_type, size=size, **how)
        if output_type != "latent":
            return made
        height, width = (side // self.pipe.vae_scale_factor for side in size or (self.picture_side,) * 2)
        return list(self.unpacked(torch.stack(made), height, width))

    def sampling(self, num_inference_steps):
        _, height, width = self.sample_shape
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return {"sigmas": sigmas, "mu": _mu(self.pipe, height * width // 4)}


def _mu(pipe, tokens: int) -> float:
    """By how much a schedule is shifted for pictures of so many tokens."""
    config = pipe.scheduler.config
    return calculate_shift(
        tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5), config.get("max_shift", 1.15 if isinstance(pipe, FluxPipeline) else 1.16),
    )  # fmt: skip

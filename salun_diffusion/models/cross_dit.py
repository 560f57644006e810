"""Transformers on latents that attend to the tokens of a prompt in layers of their own: PixArt-Σ (Chen et al. 2024) and
Sana (Xie et al. 2024, arXiv 2410.10629).

Their condition holds ``encoder_hidden_states`` ``(batch, 300, width)`` and ``encoder_attention_mask`` ``(batch, 300)``,
which hides the padding.
"""

import inspect
from functools import cached_property

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtSigmaPipeline, SanaPipeline

from .base import Condition
from .flow import FlowModel
from .latents import LatentModel
from .scopes import CROSS_DIT
from .text_unet import difference

KEYS = ("encoder_hidden_states", "encoder_attention_mask")


class CrossDiT(LatentModel):
    """What the two have in common. Both lowercase and strip a prompt; markup in it is not cleaned away."""

    scopes = CROSS_DIT

    def encode(self, prompts):
        return self.embedded(prompts)

    @torch.no_grad()
    def embedded(self, prompts: list[str], **how) -> Condition:
        """The condition of ``prompts``; ``how`` goes to the pipeline's ``encode_prompt``."""
        how |= {"do_classifier_free_guidance": False, "device": self.pipe.text_encoder.device, "clean_caption": False}
        parts = [self.pipe.encode_prompt(prompts[i : i + 64], **how)[:2] for i in range(0, len(prompts), 64)]
        return {key: torch.cat(found).cpu() for key, found in zip(KEYS, zip(*parts, strict=True), strict=True)}

    @cached_property
    def empty(self):
        return self.embedded([""])

    def captions(self, embedded: torch.Tensor) -> torch.Tensor:
        """Embeddings ``(batch, tokens, width)`` of the text encoder as the attention layers get them."""
        return self.network.caption_projection(embedded)

    @torch.no_grad()
    def tokens(self, condition: Condition) -> torch.Tensor:
        """The embedding of each token as the attention layers get it, ``(batch, tokens, width)``; zeros for padding,
        which they do not see.
        """
        seen = self.captions(self.moved(condition["encoder_hidden_states"])).cpu()
        return seen * condition["encoder_attention_mask"][..., None]

    def token_ids(self, prompt: str) -> list[int]:
        """The tokens that the attention layers see, without padding."""
        tokenizer = self.pipe.tokenizer
        return tokenizer(prompt.lower().strip(), truncation=True, max_length=300).input_ids

    def differing_tokens(self, prompt: str, other: str) -> slice:
        """As :func:`.text_unet.differing_tokens`."""
        return difference(self.token_ids(prompt), self.token_ids(other))

    def token_count(self, prompt: str) -> int:
        """How many tokens the encoder reads of ``prompt``, its end mark included."""
        return len(self.token_ids(prompt))

    def draw(self, rows, *, size=None, **how):
        # at the size that is asked for: the pipelines' own choice of the nearest trained one knows a few models alone
        size = size or (self.picture_side,) * 2
        return super().draw(rows, size=size, use_resolution_binning=False, clean_caption=False, **how)


class PixArtSigma(CrossDiT):
    """diffusers' own ``PixArtSigmaPipeline``: T5. It predicts noise, and the variance beside it, which samplers do not
    use.
    """

    capabilities = frozenset({"text", "cross-attention", "embeddings", "pictures", "diffusion"})

    @classmethod
    def accepts(cls, pipe):
        return isinstance(pipe, PixArtSigmaPipeline)

    def forward(self, noisy, timesteps, condition):
        predicted = self.network(
            noisy, timestep=timesteps, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
            **condition,
        )[0]  # fmt: skip
        return predicted[:, : noisy.shape[1]]


# what the pipeline's own call puts before every prompt but the empty one, for Gemma to elaborate on it
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(CrossDiT, FlowModel):
    """diffusers' own ``SanaPipeline``: Gemma, an autoencoder without a distribution, and a velocity.

    The flow is trained as by diffusers' script for it: uniform places in the schedule, shifted only where the
    scheduler's own config says ``shift``. Steps of our own are shifted as the pipeline's are, by its ``flow_shift``.
    """

    capabilities = frozenset({"text", "cross-attention", "embeddings", "pictures"})
    scopes = CROSS_DIT
    logit_normal = False

    @classmethod
    def accepts(cls, pipe):
        return isinstance(pipe, SanaPipeline)

    @classmethod
    def schedule_of(cls, config):
        return FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], shift=config.get("shift", 1.0))

    def encode(self, prompts):
        return self.embedded(prompts, complex_human_instruction=INSTRUCTION)

    def captions(self, embedded):
        return self.network.caption_norm(super().captions(embedded))

    def token_ids(self, prompt):
        # of what the encoder reads, the pipeline keeps the first token and the last 299: where the instruction ends
        instruction, tokenizer = "\n".join(INSTRUCTION), self.pipe.tokenizer
        start = len(tokenizer.encode(instruction)) - 1
        words = instruction + prompt.lower().strip()
        ids = tokenizer(words, truncation=True, max_length=start + 299).input_ids
        return ids[:1] + ids[start:]

    def token_count(self, prompt):
        """Gemma marks no end: the first token after the prompt, which is padding, stands for it."""
        return len(self.token_ids(prompt)) + 1

    def forward(self, noisy, timesteps, condition):
        scale = self.network.config.timestep_scale
        return self.network(noisy, timestep=timesteps * scale, return_dict=False, **condition)[0]

    def sampler(self, num_inference_steps):
        config = self.pipe.scheduler.config
        shift = config.get("flow_shift", config.get("shift", 1.0))
        sampler = FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], shift=shift)
        sampler.set_timesteps(num_inference_steps)
        return sampler

    def encoded(self, pixels):
        return self.pipe.vae.encode(pixels).latent

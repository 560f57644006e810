"""PixArt-Σ: a transformer on latents that attends to the tokens of a prompt, encoded by T5 (Chen et al. 2024).

Its condition holds ``encoder_hidden_states`` ``(batch, 300, width)`` and ``encoder_attention_mask`` ``(batch, 300)``,
which hides the padding. It predicts noise, and the variance beside it, which samplers do not use.
"""

from functools import cached_property

import torch
from diffusers import PixArtSigmaPipeline

from .base import Condition
from .latents import LatentModel
from .scopes import CROSS_DIT
from .text_unet import differing_tokens, token_ids


class PixArtSigma(LatentModel):
    """diffusers' own ``PixArtSigmaPipeline``. It lowercases and strips a prompt; markup in it is not cleaned away."""

    capabilities = frozenset({"text", "cross-attention", "pictures", "diffusion"})
    scopes = CROSS_DIT

    @classmethod
    def accepts(cls, pipe):
        return isinstance(pipe, PixArtSigmaPipeline)

    @torch.no_grad()
    def encode(self, prompts):
        options = {"do_classifier_free_guidance": False, "device": self.pipe.device, "clean_caption": False}
        parts = [self.pipe.encode_prompt(prompts[i : i + 64], **options)[:2] for i in range(0, len(prompts), 64)]
        keys = ("encoder_hidden_states", "encoder_attention_mask")
        return {key: torch.cat(found).cpu() for key, found in zip(keys, zip(*parts, strict=True), strict=True)}

    @cached_property
    def empty(self):
        return self.encode([""])

    def forward(self, noisy, timesteps, condition):
        predicted = self.network(
            noisy, timestep=timesteps, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
            **condition,
        )[0]  # fmt: skip
        return predicted[:, : noisy.shape[1]]

    @torch.no_grad()
    def tokens(self, condition: Condition) -> torch.Tensor:
        """The embedding of each token as the attention layers get it, ``(batch, tokens, width)``; zeros for padding,
        which they do not see.
        """
        projected = self.network.caption_projection(self.moved(condition["encoder_hidden_states"])).cpu()
        return projected * condition["encoder_attention_mask"][..., None]

    def differing_tokens(self, prompt: str, other: str) -> slice:
        """As :func:`.text_unet.differing_tokens`."""
        return differing_tokens(self.pipe, prompt, other)

    def token_count(self, prompt: str) -> int:
        """How many tokens the encoder reads of ``prompt``, its end mark included."""
        return len(token_ids(self.pipe, prompt))

    def draw(self, rows, **how):
        # at the size that is asked for: the pipeline's own choice of the nearest trained one knows four models alone
        return super().draw(rows, use_resolution_binning=False, clean_caption=False, **how)

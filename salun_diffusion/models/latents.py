"""What the families on latents have in common: diffusers' ``AutoencoderKL`` and image processor."""

import torch
from PIL import Image

from .base import Condition, Model


class LatentModel(Model):
    """A pipeline with a ``vae`` and an ``image_processor``."""

    @property
    def picture_side(self):
        return self.network.config.sample_size * self.pipe.vae_scale_factor

    def embeddings(self, condition: Condition) -> torch.Tensor:
        """What the text encoders make of each token, ``(batch, tokens, width)``."""
        return condition["encoder_hidden_states"]

    def with_embeddings(self, condition: Condition, embeddings: torch.Tensor) -> Condition:
        """``condition`` with other :meth:`embeddings`; what is pooled of a prompt stays."""
        return condition | {"encoder_hidden_states": embeddings.to(condition["encoder_hidden_states"].dtype)}

    def draw(self, rows, *, output_type="pil", **how):
        if output_type == "latent" or self.pipe.vae.dtype == self.dtype:
            return super().draw(rows, output_type=output_type, **how)
        latents = super().draw(rows, output_type="latent", **how)  # in half precision, the autoencoder stays in fp32
        return list(self._decoded(torch.stack(latents), output_type))

    def decode(self, samples):
        return self._decoded(samples, "pil")

    @torch.no_grad()
    def _decoded(self, samples, output_type):
        vae, shift = self.pipe.vae, getattr(self.pipe.vae.config, "shift_factor", None) or 0.0
        decoded = [
            vae.decode(z.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift).sample.cpu()
            for z in samples.split(1)  # the autoencoder's fp32 activations at 512 pixels would fill a small card
        ]
        return self.pipe.image_processor.postprocess(torch.cat(decoded).float(), output_type=output_type)

    @torch.no_grad()
    def encode_pictures(self, pictures: list[Image.Image]):
        """The mode of what the autoencoder says of each, in the sampler's scale."""
        vae, shift, samples = self.pipe.vae, getattr(self.pipe.vae.config, "shift_factor", None) or 0.0, []
        for picture in pictures:  # one by one, as above
            pixels = self.pipe.image_processor.preprocess(picture).to(vae.device, vae.dtype)
            samples.append((self.encoded(pixels) - shift) * vae.config.scaling_factor)
        return torch.cat(samples)

    def encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the autoencoder makes of pixels ``(1, 3, height, width)``."""
        return self.pipe.vae.encode(pixels).latent_dist.mode()

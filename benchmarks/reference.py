"""The published recipe (SalUn's Stable Diffusion training), written plainly: what our numbers are compared with.

Each step encodes the forget images, the same images for the anchor, and the retain images, and three lists of prompts;
runs the U-Net three times; multiplies every dense gradient by a dense mask; and steps a dense Adam. The mask comes from
sorting all scores twice. One thing is kinder than the original: the mask is held in fp32 (4 bytes a weight) instead of
int64, which would not fit beside the rest here.
"""

import torch
import torch.nn.functional as F


def sort_mask(scores: torch.Tensor, density: float) -> torch.Tensor:
    """The top ``density`` of flat fp32 ``scores`` by the rank of a double argsort; int64, as the original keeps it."""
    ranks = torch.argsort(torch.argsort(-scores))
    return (ranks < int(density * len(scores))).long()


class Recipe:
    """The dense training of every U-Net weight, masked by multiplication."""

    def __init__(self, unet, vae, text_encoder, schedule, masks: dict[str, torch.Tensor], learning_rate: float):
        self.unet, self.vae, self.text_encoder, self.schedule = unet, vae, text_encoder, schedule
        self.masks = masks
        unet.requires_grad_(True)
        self.adam = torch.optim.Adam(unet.parameters(), lr=learning_rate)

    def encode(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
            return latents, self.text_encoder(tokens)[0]

    def step(self, forget, anchor, retain, alpha: float = 1.0) -> float:
        """One step; each argument is ``(pixels, tokens)``."""
        latents, text = self.encode(*forget)
        _, anchor_text = self.encode(*anchor)
        retain_latents, retain_text = self.encode(*retain)
        t = torch.randint(1000, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        noisy = self.schedule.add_noise(latents, noise, t)
        erased = self.unet(noisy, t, text).sample
        with torch.no_grad():
            wanted = self.unet(noisy, t, anchor_text).sample
        noise = torch.randn_like(retain_latents)
        kept = self.unet(self.schedule.add_noise(retain_latents, noise, t), t, retain_text).sample
        loss = F.mse_loss(erased, wanted) + alpha * F.mse_loss(kept, noise)
        self.adam.zero_grad()
        loss.backward()
        for name, parameter in self.unet.named_parameters():
            if parameter.grad is not None:
                parameter.grad *= self.masks[name].to(parameter.device)
        self.adam.step()
        return loss.item()

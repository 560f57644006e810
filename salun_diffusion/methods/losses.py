"""The losses of saliency unlearning, as functions of tensors (SalUn, arXiv 2310.12508)."""

import torch
import torch.nn.functional as F


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, ``g·ε_c − (g − 1)·ε_∅``, with diffusers' guidance scale g (Ho & Salimans 2022, eq. 6,
    and SalUn's code count from the conditional prediction: their s is g − 1). Any one shape; same dtype out.
    """
    return conditional if scale == 1 else scale * conditional - (scale - 1) * unconditional


def misaligned_prompt(predicted: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """``E‖ε(x_t|c') − ε(x_t|c)‖²``, the forgetting term of SalUn's eq. 8: the concept's prompt is to be drawn as the
    anchor's. Both are predictions ``(batch, channels, height, width)``; no gradient flows into ``anchor``.
    """
    return F.mse_loss(predicted.float(), anchor.detach().float())


def denoising(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The diffusion model's own training loss (Ho et al. 2020, eq. 14), SalUn's retain term ``ℓ_MSE(θ; D_r)``."""
    return F.mse_loss(predicted.float(), target.float())

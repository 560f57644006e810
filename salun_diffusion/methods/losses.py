"""The losses of saliency unlearning, as functions of tensors (SalUn, arXiv 2310.12508)."""

import torch
import torch.nn.functional as F


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, ``(1 + s)·ε_c − s·ε_∅`` (Ho & Salimans 2022, eq. 6). Any one shape; same dtype out."""
    return conditional if scale == 0 else (1 + scale) * conditional - scale * unconditional


def misaligned_prompt(predicted: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """``E‖ε(x_t|c') − ε(x_t|c)‖²``, the forgetting term of SalUn's eq. 8: the concept's prompt is to be drawn as the
    anchor's. Both are predictions ``(batch, channels, height, width)``; no gradient flows into ``anchor``."""
    return F.mse_loss(predicted.float(), anchor.detach().float())


def denoising(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The diffusion model's own training loss (Ho et al. 2020, eq. 14), SalUn's retain term ``ℓ_MSE(θ; D_r)``."""
    return F.mse_loss(predicted.float(), target.float())


def denoising_target(scheduler, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What a network with this scheduler predicts for ``clean`` with ``noise`` at steps ``t``: the noise, or the
    velocity (Salimans & Ho 2022). Raises ValueError for any other prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, t)
    raise ValueError(f"The scheduler's prediction_type is '{kind}'; epsilon and v_prediction can be trained.")

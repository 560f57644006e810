"""SalUn: Fan et al., "SalUn: Empowering machine unlearning via gradient-based weight saliency", ICLR 2024, eq. 8."""

import torch

from ..losses import denoising, misaligned_prompt


def salun(predict, forget, retain) -> tuple[torch.Tensor, torch.Tensor]:
    """The misaligned-prompt loss on the forget batch and the denoising loss on the retain batch, both scalars.

    The anchor's prediction is made with the current weights and carries no gradient; it shares steps and noise with the
    concept's. The two passes that do carry gradients are one call on twice the batch.

    Args:
        predict: ``(noisy latents, timesteps, text) -> prediction`` of the network being edited.
        forget: a :class:`~salun_diffusion.trainer.Batch` with ``text`` and ``anchor_text``.
        retain: one with ``text`` and ``target``.
    """
    with torch.no_grad():
        anchor = predict(forget.noisy, forget.timesteps, forget.anchor_text)
    text = {key: torch.cat([forget.text[key], retain.text[key]]) for key in forget.text}
    predicted = predict(torch.cat([forget.noisy, retain.noisy]), torch.cat([forget.timesteps, retain.timesteps]), text)
    erased, kept = predicted.split([len(forget.noisy), len(retain.noisy)])
    return misaligned_prompt(erased, anchor), denoising(kept, retain.target)

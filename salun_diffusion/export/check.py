"""How far an export is from the erasure that it was made of: in weights, and in pictures."""

import numpy as np
import torch


@torch.no_grad()
def compare(delta, erased: dict[str, torch.Tensor], network: dict[str, torch.Tensor]) -> tuple[float, float]:
    """``(largest, relative)`` differences of ``network``'s weights to the ``erased`` ones, as ``Exported`` has them."""
    largest, off, moved = 0.0, 0.0, 0.0
    for name, weight in network.items():
        difference = (weight.float() - erased[name].float()).abs()
        largest, off = max(largest, float(difference.max())), off + float(difference.double().square().sum())
        if name in delta.values:
            moved += float(delta.values[name].double().square().sum())
    return largest, (off / moved) ** 0.5 if moved else 0.0


def pictures(pipe, prompts: list[str], options) -> list[np.ndarray]:
    """The prompts drawn one at a time, each from the seed's own noise: int16 ``(height, width, 3)``."""
    drawn = []
    for prompt in prompts:
        noise = torch.Generator().manual_seed(options.seed)
        image = pipe(prompt, num_inference_steps=options.num_inference_steps, generator=noise).images[0]
        drawn.append(np.asarray(image.convert("RGB"), dtype=np.int16))
    return drawn

"""Draw many prompts with a pipeline, each from its own seed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..concepts.concept import Row


def sample(
    pipe: "DiffusionPipeline",
    rows: "Sequence[Row]",
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    output_type: str = "pil",
    size: tuple[int, int] | None = None,
    progress: str | None = None,
    bar: Any = None,
) -> list[Any]:
    """One picture per row, in row order: PIL images, or latents ``(channels, height, width)`` for ``"latent"``.

    The starting noise of a row is drawn on the CPU from ``row.seed`` alone, so a picture does not depend on which rows
    share its batch (up to rounding in the network's arithmetic).

    Args:
        pipe: a pipeline that takes prompts.
        rows: what to draw, and each one's seed.
        num_inference_steps: denoising steps.
        guidance_scale: as diffusers counts it.
        batch_size: pictures at once.
        output_type: "pil", "np" or "latent".
        size: height and width in pixels; the model's own without it.
        progress: what to write before the progress bar; no bar without it.
        bar: a caller's own ``tqdm`` to advance instead, for one bar over several calls.
    """
    import torch
    from tqdm import tqdm

    images: list[Any] = []
    pipe.set_progress_bar_config(disable=True)
    own = tqdm(total=len(rows), desc=progress, unit="image", disable=progress is None or bar is not None)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        made = pipe(
            prompt=[row.prompt for row in part],
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in part],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
            **({"height": size[0], "width": size[1]} if size else {}),
        ).images
        images.extend(made)
        (own if bar is None else bar).update(len(part))
    own.close()
    return images

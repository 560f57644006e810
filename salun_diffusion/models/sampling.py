"""Draw many prompts with a pipeline, each from its own seed; or, without a pipeline that takes prompts, denoise."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
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
    tell: Callable[[list[str]], dict[str, Any]] = lambda prompts: {"prompt": prompts},
    **more,
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
        tell: how the pipeline's own call is given prompts.
        more: what else it is given.
    """
    import torch
    from tqdm import tqdm

    images: list[Any] = []
    pipe.set_progress_bar_config(disable=True)
    own = tqdm(total=len(rows), desc=progress, unit="image", disable=progress is None or bar is not None)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        made = pipe(
            **tell([row.prompt for row in part]),
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in part],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
            **({"height": size[0], "width": size[1]} if size else {}),
            **more,
        ).images
        images.extend(made)
        (own if bar is None else bar).update(len(part))
    own.close()
    return images


def denoise(
    predict,
    scheduler: Any,
    noise: "torch.Tensor",
    condition: "dict[str, torch.Tensor]",
    empty: "dict[str, torch.Tensor] | None",
    *,
    guidance_scale: float,
    num_inference_steps: int,
    generators: "list[torch.Generator | None]",
) -> "torch.Tensor":
    """Samples from ``noise``, of its shape and dtype ``(batch, channels, height, width)``, for models whose pipeline
    takes no prompts.

    Args:
        predict: ``predict(noisy, timesteps, condition)``, the network's prediction.
        scheduler: any of diffusers'; its timesteps are set.
        noise: standard normal.
        condition: of the batch, where the network is.
        empty: the unconditional side, of the batch too; unused without guidance.
        guidance_scale: as diffusers counts it; at 1 or below there is none.
        num_inference_steps: denoising steps.
        generators: of each picture, for schedulers that add noise.
    """
    import inspect

    import torch

    scheduler.set_timesteps(num_inference_steps)
    takes = inspect.signature(scheduler.step).parameters
    # one generator for several pictures is drawn from in turn; None is the global one
    own = generators if len({id(one) for one in generators}) == len(generators) else generators[0]
    more = {"generator": own} if "generator" in takes and own is not None else {}
    guided = guidance_scale > 1
    both = {key: torch.cat([value, empty[key]]) for key, value in condition.items()} if guided else condition
    x = noise.float() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t).to(noise.dtype)
        batch = scaled.repeat(2, 1, 1, 1) if guided else scaled
        predicted = predict(batch, t.to(x.device).expand(len(batch)), both).float()
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance_scale * (conditional - unconditional)
        x = scheduler.step(predicted, t, x, **more).prev_sample
    return x.to(noise.dtype)

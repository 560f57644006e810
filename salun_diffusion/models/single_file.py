"""A base model that is one .safetensors file, as Stable Diffusion's checkpoints are passed around."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SalunError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def from_single_file(path: Path, dtype: "torch.dtype | None", variant: str | None) -> "DiffusionPipeline":
    """The pipeline in a file, as :func:`.load.load_pipeline` gives one.

    What the file does not hold (configs, tokenizer) is read from its own folder if that has a ``model_index.json``, and
    fetched from the hub otherwise, for the kind of model that diffusers takes it for.

    Raises:
        SalunError: a variant, of which a file has none; a file that diffusers cannot load.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import safe_open

    if variant is not None:
        raise SalunError(f"{path} is one file, which has no variants: leave --variant {variant} out.")
    config = {"config": str(path.parent)} if (path.parent / "model_index.json").is_file() else {}
    try:
        with safe_open(path, framework="pt") as file:
            xl = any(name.startswith("conditioner.") for name in file.keys())
        kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
        unchecked = {} if xl else {"safety_checker": None}
        pipe = kind.from_single_file(
            str(path), dtype=torch.float32, local_files_only=bool(config), **config, **unchecked
        )
    except Exception as error:  # diffusers' converters and the hub's client have a dozen kinds for what goes wrong here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SalunError(
            f"{path} could not be loaded as a Stable Diffusion checkpoint ({reason}): put it beside the "
            "model_index.json and folders of its kind of model, be online once, or give a diffusers folder."
        ) from None
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":  # as from a folder
            part.to(dtype or torch.float32)
    return pipe

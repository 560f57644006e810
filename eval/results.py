"""What every command of this room writes: ``results.json`` and ``samples.jsonl``, a line for each picture.

``results.json`` always holds ``format`` ("salun-diffusion COMMAND N"), ``protocol`` (what the numbers mean, in words to
quote), ``settings``, ``versions`` (python, torch, diffusers, transformers), ``n``, and ``models``: the base model and
the erasures, each with ``name``, ``role`` ("base", "erasure", "control"), ``source``, ``digest`` (of the pipeline as
measured) and ``erasure`` (as ``list_erasures`` tells of it; null for the base). What a command adds is described in its
own file. A proportion is ``{"count", "n", "percent", "low", "high"}``, the last two its Wilson 95% interval.
"""

import json
import platform
from pathlib import Path

import diffusers
import torch
import transformers

from salun_diffusion import list_erasures, load_erasure, unload_erasure
from salun_diffusion.errors import SalunError
from salun_diffusion.files import write_json
from salun_diffusion.models import denoiser, digest

RESULTS, SAMPLES = "results.json", "samples.jsonl"
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
}


def begin(folder: Path, format: str) -> None:
    """Make ``folder`` ready for new results: old ones of the same command go, so that none lie beside new pictures.

    Raises:
        SalunError: the folder holds another command's results.
    """
    path = folder / RESULTS
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["format"]
        except (ValueError, KeyError, TypeError):
            found = "unknown"
        if found != format:
            raise SalunError(f"{folder} holds results of the form '{found}': give another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, SAMPLES):
        (folder / name).unlink(missing_ok=True)


def write(folder: Path, results: dict, samples: list[dict]) -> None:
    """Write both files; ``results.json`` last: where it stands, everything that it counts does."""
    (folder / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    write_json(folder / RESULTS, results)


def as_drawn(pipe) -> dict:
    """What ``settings`` says of the pipeline itself."""
    return {
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "safety_checker": False,
    }


def aligned(lines: list[list[str]]) -> str:
    """A table for the terminal, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def introduce(pipe, base: str, erasures: list[str]) -> list[dict]:
    """The base model and the erasures, as ``results.json`` introduces them. Each erasure is loaded and unloaded once,
    so that a wrong path, a wrong base or a delta without effect is found out before the drawing and not after.

    Raises:
        SalunError: any of these, or two erasures of one name.
    """
    models = [{"name": "base", "role": "base", "source": base, "digest": digest(pipe), "erasure": None}]
    for name, source in zip(_names(erasures), erasures, strict=True):
        load_erasure(pipe, source)
        role = "erasure" if len(models) == 1 else "control"
        models.append(
            {"name": name, "role": role, "source": source, "digest": digest(pipe), "erasure": list_erasures(pipe)[0]}
        )
        unload_erasure(pipe)
        if models[-1]["digest"] == models[0]["digest"]:
            raise SalunError(f"{source} leaves the base model as it is: there is nothing to measure in it.")
    return models


def _names(erasures: list[str]) -> list[str]:
    """A short name for each erasure, which also names its folder of pictures."""
    names = []
    for source in erasures:
        path = Path(source)
        name = (
            (path.parent if path.name == "erasure.safetensors" else path).absolute().name.removesuffix(".safetensors")
        )
        if name in ("base", *names):
            raise SalunError(f"Two of the models to compare are called '{name}': rename the folder or file {source}.")
        names.append(name)
    return names

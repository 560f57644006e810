"""What is measured: a base model, and the same with erasures applied."""

import math
from collections import Counter
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from salun_diffusion import list_erasures, load_erasure, unload_erasure
from salun_diffusion.erasures.locate import ADAPTER_NAME, FILE_NAME
from salun_diffusion.errors import SalunError
from salun_diffusion.files import key_of, read_json, sha256
from salun_diffusion.loader import identity, idle_erasures
from salun_diffusion.models import load_model
from salun_diffusion.models.base import Model
from salun_diffusion.tensors import read_safetensors

LORA = "measured_under"  # its name among the pipeline's adapters
RETRAINED = "retrained"  # what a control that was trained without the concept is called


def as_drawn(base_model: Model) -> dict:
    """What ``settings`` says of the model itself."""
    return {
        "scheduler": type(base_model.pipe.scheduler).__name__,
        "dtype": str(base_model.dtype).removeprefix("torch."),
        "device": str(base_model.device),
        "safety_checker": False,
    }


def wear(base_model: Model, path: Path | None, scale: float | None) -> dict:
    """Put the LoRA at ``path`` onto the base model, for all that is drawn from now on: erasures come and go beneath it.
    What is drawn is then known by the LoRA's content and scale too.

    Returns:
        What ``settings`` says of it: ``lora`` with ``source``, ``sha256`` and ``scale``; nothing without a path.

    Raises:
        SalunError: a file that is missing, damaged or no LoRA of this model, a scale that is not finite, or no peft.
    """
    if path is None:
        if scale is not None:
            raise SalunError("--lora_scale means nothing without --lora: give both, or neither.")
        return {}
    scale = 1.0 if scale is None else scale
    if not math.isfinite(scale):
        raise SalunError(f"--lora_scale is {scale}: give a finite number.")
    if find_spec("peft") is None:
        raise SalunError("--lora needs peft: pip install 'salun-diffusion[export]'.")
    file, pipe = _lora_file(path), base_model.pipe
    tensors, _ = read_safetensors(file)  # each fault that it may have is named there
    told = {"source": str(path), "sha256": sha256(file), "scale": scale}
    key = key_of([identity(base_model), told["sha256"], scale], 12)
    if not hasattr(pipe, "load_lora_weights"):
        raise SalunError(f"--lora needs a pipeline that takes LoRAs, which {type(pipe).__name__} does not.")
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=LORA, use_safetensors=True)
        worn = any(LORA in names for names in pipe.get_list_adapters().values())
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        worn = worn and not any(weight.is_meta for module in modules for weight in module.parameters())
        if worn:
            pipe.set_adapters([LORA], [scale])
    except Exception as error:  # diffusers and peft have kinds of their own for what does not fit
        worn, reason = False, " ".join(str(error).split())[:200] or type(error).__name__
    else:
        reason = f"of its {len(tensors)} tensors none, or not all, belong to a LoRA of this model's layers"
    if not worn:
        raise SalunError(
            f"{file} is no LoRA for this base model ({reason.rstrip('.')}): give one that was made for it, in a form "
            "that diffusers' load_lora_weights reads."
        )
    base_model.base_digest = key
    return {"lora": told}


def _lora_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix != ".safetensors" and path.exists():
            raise SalunError(f"{path} is no .safetensors file: give the LoRA as one, or the folder that holds it.")
        return path
    files = sorted(path.glob("*.safetensors"))
    named = [file for file in files if file.name == "pytorch_lora_weights.safetensors"]
    if len(named or files) != 1:
        raise SalunError(f"{path} holds {len(files)} .safetensors files: name the one that is the LoRA.")
    return (named or files)[0]


def introduce(base_model: Model, base: str, erasures: list[str], scales: list[float] | None = None) -> list[dict]:
    """The base model and the erasures, as ``results.json`` introduces them. Each erasure is loaded and unloaded once,
    so that a wrong path, a wrong base or a delta without effect is found out before the drawing and not after.

    Args:
        base_model: the loaded base, nothing applied.
        base: what the user called it.
        erasures: their files, run folders or hub ids.
        scales: how much of each erasure to apply: one for all, or one each; 1 by default.

    Raises:
        SalunError: any of these, two erasures of one name, or neither one scale nor one each.
    """
    scales = (scales or [1.0]) * (len(erasures) if len(scales or [1]) == 1 else 1)
    if len(scales) != len(erasures):
        raise SalunError(
            f"{len(erasures)} erasures and {len(scales)} values of --scale: give one for all, or one each."
        )
    names = [
        _name(source) + (f"-x{scale:g}" if scale != 1 else "") for source, scale in zip(erasures, scales, strict=True)
    ]
    if twice := [name for name, count in Counter(["base", *names]).items() if count > 1]:
        raise SalunError(f"Two of the models to compare are called '{twice[0]}': rename the folder or file of one.")
    models = [{"name": "base", "role": "base", "source": base, "digest": identity(base_model), "erasure": None}]
    pipe = base_model.pipe
    for name, source, scale in zip(names, erasures, scales, strict=True):
        model = {"name": name, "role": "erasure" if len(models) == 1 else "control", "source": source}
        _load(pipe, source, scale)
        costs = [_cost(Path(part)) for part in _parts(source)]
        model |= {
            "digest": identity(base_model),
            "erasure": _told([one | cost for one, cost in zip(list_erasures(pipe), costs, strict=True)]),
        }
        idle = idle_erasures(pipe)
        unload_erasure(pipe)
        if idle:
            raise SalunError(f"{source} leaves the base model as it is: there is nothing to measure in it.")
        models.append(model)
    return models


def retrained(base_model: Model, source: str, models: list[dict]) -> tuple[Model, dict]:
    """A control: a model of the same kind that was trained without the concept, and how ``results.json`` introduces it,
    as "retrained".

    Args:
        base_model: whose dtype and device it gets.
        source: a folder, file or hub id.
        models: those that :func:`introduce` told of.

    Raises:
        SalunError: it cannot be loaded, or an erasure is called "retrained" too.
    """
    if any(model["name"] == RETRAINED for model in models):
        raise SalunError(
            f"An erasure is called '{RETRAINED}', as the model of --retrained is: rename its folder or file."
        )
    found = load_model(source, None, base_model.dtype, None)
    found.pipe.to(base_model.device)
    return found, introduce(found, source, [])[0] | {"name": RETRAINED, "role": "control"}


@contextmanager
def applied(pipe, model: dict):
    """``pipe`` as the ``model`` that :func:`introduce` described, and as before afterwards."""
    if model["erasure"]:
        _load(pipe, model["source"], model["erasure"]["scale"])
    try:
        yield pipe
    finally:
        unload_erasure(pipe)


def _parts(source: str) -> list[str]:
    """What is applied together: ``A+B`` is two erasures, unless there is such a file or folder."""
    return [source] if Path(source).exists() else source.split("+")


def _load(pipe, source: str, scale: float) -> None:
    parts = _parts(source)
    for part in parts:  # by their sources where there are several, since two may be of one concept
        load_erasure(pipe, part, scale=scale, name=part if len(parts) > 1 else None)


def _told(erasures: list[dict]) -> dict:
    """One erasure as it is; several as one, with all in ``parts``: what they agree in, and sums of what they cost."""
    if len(erasures) == 1:
        return erasures[0]
    told: dict = {}
    for key in erasures[0]:
        values = [one[key] for one in erasures]
        if key in ("seconds", "bytes", "weights"):
            told[key] = None if None in values else sum(values)
        elif key in ("name", "source", "digest", "concept"):
            told[key] = " + ".join(map(str, values))
        else:
            told[key] = values[0] if all(value == values[0] for value in values) else None
    return told | {"parts": erasures}


def _name(source: str) -> str:
    """A short name for an erasure, which also names its folder of pictures."""
    if len(_parts(source)) > 1:
        return "+".join(map(_name, _parts(source)))
    path = Path(source)
    return (
        (path.parent if path.name in (FILE_NAME, ADAPTER_NAME) else path).absolute().name.removesuffix(".safetensors")
    )


def _cost(source: Path) -> dict:
    """What the erasure took, as far as its run folder tells: ``seconds`` of its mask and training, ``bytes`` of its
    file.
    """
    folder = source.parent if source.suffix == ".safetensors" else source
    files = [source] if source.suffix == ".safetensors" else [folder / FILE_NAME, folder / ADAPTER_NAME]
    file = next((file for file in files if file.is_file()), None)
    try:
        seconds = read_json(folder / "config.json").get("seconds")
    except (OSError, ValueError, AttributeError):  # a file alone, or one on the hub: it tells nothing, and need not
        seconds = None
    return {"seconds": seconds, "bytes": file.stat().st_size if file else None}

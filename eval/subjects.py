"""What is measured: a base model, and the same with erasures applied."""

from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from salun_diffusion import list_erasures, load_erasure, unload_erasure
from salun_diffusion.erasures.locate import ADAPTER_NAME, FILE_NAME
from salun_diffusion.errors import SalunError
from salun_diffusion.files import read_json
from salun_diffusion.loader import identity, idle_erasures
from salun_diffusion.models.base import Model


def as_drawn(base_model: Model) -> dict:
    """What ``settings`` says of the model itself."""
    return {
        "scheduler": type(base_model.pipe.scheduler).__name__,
        "dtype": str(base_model.dtype).removeprefix("torch."),
        "device": str(base_model.device),
        "safety_checker": False,
    }


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

"""Draw prompts into a folder, each from its own seed; what is there already is not drawn again.

Every picture's file carries the key of all that made it: model, erasures, prompt, seed, guidance, size, steps, sampler.
One with another key, one cut short, or none at all is drawn anew: a killed run goes on where it was, and nothing stale
is ever counted. Under ``accelerate launch`` the processes share the prompts.
"""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from salun_diffusion.errors import SalunError
from salun_diffusion.files import key_of, make_folder, replacing
from salun_diffusion.loader import identity
from salun_diffusion.models.base import Model
from salun_diffusion.models.load import sampler
from salun_diffusion.process import place

from ..results import KEY


@dataclass(frozen=True)
class Request:
    """One picture to draw. ``name`` is its file's, without the ending; ``height`` and ``width`` in pixels, None for the
    model's own size.
    """

    name: str
    prompt: str
    seed: int
    guidance_scale: float
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Drawn:
    """``paths`` and ``keys`` in the order of the requests; ``count`` of them were drawn now, in ``seconds``, by so many
    ``processes``.
    """

    paths: list[Path]
    keys: list[str]
    count: int
    seconds: float
    processes: int

    def told(self) -> dict:
        """What ``results.json`` says of the drawing, as ``generation``: ``images`` drawn now (the others were there
        already), ``seconds`` for them, ``images_per_second`` (null for none), and ``processes`` that shared them.
        """
        rate = round(self.count / self.seconds, 3) if self.count else None
        told = {"images": self.count, "seconds": round(self.seconds, 2), "images_per_second": rate}
        return told | {"processes": self.processes}


def draw(
    model: Model,
    requests: list[Request],
    folder: Path,
    num_inference_steps: int,
    batch_size: int,
    title: str,
    black: bool = False,
    trained: dict | None = None,
) -> Drawn:
    """Draw ``requests`` into ``folder``, as PNG files; with ``black``, a wholly black picture is one like any other.

    ``trained`` says, for the pictures' keys, what else than base model and erasures has made the weights.

    Raises:
        SalunError: two requests of one name, or a picture that is not finite, or wholly black without ``black``.
    """
    twice = [name for name, count in Counter(request.name for request in requests).items() if count > 1]
    if twice:
        raise SalunError(f"Two prompts are called {twice[0]}: give each its own name.")
    make_folder(folder)
    state, key = place(), _model_key(model, num_inference_steps, trained)
    mine = requests[state.process_index :: state.num_processes]
    missing = undrawn(model, mine, folder, num_inference_steps, trained)
    # alone on a CPU, a picture passes through other matrix routines than in company; over many steps their rounding
    # can grow to several levels of 255, so it is given company
    size_drawn = max(batch_size, 2) if model.pipe.device.type == "cpu" else batch_size
    begin = time.perf_counter()
    bar = tqdm(
        total=len(mine), initial=len(mine) - len(missing), desc=title, unit="image", disable=not state.is_main_process
    )
    with bar:
        for (guidance_scale, size), part in groupby(sorted(missing, key=_alike), _alike):
            part = list(part)
            for start in range(0, len(part), batch_size):
                now = part[start : start + batch_size]
                # filled up with repeats: rounding depends on a batch's size, and must not on what happens to be missing
                full = (now * size_drawn)[:size_drawn]
                pixels = model.draw(
                    full,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    batch_size=size_drawn,
                    output_type="np",
                    size=size or None,
                )
                bar.update(len(now))
                for request, values in zip(now, pixels[: len(now)], strict=True):
                    path = _path(folder, request)
                    save(to_picture(values, str(path), black), path, _key(key, request))
    count = sum(gather_object([len(missing)]))  # waits for every process
    paths = [_path(folder, request) for request in requests]
    return Drawn(
        paths, [_key(key, request) for request in requests], count, time.perf_counter() - begin, state.num_processes
    )


def undrawn(
    model: Model, requests: list[Request], folder: Path, num_inference_steps: int, trained: dict | None = None
) -> list[Request]:
    """Those of ``requests`` whose picture is not in ``folder``, as :func:`draw` would draw it."""
    key = _model_key(model, num_inference_steps, trained)
    return [request for request in requests if key_in(_path(folder, request)) != _key(key, request)]


def to_picture(pixels: np.ndarray, name: str, black: bool = False) -> Image.Image:
    """Float pixels ``(height, width, 3)`` in 0…1 → an RGB picture.

    Raises:
        SalunError: NaN, infinity, or all black unless ``black``; an unchecked one would be cast to something
            that looks harmless.
    """
    if not np.isfinite(pixels).all():
        raise SalunError(f"{name} holds NaN or infinite pixels: the model is broken, so nothing was measured.")
    if not black and not pixels.any():
        raise SalunError(f"{name} is wholly black, as after an overflow or a safety checker, so nothing was measured.")
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _alike(request: Request) -> tuple[float, tuple[int, ...]]:
    """What the pictures of one batch must have in common."""
    return request.guidance_scale, (request.height, request.width) if request.height else ()


def _path(folder: Path, request: Request) -> Path:
    return folder / f"{request.name}.png"


def _model_key(model: Model, num_inference_steps: int, trained: dict | None) -> dict:
    return ({"trained": trained} if trained else {}) | {
        "model": identity(model),
        **sampler(model.pipe),
        "num_inference_steps": num_inference_steps,
        "dtype": str(model.dtype),
    }


def _key(model: dict, request: Request) -> str:
    return key_of(model | asdict(request), 32)


def key_in(path: Path) -> str | None:
    """The key that a whole, readable picture file carries; None for any other, or none."""
    try:
        with Image.open(path) as image:
            image.load()  # a file cut short has its key too, but not all its pixels
            return image.info.get(KEY)
    except (OSError, SyntaxError, ValueError):
        return None


def save(picture: Image.Image, path: Path, key: str) -> None:
    """Write a picture's file, with the hash of all that made it inside."""
    about = PngImagePlugin.PngInfo()
    about.add_text(KEY, key)
    with replacing(path) as file:
        picture.save(file, "PNG", pnginfo=about)

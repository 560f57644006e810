"""Unlearning accuracy and retained accuracy: the same prompts and noise for every model, judged by one classifier.

``metrics.json`` (``format`` "salun-diffusion accuracy 1") holds:

- ``protocol``: what the numbers mean, in one line; quote it wherever they are quoted.
- ``concept``: ``name``, ``slot`` (its kind), ``value`` (the label that must not appear), ``anchor``.
- ``base``: ``source`` and ``revision``; ``classifier``: ``source``, ``sha256`` of its weights file, ``questions``.
- ``settings``: ``num_forget_images``, ``num_retain_images``, ``num_inference_steps``, ``guidance_scale``,
  ``batch_size``, ``seed``, ``scheduler`` (class name), ``dtype``, ``device``, ``safety_checker`` (always false).
- ``versions``: python, torch, diffusers, transformers.
- ``models``: the base model, the main erasure, then the controls, each with ``name``, ``role`` ("base", "erasure",
  "control"), ``source``, ``digest`` (of the pipeline as measured), ``erasure`` (as ``list_erasures`` tells of it:
  concept, method, density, weights, digest …; null for the base), ``ua``, ``retained`` (by question: object, style,
  background, count, left_right), ``drawn_as`` (label → answers where the concept was asked for), ``retained_by_label``
  (for each other word of the concept's kind), ``flipped`` (retain pictures whose objects were right with the base and
  are not now, ``lost``, and the reverse, ``gained``), ``generation``: ``images``, ``seconds``, ``images_per_second``
  (drawing alone).

A score is ``{"count", "n", "percent", "low", "high"}``, the last three in percent, ``low`` and ``high`` the Wilson 95%
interval. ``samples.jsonl`` holds a line for each picture; its form is in the docstring of :mod:`eval.metrics`, and
``seed`` there is the one of the starting noise.
"""

import json
import platform
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from salun_diffusion import list_erasures, load_erasure, unload_erasure
from salun_diffusion.concepts import Row, find_concept
from salun_diffusion.errors import SalunError
from salun_diffusion.files import write_json
from salun_diffusion.models import denoiser, digest, load_pipeline, resolve
from salun_diffusion.sampling import sample

from .judge import Judge
from .metrics import FORMAT, asked, flipped, scores

PROTOCOL = (
    "accuracy/1: same prompts and starting noise for every model; the classifier's likeliest answer to each question; "
    "a forget picture is forgotten if the concept is the answer to no question of its kind; objects are right if every "
    "named one is seen, on whichever side, and left/right if a pair's are on their sides; Wilson 95% intervals"
)


def accuracy(
    pretrained_model_name_or_path: str,
    concept: str,
    erasure: list[str],
    output_dir: Path,
    *,
    revision: str | None = None,
    anchor: str | None = None,
    num_forget_images: int = 216,
    num_retain_images: int = 432,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    classifier: str | None = None,
    seed: int = 0,
) -> dict:
    """Measure the base model and each erasure, write ``output_dir``'s files, print a table, return the metrics.

    Raises:
        SalunError: an unusable base, concept, erasure or classifier; an erasure that changes nothing; a picture that is
            not finite, wholly black, or cannot be classified (named, and no metrics are written).
    """
    for library in (diffusers, transformers):  # their bars are about loading; ours estimates the work itself
        library.utils.logging.disable_progress_bar()
    where, commit = resolve(pretrained_model_name_or_path, revision)
    folder = Path(where) if commit is None else None
    found = find_concept(concept, folder, anchor)
    rows = [("forget", row) for row in found.forget_rows(num_forget_images, seed)]
    rows += [("retain", row) for row in found.retain_rows(num_retain_images, seed)]
    judge = Judge(classifier or _default_classifier(folder))
    _check_rows(rows, found.value, judge)
    names = _names(erasure)

    pipe = load_pipeline(pretrained_model_name_or_path, commit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.to(device)
    judge.to(device)
    preset = found.settings
    how = {
        "num_inference_steps": num_inference_steps or preset.get("num_inference_steps", 50),
        "guidance_scale": preset.get("guidance_scale", 7.5) if guidance_scale is None else guidance_scale,
        "batch_size": batch_size or preset.get("sample_batch_size", 8),
    }

    models = _models(pipe, pretrained_model_name_or_path, erasure, names)

    output_dir.mkdir(parents=True, exist_ok=True)
    for stale in ("metrics.json", "samples.jsonl"):  # never beside pictures of another run
        (output_dir / stale).unlink(missing_ok=True)
    samples = []
    for model in models:
        if model["erasure"]:
            load_erasure(pipe, model["source"])
        judged, seconds = _draw(pipe, judge, rows, model["name"], output_dir, how)
        unload_erasure(pipe)
        samples += judged
        model |= scores(judged, found.value, found.slot) | {"flipped": flipped(samples[: len(rows)], judged)}
        images = len(judged)
        model["generation"] = {
            "images": images,
            "seconds": round(seconds, 2),
            "images_per_second": round(images / seconds, 3),
        }

    metrics = {
        "format": FORMAT,
        "protocol": PROTOCOL,
        "concept": {"name": found.name, "slot": found.slot, "value": found.value, "anchor": found.anchor},
        "base": {"source": pretrained_model_name_or_path, "revision": commit},
        "classifier": {
            "source": classifier or f"{pretrained_model_name_or_path}/judge",
            "sha256": judge.sha256,
            "questions": {q: list(a) for q, a in judge.questions.items()},
        },
        "settings": how
        | {
            "num_forget_images": num_forget_images,
            "num_retain_images": num_retain_images,
            "seed": seed,
            "scheduler": type(pipe.scheduler).__name__,
            "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
            "device": device,
            "safety_checker": False,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "models": models,
    }
    (output_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    write_json(output_dir / "metrics.json", metrics)  # last: where it stands, everything that it counts does
    print(table(metrics))
    return metrics


def table(metrics: dict) -> str:
    """The scores as aligned text, a model a line, in percent with their intervals."""
    questions = list(dict.fromkeys(question for model in metrics["models"] for question in model["retained"]))
    lines = [["", "UA", *questions]]
    for model in metrics["models"]:
        cells = [model["ua"], *(model["retained"].get(question) for question in questions)]
        shown = [f"{c['percent']:.1f} ({c['low']:.1f}-{c['high']:.1f})" if c else "-" for c in cells]
        lines.append([model["name"], *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def to_picture(pixels: np.ndarray, name: str) -> Image.Image:
    """Float pixels ``(height, width, 3)`` in 0…1 → an RGB picture.

    Raises:
        SalunError: NaN, infinity, or all black; an unchecked one would be cast to something that looks harmless.
    """
    if not np.isfinite(pixels).all():
        raise SalunError(f"{name} holds NaN or infinite pixels: the model is broken, so nothing was measured.")
    if not pixels.any():
        raise SalunError(f"{name} is wholly black, as after an overflow or a safety checker, so nothing was measured.")
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _default_classifier(folder: Path | None) -> str:
    if folder and (folder / "judge").is_dir():
        return str(folder / "judge")
    raise SalunError(
        "This base model brings no classifier (no judge/ in its folder): name one with --classifier, a folder or hub "
        "id of a transformers image classifier that knows the concept."
    )


def _check_rows(rows: list[tuple[str, Row]], value: str, judge: Judge) -> None:
    """Everything that would only show after the drawing: prompts that cannot be judged, labels the classifier lacks."""
    for kind, row in rows:
        if not row.expect or kind == "forget" and not asked({"expect": row.expect}, value):
            raise SalunError(f"The prompt '{row.prompt}' says nothing that a classifier could check '{value}' by.")
    judge.check(pair for _, row in rows for pair in row.expect.items())


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


def _models(pipe, base: str, erasures: list[str], names: list[str]) -> list[dict]:
    """The base model and the erasures as ``metrics.json`` introduces them. Each erasure is loaded and unloaded once, so
    that a wrong path, a wrong base or a delta without effect is found out before the drawing and not after."""
    models = [{"name": "base", "role": "base", "source": base, "digest": digest(pipe), "erasure": None}]
    for name, source in zip(names, erasures, strict=True):
        load_erasure(pipe, source)
        role = "erasure" if len(models) == 1 else "control"
        models.append(
            {"name": name, "role": role, "source": source, "digest": digest(pipe), "erasure": list_erasures(pipe)[0]}
        )
        unload_erasure(pipe)
        if models[-1]["digest"] == models[0]["digest"]:
            raise SalunError(f"{source} leaves the base model as it is: there is nothing to measure in it.")
    return models


def _draw(
    pipe, judge: Judge, rows: list[tuple[str, Row]], name: str, output_dir: Path, how: dict
) -> tuple[list[dict], float]:
    """Draw, keep and judge every row with one model: the samples, and the seconds that drawing took."""
    (output_dir / "pictures" / name).mkdir(parents=True, exist_ok=True)
    samples, seconds, step = [], 0.0, how["batch_size"]
    with tqdm(total=len(rows), desc=name, unit="image") as bar:
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            begin = time.perf_counter()
            drawn = sample(pipe, [row for _, row in part], output_type="np", bar=bar, **how)
            seconds += time.perf_counter() - begin
            paths = [f"pictures/{name}/{kind}-{start + i:04d}.png" for i, (kind, _) in enumerate(part)]
            pictures = [to_picture(pixels, path) for pixels, path in zip(drawn, paths, strict=True)]
            for picture, path in zip(pictures, paths, strict=True):
                picture.save(output_dir / path)
            for (kind, row), path, answers in zip(part, paths, judge(pictures, paths), strict=True):
                samples.append({
                    "model": name, "set": kind, "prompt": row.prompt, "seed": row.seed, "picture": path,
                    "expect": row.expect, "predicted": answers,
                })  # fmt: skip
    return samples, seconds

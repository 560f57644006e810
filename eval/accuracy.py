"""Unlearning accuracy and retained accuracy: the same prompts and noise for every model, judged by one classifier.

``results.json`` (``format`` "salun-diffusion accuracy 1"; what all have in common is in :mod:`eval.results`) holds:

- ``concept``: ``name``, ``slot`` (its kind), ``value`` (the label that must not appear), ``anchor``.
- ``base``: ``source`` and ``revision``; ``classifier``: ``source``, ``sha256`` of its weights file, ``questions``.
- ``settings``: ``num_forget_images``, ``num_retain_images``, ``num_inference_steps``, ``guidance_scale``,
  ``batch_size``, ``seed``, ``scheduler`` (class name), ``dtype``, ``device``, ``safety_checker`` (always false).
- ``models``: the base model, the main erasure, then the controls, each also with ``ua``, ``retained`` (by question:
  object, style, background, count, left_right), ``ira`` and ``cra`` (in-domain and cross-domain retained accuracy: of
  these, the concept's own kind, and the other one of object and style), ``drawn_as`` (label → answers where the concept
  was asked for), ``retained_by_label`` (for each other word of the concept's kind), ``flipped`` (retain pictures whose
  objects were right with the base and are not now, ``lost``, and the reverse, ``gained``), ``generation``: ``images``
  drawn now (the others were there already), ``seconds``, ``images_per_second`` (drawing alone; null for none).

``samples.jsonl`` holds a line for each picture; its form is in the docstring of :mod:`eval.metrics`, and
``seed`` there is the one of the starting noise.
"""

from pathlib import Path

import diffusers
import transformers
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from salun_diffusion import load_erasure, unload_erasure
from salun_diffusion.concepts import Row, find_concept
from salun_diffusion.errors import SalunError
from salun_diffusion.models import load_pipeline, resolve
from salun_diffusion.session import spread_threads

from .generation import Request, draw
from .judge import Judge
from .metrics import FORMAT, asked, flipped, scores
from .results import VERSIONS, aligned, as_drawn, begin, introduce, write

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
    """Measure the base model and each erasure, write ``output_dir``'s files, print a table, return the results.

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
    state = PartialState()
    spread_threads(state)
    pipe = load_pipeline(pretrained_model_name_or_path, commit).to(state.device)
    judge.to(state.device)
    preset = found.settings
    how = {
        "num_inference_steps": num_inference_steps or preset.get("num_inference_steps", 50),
        "guidance_scale": preset.get("guidance_scale", 7.5) if guidance_scale is None else guidance_scale,
        "batch_size": batch_size or preset.get("sample_batch_size", 8),
    }

    models = introduce(pipe, pretrained_model_name_or_path, erasure)
    if state.is_main_process:
        begin(output_dir, FORMAT)
    samples = []
    for model in models:
        if model["erasure"]:
            load_erasure(pipe, model["source"])
        requests = [
            Request(f"{kind}-{i:04d}", row.prompt, row.seed, how["guidance_scale"])
            for i, (kind, row) in enumerate(rows)
        ]
        folder = output_dir / "pictures" / model["name"]
        drawn = draw(pipe, requests, folder, how["num_inference_steps"], how["batch_size"], model["name"])
        unload_erasure(pipe)
        if not state.is_main_process:
            continue
        judged = _judge(judge, rows, drawn.paths, model["name"], output_dir, how["batch_size"])
        samples += judged
        model |= scores(judged, found.value, found.slot) | {"flipped": flipped(samples[: len(rows)], judged)}
        model["generation"] = {
            "images": drawn.count,
            "seconds": round(drawn.seconds, 2),
            "images_per_second": round(drawn.count / drawn.seconds, 3) if drawn.count else None,
        }

    results = {
        "format": FORMAT,
        "protocol": PROTOCOL,
        "n": len(rows),
        "concept": {"name": found.name, "slot": found.slot, "value": found.value, "anchor": found.anchor},
        "base": {"source": pretrained_model_name_or_path, "revision": commit},
        "classifier": {
            "source": classifier or f"{pretrained_model_name_or_path}/judge",
            "sha256": judge.sha256,
            "questions": {q: list(a) for q, a in judge.questions.items()},
        },
        "settings": how
        | as_drawn(pipe)
        | {
            "num_forget_images": num_forget_images,
            "num_retain_images": num_retain_images,
            "seed": seed,
        },
        "versions": VERSIONS,
        "models": models,
    }
    if state.is_main_process:
        write(output_dir, results, samples)
        print(table(results))
    return results


def table(metrics: dict) -> str:
    """The scores as aligned text, a model a line, in percent with their intervals."""
    questions = list(dict.fromkeys(question for model in metrics["models"] for question in model["retained"]))
    lines = [["", "UA", *questions]]
    for model in metrics["models"]:
        cells = [model["ua"], *(model["retained"].get(question) for question in questions)]
        shown = [f"{c['percent']:.1f} ({c['low']:.1f}-{c['high']:.1f})" if c else "-" for c in cells]
        lines.append([model["name"], *shown])
    return aligned(lines)


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


def _judge(
    judge: Judge, rows: list[tuple[str, Row]], paths: list[Path], name: str, output_dir: Path, batch_size: int
) -> list[dict]:
    """The lines of ``samples.jsonl`` for the pictures of one model."""
    samples = []
    with tqdm(total=len(rows), desc=f"{name}: judging", unit="image") as bar:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            shown = [str(path.relative_to(output_dir)) for path in paths[start : start + batch_size]]
            pictures = [Image.open(output_dir / path).convert("RGB") for path in shown]
            for (kind, row), path, answers in zip(part, shown, judge(pictures, shown), strict=True):
                samples.append({
                    "model": name, "set": kind, "prompt": row.prompt, "seed": row.seed, "picture": path,
                    "expect": row.expect, "predicted": answers,
                })  # fmt: skip
            bar.update(len(part))
    return samples

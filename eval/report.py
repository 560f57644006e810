"""One self-contained page, ``report.html``, from what a run folder holds and from nothing else; and one picture of the
same, ``before-after.png``, for where a page cannot go.

It needs ``config.json`` (erase_concept.py), ``results.json``, ``samples.jsonl`` and the pictures these name
(``python -m eval accuracy``); ``training.jsonl`` and ``mask.safetensors`` each add a chart.
"""

import base64
import io
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from salun_diffusion.errors import SalunError
from salun_diffusion.masks import describe, load_masks

from . import charts
from .metrics import FORMAT, OBJECT_QUESTIONS, answered, asked, forgotten

ROWS = 6  # pictures' rows in each group of the grid
NEIGHBOURS = 4  # words beside the anchor that count as the concept's neighbours
WIDEST = 256  # pixels: larger pictures are scaled down for the page
METHODS = {"salun": "SalUn"}
QUESTIONS = {
    "object": ("Objects", "every object that the prompt names is there, on whichever side"),
    "style": ("Style", "drawn in the style that the prompt names"),
    "background": ("Background", "on the background colour that the prompt names"),
    "count": ("Count", "as many objects as the prompt asks for"),
    "left_right": ("Left and right", "prompts with two different objects: each on its own side"),
}


def report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page and return its path.

    Raises:
        SalunError: a file that is missing, damaged, or belongs to another run.
    """
    config = _json(run_dir / "config.json", "erase_concept.py")
    metrics = _json(run_dir / "results.json", "python -m eval accuracy")
    if metrics.get("format") != FORMAT:
        raise SalunError(
            f"{run_dir / 'results.json'} is not of the form '{FORMAT}': run `python -m eval accuracy` again."
        )
    erased = [config.get("concept"), *config.get("settings", {}).get("concept", [])]
    if metrics["concept"]["name"] not in erased:
        raise SalunError(
            f"{run_dir} erased '{config['concept']}' but its results.json is about '{metrics['concept']['name']}': "
            "run `python -m eval accuracy` for this run."
        )
    samples = by_model(_lines(run_dir / "samples.jsonl", "python -m eval accuracy"), metrics)
    training = run_dir / "training.jsonl"
    mask = run_dir / "mask.safetensors"
    erasure = run_dir / "erasure.safetensors"

    titles = name_models(metrics["models"])
    neighbours = find_neighbours(metrics)
    chosen = choose(samples[0], metrics["concept"]["value"], metrics["concept"]["slot"], list(neighbours))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["settings"] = _settings
    page = environment.get_template("report.html.j2").render(
        concept=metrics["concept"],
        metrics=metrics,
        config=config,
        models=[model | {"title": title} for model, title in zip(metrics["models"], titles, strict=True)],
        questions={key: text for key, text in QUESTIONS.items() if key in metrics["models"][0]["retained"]},
        neighbours=neighbours,
        groups=_grid(run_dir, samples, metrics, chosen),
        loss_chart=Markup(charts.losses(_lines(training, "erase_concept.py"))) if training.exists() else None,
        saliency_chart=Markup(charts.saliency(row[:3] for row in describe(load_masks(mask)[0])))
        if mask.exists()
        else None,
        size=erasure.stat().st_size if erasure.exists() else None,
    )
    some = [*chosen["forget"][:5], *chosen["near"][:2], *chosen["far"][:2]]
    pictures = [(samples[0][i]["prompt"], [_open(run_dir / part[i]["picture"]) for part in samples]) for i in some]
    charts.before_after(run_dir / "before-after.png", titles, pictures)
    output = output or run_dir / "report.html"
    output.write_text(page, encoding="utf-8")
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return output


def by_model(lines: list[dict], metrics: dict) -> list[list[dict]]:
    """The samples of each model of ``metrics``, in the order of the prompts.

    Raises:
        SalunError: unless every model has the same prompts and seeds, and as many as ``metrics`` counted.
    """
    samples = [[line for line in lines if line["model"] == model["name"]] for model in metrics["models"]]
    rows = [[(line["set"], line["prompt"], line["seed"]) for line in part] for part in samples]
    if any(row != rows[0] or len(row) != metrics["n"] for row in rows):
        raise SalunError("samples.jsonl and results.json are of different runs: run `python -m eval accuracy` again.")
    return samples


def name_models(models: list[dict]) -> list[str]:
    """What the page calls each model: its method, or the name of its run where that does not tell two apart."""
    titles = []
    for model in models:
        about = model["erasure"] or {}
        method = METHODS.get(about.get("method", ""), about.get("method") or model["name"])
        titles.append("Base model" if model["role"] == "base" else "No mask" if about.get("density") == 1 else method)
    return [t if titles.count(t) == 1 else m["name"] for t, m in zip(titles, models, strict=True)]


def find_neighbours(metrics: dict) -> dict[str, float | None]:
    """The words closest to the concept → by how many points their retained accuracy fell: the anchor, then those that
    fell the most (at most a third of all words, so that there are unrelated ones too)."""
    base, main = (model["retained_by_label"] for model in metrics["models"][:2])
    fell = {label: round(base[label]["percent"] - main[label]["percent"], 1) for label in base if label in main}
    anchor = metrics["concept"]["anchor"]
    worst = sorted(
        (label for label in fell if label != anchor and fell[label] > 0), key=lambda label: (-fell[label], label)
    )
    return {label: fell.get(label) for label in (anchor, *worst[: min(NEIGHBOURS, len(fell) // 3)])}


def choose(rows: list[dict], value: str, slot: str, neighbours: list[str]) -> dict[str, list[int]]:
    """Which rows the grid shows, as indices: by their prompts and positions alone, so that no picture is preferred."""

    def words(row: dict) -> set[str]:
        questions = (slot,) if slot in row["expect"] else OBJECT_QUESTIONS
        return {row["expect"][question] for question in questions if question in row["expect"]}

    forget = [i for i, row in enumerate(rows) if row["set"] == "forget"]
    retain = [i for i, row in enumerate(rows) if row["set"] == "retain"]
    near: list[int] = []
    queues = [[i for i in retain if word in words(rows[i])] for word in neighbours]
    for i in (queue[turn] for turn in range(ROWS) for queue in queues if turn < len(queue)):
        if i not in near:  # one row for each word, then a second for each; a pair of two neighbours is in both queues
            near.append(i)
    far = [i for i in retain if not words(rows[i]) & set(neighbours)]
    return {"forget": _spread(forget, rows), "near": near[:ROWS], "far": _spread(far, rows)}


def _spread(indices: list[int], rows: list[dict]) -> list[int]:
    """``ROWS`` of the indices, evenly spaced, no prompt twice."""
    distinct = list({rows[i]["prompt"]: i for i in reversed(indices)}.values())[::-1]
    count = min(ROWS, len(distinct))
    return [distinct[k * len(distinct) // count] for k in range(count)]


def verdict(sample: dict, value: str, slot: str, erased: bool) -> dict:
    """What the classifier said of a picture: ``{"mark", "said"}``, mark one of right, wrong, forgotten, still there."""
    expect, predicted = sample["expect"], sample["predicted"]
    things = [question for question in expect if question in OBJECT_QUESTIONS]
    shown = things if slot in OBJECT_QUESTIONS or slot not in expect else [slot, *things]
    if sample["set"] == "forget":
        gone = forgotten(sample, value)
        shown = [*asked(sample, value), *(question for question in shown if question not in asked(sample, value))]
        mark = ("forgotten" if gone else "still there") if erased else ("wrong" if gone else "right")
    else:
        missed = [question for question in expect if not answered(sample, question)]
        shown = [*shown, *(question for question in missed if question not in shown)]
        mark = "wrong" if missed else "right"
    said = list(dict.fromkeys(predicted[q]["label"] for q in (sorted(shown) if set(shown) <= set(things) else shown)))
    return {"mark": mark, "said": " + ".join(said)}


def _grid(run_dir: Path, samples: list[list[dict]], metrics: dict, chosen: dict) -> dict[str, list[dict]]:
    value, slot = metrics["concept"]["value"], metrics["concept"]["slot"]
    groups = {}
    for name, indices in chosen.items():
        groups[name] = [
            {
                "prompt": samples[0][index]["prompt"],
                "seed": samples[0][index]["seed"],
                "cells": [
                    _picture(run_dir / part[index]["picture"])
                    | verdict(part[index], value, slot, erased=part is not samples[0])
                    for part in samples
                ],
            }
            for index in indices
        ]
    return groups


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise SalunError(f"The picture {path} cannot be read ({error}): run `python -m eval accuracy` again.") from None


def _picture(path: Path) -> dict:
    """``{"src", "small"}``: the picture as a data URL, and whether its pixels should be drawn as squares."""
    picture = _open(path)
    picture.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return {
        "src": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "small": picture.width <= 96,
    }


def _settings(config: dict) -> dict[str, str]:
    """Nested settings as name → text: config.json repeats some at two levels, and they are shown once."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        for name, inner in (_settings(value) if isinstance(value, dict) else {key: value}).items():
            flat.setdefault(name, inner if isinstance(inner, str) else json.dumps(inner))
    return flat


def _read(path: Path, maker: str) -> str:
    if not path.is_file():
        raise SalunError(f"{path} is missing: the report needs a run folder, and {maker} writes this file into it.")
    return path.read_text(encoding="utf-8")


def _json(path: Path, maker: str) -> dict:
    try:
        return json.loads(_read(path, maker))
    except json.JSONDecodeError as error:
        raise SalunError(f"{path} is damaged ({error}): run {maker} again.") from None


def _lines(path: Path, maker: str) -> list[dict]:
    lines = []
    for number, line in enumerate(_read(path, maker).splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            raise SalunError(f"{path}, line {number}, is damaged: run {maker} again.") from None
    if not lines:
        raise SalunError(f"{path} is empty: run {maker} again.")
    return lines

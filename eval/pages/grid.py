"""Which pictures a page shows, and what it says of them: for the report of one run and a comparison of several."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from salun_diffusion.methods import METHODS, find_method

from ..judges.metrics import OBJECT_QUESTIONS, answered, asked, forgotten
from ..results import picture
from ..subjects import RETRAINED

ROWS = 6  # pictures' rows in each group of the grid
CONTROLS = {RETRAINED: "Retrained without it"}
WIDEST = 256  # pixels: larger pictures are scaled down for the page
Drawn = list[tuple[Path, list[dict]]]  # for each model, the base model first: its folder and its samples, in one order


def name_models(models: list[dict]) -> list[str]:
    """What a page calls each model: its method, with its density and scale where that tells two apart, or else the name
    of its run.
    """

    def titles(model: dict) -> list[str]:
        about = model["erasure"]
        if not about:
            return ["Base model" if model["role"] == "base" else CONTROLS.get(model["name"], model["name"])]
        method = about.get("method") or model["name"]
        found = find_method(method) if method in METHODS else None
        # density 1 is worth a word where the method would have had a mask
        density = about.get("density") if not found or found.mask == "saliency" else None
        method, scale = found.title if found else method, about.get("scale", 1)
        short = "No mask" if density == 1 else method
        scaled = f", scale {scale:g}" if scale != 1 else ""
        longer = f"{method}, no mask" if density == 1 else f"{method}, density {density:g}" if density else method
        return [short + scaled, longer + scaled, model["name"]]

    options = [titles(model) for model in models]
    for level in range(2):
        now = [option[min(level, len(option) - 1)] for option in options]
        options = [option if now.count(title) > 1 else [title] for option, title in zip(options, now, strict=True)]
    return [option[-1] for option in options]


def spread(indices: list[int], rows: list[dict], count: int = ROWS) -> list[int]:
    """``count`` of the indices, evenly spaced, no prompt twice unless there are too few of them: picked before any
    picture is looked at.
    """
    distinct = list({rows[i]["prompt"]: i for i in reversed(indices)}.values())[::-1]
    distinct = distinct if len(distinct) >= count else list(indices)
    count = min(count, len(distinct))
    return [distinct[k * len(distinct) // count] for k in range(count)]


def verdict(sample: dict, value: str, slot: str, erased: bool) -> dict:
    """What the classifier said of a picture: ``{"mark", "said"}``, mark one of right, wrong, forgotten, still there."""
    expect, predicted = sample["expect"], sample["predicted"]
    things = [question for question in expect if question in OBJECT_QUESTIONS]
    shown = things if slot in OBJECT_QUESTIONS or slot not in expect else [slot, *things]
    if sample["set"] == "forget" or "won" in sample:
        gone = not sample["won"] if "won" in sample else forgotten(sample, value)
        shown = [*asked(sample, value), *(question for question in shown if question not in asked(sample, value))]
        mark = ("forgotten" if gone else "still there") if erased else ("wrong" if gone else "right")
    else:
        missed = [question for question in expect if not answered(sample, question)]
        shown = [*shown, *(question for question in missed if question not in shown)]
        mark = "wrong" if missed else "right"
    said = list(
        dict.fromkeys(
            predicted[q]["label"]
            for q in (sorted(shown, key=OBJECT_QUESTIONS.index) if set(shown) <= set(things) else shown)
        )
    )
    return {"mark": mark, "said": " + ".join(said)}


def as_data(picture: Image.Image) -> dict:
    """``{"src", "small"}``: the picture as a data URL, and whether its pixels should be drawn as squares."""
    picture = picture.copy()
    picture.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return {
        "src": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "small": picture.width <= 96,
    }


def picture_rows(drawn: Drawn, indices: list[int], concept: dict) -> list[dict]:
    """For the page: the prompts at ``indices``, each with the picture of every model and what was seen in it."""
    first = drawn[0][1]
    return [
        {
            "prompt": first[i]["prompt"],
            "seed": first[i]["seed"],
            "cells": [
                as_data(picture(folder, lines[i])) | verdict(lines[i], concept["value"], concept["slot"], number > 0)
                for number, (folder, lines) in enumerate(drawn)
            ],
        }
        for i in indices
    ]


def columns(drawn: Drawn, indices: list[int]) -> list[tuple[str, list[Image.Image]]]:
    """For a picture: the prompts at ``indices``, each with the picture of every model."""
    return [(drawn[0][1][i]["prompt"], [picture(folder, lines[i]) for folder, lines in drawn]) for i in indices]


def render(template: str, **values) -> str:
    """A page from a template of this folder; every value that it names must be there."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)

"""What results of ``python -m eval`` say of one erasure: its scores beside the base model's, and some pictures of both.

Nothing here knows which measures there are: a score is whatever looks like one in a model's row of ``results.json``, a
share with its interval (``percent``, ``low``, ``high``, ``n``), a mean with it (``mean`` …) or a ``value``.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..errors import SalunError
from ..files import read_json

FORMAT = "salun-diffusion "
DETAILS = ("retained_by_label", "ua_by_concept", "erasure", "generation", "detection")  # too fine for a card
KINDS = ("percent", "mean", "value")
SIDE, PROMPTS, GAP = 128, 6, 4  # of the sheet: pixels of a picture's side, prompts of each set, pixels between


@dataclass(frozen=True)
class Score:
    """One number: ``name`` as its place in the results has it, ``low`` and ``high`` of its 95% interval (or None), and
    the base model's beside it (None where it has none).
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    base: "Score | None" = None

    def __str__(self):
        interval = f" ({self.low:g}–{self.high:g})" if self.low is not None and self.high is not None else ""
        return f"{self.value:g}{interval}"


@dataclass(frozen=True)
class Measured:
    """The results of one folder, as far as one erasure goes; ``title`` is the measure with what was unusual: the
    erasure's scale, or a LoRA that all models wore.
    """

    folder: Path
    measure: str
    title: str
    protocol: str
    scores: list[Score]
    names: tuple[str, str] | None  # the models' names, base and erasure, where both were drawn


def read_results(folder: Path, digest: str) -> Measured:
    """The scores in ``folder`` of the erasure whose digest is ``digest``.

    Raises:
        SalunError: no results, damaged ones, or none of this erasure alone.
    """
    path = folder / "results.json" if folder.is_dir() else folder
    try:
        found = read_json(path)
        if not found["format"].startswith(FORMAT):
            raise ValueError
        base = next((model for model in found["models"] if model["role"] == "base"), None)
        of_it = (m for m in found["models"] if m["erasure"] and m["erasure"]["digest"] == digest)
        if erased := next(of_it, None):
            beside = {score.name: score for score in _scores(base or {})}
            scores = [replace(score, base=beside.get(score.name)) for score in _scores(erased)]
            names = (base["name"], erased["name"]) if base else None
            measure, protocol = found["format"].removeprefix(FORMAT).split()[0], str(found.get("protocol", ""))
            scale, lora = erased["erasure"]["scale"], (found.get("settings") or {}).get("lora")
            title = measure + (f", at scale {scale:g}" if scale != 1 else "")
            title += f", under the LoRA {Path(lora['source']).name} at {lora['scale']:g}" if lora else ""
            return Measured(path.parent, measure, title, protocol, scores, names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise SalunError(
            f"{folder} holds no results of `python -m eval`, or damaged ones: give a folder that it wrote into."
        ) from None
    raise SalunError(
        f"{folder} holds results of other erasures than this one (known by its digest, {digest[:12]}…): measure it by "
        "`python -m eval`, or leave these out."
    )


def _scores(model: dict, above: tuple[str, ...] = ()) -> list[Score]:
    found = []
    for key, value in model.items():
        if not isinstance(value, dict) or key in DETAILS:
            continue
        kind = next((kind for kind in KINDS if _is_number(value.get(kind))), None)
        if kind and "n" in value:
            low, high = (value[side] if _is_number(value.get(side)) else None for side in ("low", "high"))
            found.append(Score(" ".join((*above, key)).replace("_", " "), float(value[kind]), low, high, value["n"]))
        elif not kind:
            found += _scores(value, (*above, key))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sheet(measured: Measured) -> Image.Image | None:
    """Prompts as the base model draws them (above) and with the erasure (below): first some that ask for the concept,
    then some for all else, evenly spaced, picked before any is looked at. None where the results say nothing of such
    sets, as those of nudity do not.
    """
    if measured.names is None or not (measured.folder / "samples.jsonl").is_file():
        return None
    try:
        lines = (measured.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        of = [[row for row in rows if row["model"] == name] for name in measured.names]
        chosen = [i for kind in ("forget", "retain") for i in _spread(of[0], kind)]
        if not chosen:
            return None
        bar = 18
        picture = Image.new("RGB", (len(chosen) * (SIDE + GAP) - GAP, 2 * (SIDE + bar)), "white")
        draw = ImageDraw.Draw(picture)
        for down, (title, part) in enumerate(zip(("base model", "with the erasure"), of, strict=True)):
            draw.text((2, down * (SIDE + bar) + 3), title, fill="black")
            for across, i in enumerate(chosen):
                one = _open(measured.folder, part[i]["picture"]).resize((SIDE, SIDE))
                picture.paste(one, (across * (SIDE + GAP), down * (SIDE + bar) + bar))
        return picture
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, IndexError):
        raise SalunError(
            f"{measured.folder}: a picture, or samples.jsonl, is damaged or missing: measure again, or give "
            "--no_pictures."
        ) from None


def _spread(rows: list[dict], kind: str) -> list[int]:
    places = list({row["prompt"]: i for i, row in reversed([*enumerate(rows)]) if row.get("set") == kind}.values())[
        ::-1
    ]
    count = min(PROMPTS, len(places))
    return [places[k * len(places) // count] for k in range(count)]


def _open(folder: Path, shown: str) -> Image.Image:
    """The picture ``shown`` inside ``folder``: what lies elsewhere is nobody's to publish."""
    path = (folder / shown).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError
    with Image.open(path) as opened:
        return opened.convert("RGB")

"""One Markdown table from the ``results.json`` of several runs, printed or put between two markers of a document."""

import json
from pathlib import Path

from salun_diffusion.errors import SalunError

from .metrics import FORMAT
from .report import QUESTIONS, name_models

SAME = ("protocol", "base", "classifier", "settings", "versions")  # what the lines of one table have in common
START, END = "<!-- results -->", "<!-- end -->"


def table(files: list[Path], into: Path | None = None) -> str:
    """A line for each model of each file: UA and the retained accuracies in percent with 95% Wilson intervals.

    Raises:
        SalunError: a file that is no ``results.json``, files that were measured differently, or a document without the
            markers.
    """
    runs = [_read(path) for path in files]
    for path, run in zip(files[1:], runs[1:], strict=True):
        if differing := [part for part in SAME if run[part] != runs[0][part]]:
            raise SalunError(
                f"{files[0]} and {path} cannot share a table: they differ in {', '.join(differing)}. Give files of one "
                "protocol, or make a table of each."
            )
    questions = [q for q in QUESTIONS if any(q in run["models"][0]["retained"] for run in runs)]
    lines = [
        "| erased | model | UA ↑ | " + " | ".join(f"{QUESTIONS[q][0].lower()} ↑" for q in questions) + " |",
        "| --- " * (3 + len(questions)) + "|",
    ]
    for run in runs:
        for model, title in zip(run["models"], name_models(run["models"]), strict=True):
            cells = [model["ua"], *(model["retained"].get(question) for question in questions)]
            lines.append(f"| {run['concept']['name']} | {title} | {' | '.join(map(_cell, cells))} |")
    settings, versions = runs[0]["settings"], runs[0]["versions"]
    lines += [
        "",
        f"n = {settings['num_forget_images']} pictures of the concept and {settings['num_retain_images']} of all "
        f"else for each model, {settings['scheduler']} {settings['num_inference_steps']} steps, guidance "
        f"{settings['guidance_scale']:g}, seed {settings['seed']}, torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}; protocol `{runs[0]['protocol'].split(':')[0]}`. Made by "
        f"`python -m eval table {' '.join(path.as_posix() for path in files)}`.",
    ]
    text = "\n".join(lines)
    if into is None:
        print(text)
        return text
    document = into.read_text(encoding="utf-8")
    if START not in document or END not in document.split(START)[1]:
        raise SalunError(f"{into} has no place for a table: it needs the lines '{START}' and '{END}'.")
    before, rest = document.split(START, 1)
    into.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    return text


def _cell(score: dict | None) -> str:
    return f"{score['percent']:.1f} ({score['low']:.1f}–{score['high']:.1f})" if score else "–"


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SalunError(f"{path} cannot be read as results.json: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SalunError(f"{path} is not of the form '{FORMAT}': give the results.json that `eval accuracy` wrote.")
    return found

"""The parts of a run's page that other measures than ``accuracy`` fill, from their results in folders of the run."""

from pathlib import Path

from salun_diffusion.errors import SalunError

from ..measures import attack, composition, probe, relearn
from ..results import RESULTS, picture, read, read_samples
from ..subjects import RETRAINED
from .verdict import judge

RELEARNED = 4  # prompts whose pictures are shown at every checkpoint
WON = 6  # pictures of each attack


def beside(folder: Path, format: str, metrics: dict) -> dict | None:
    """The results in ``folder``, or None if there are none.

    Raises:
        SalunError: those of another command, or about another concept or erasure.
    """
    if not (folder / RESULTS).exists():
        return None
    found = read(folder)
    concept, digests = (
        found.get("concept") or {},
        [[model["digest"] for model in r["models"][1:2]] for r in (found, metrics)],
    )
    if found["format"] != format or concept.get("value") != metrics["concept"]["value"] or digests[0] != digests[1]:
        raise SalunError(
            f"{folder} holds other results than '{format}' about '{metrics['concept']['value']}' and this erasure: "
            "measure this run's into it, or move it elsewhere."
        )
    return found


def relearning(folder: Path, metrics: dict) -> dict | None:
    """What the page says of ``relearn``'s results, if there are any: the chart, and pictures of the first erasure."""
    from markupsafe import Markup

    from . import charts
    from .grid import as_data, name_models, spread, verdict

    if (found := beside(folder, relearn.FORMAT, metrics)) is None:
        return None
    main, value, slot = found["models"][1], found["concept"]["value"], found["concept"]["slot"]
    named = [model for model in found["models"] if relearn.is_subject(model, value)]
    titles = iter(name_models(named))
    titles = [next(titles) if model in named else f"{model['name']}: {model['learns']}" for model in found["models"]]
    samples = read_samples(folder, found)[main["name"]]
    by_step = [[line for line in samples if line["step"] == point["step"]] for point in main["curve"]]
    first, rows = by_step[0], []
    for i in spread([i for i, line in enumerate(first) if line["set"] == "forget"], first, RELEARNED):
        cells = [as_data(picture(folder, lines[i])) | verdict(lines[i], value, slot, True) for lines in by_step]
        rows.append({"prompt": first[i]["prompt"], "seed": first[i]["seed"], "cells": cells})
    chart = charts.relearning(found["models"], titles, [model not in named for model in found["models"]])
    return {
        "chart": Markup(chart), "protocol": found["protocol"], "rows": rows, "title": titles[1],
        "steps": [f"step {point['step']}" for point in main["curve"]],
        "table": [(title, model, relearn.scores(model)) for title, model in zip(titles, found["models"], strict=True)],
    }  # fmt: skip


def probing(folder: Path, metrics: dict) -> dict | None:
    """What the page says of ``probe``'s results, if there are any."""
    from markupsafe import Markup

    from . import charts
    from .grid import name_models

    if (found := beside(folder, probe.FORMAT, metrics)) is None:
        return None
    titles = name_models(found["models"])[1:]
    chart = charts.activations(found["layers"], found["models"][1:], titles)
    return {"chart": Markup(chart), "protocol": found["protocol"]}


def attacks(folder: Path, metrics: dict) -> dict | None:
    """What ``attack`` found of the first erasure, if there are results: its ``protocol``, a row for each attack, and
    the pictures that won, the first ones of each by the order of the prompts.
    """
    from .grid import as_data

    if (results := beside(folder, attack.FORMAT, metrics)) is None:
        return None
    base, about, rows = *results["models"][:2], []
    control = next((model for model in results["models"] if model["name"] == RETRAINED), None)
    lines = read_samples(folder, results)[about["name"]]
    for name, found in about["attacks"].items():
        won = [line for line in lines if line["set"] == name and line["won"]] if name != attack.PLAIN else []
        told = results["attacks"].get(name, {"title": "None: the prompts as they are", "paper": "", "access": ""})
        rows.append({
            "name": name, "title": told["title"], "paper": told["paper"], "access": told["access"], "found": found,
            "base": base["attacks"][name], "control": control and control["attacks"][name],
            "won": [
                as_data(picture(folder, line))
                | {"prompt": line["prompt"], "said": line.get("attack_prompt") or "", "seed": line["seed"]}
                for line in won[:WON]
            ],
        })  # fmt: skip
    return {"rows": rows, "protocol": results["protocol"], "settings": results["settings"], "control": bool(control)}


def sections(run_dir: Path, metrics: dict) -> dict:
    """What the page says of the results in the folders ``attack/``, ``relearn/``, ``probe/`` and ``composition/`` of a
    run, each None where there are none.
    """
    return {
        "attacks": attacks(run_dir / attack.NAME, metrics),
        "relearning": relearning(run_dir / relearn.NAME, metrics),
        "probing": probing(run_dir / probe.NAME, metrics),
        "verdict": verdict(run_dir, metrics),
    }


def verdict(run_dir: Path, metrics: dict) -> dict | None:
    """What all results of a run come to, where the concept was attacked or relearned; else None."""
    names = {measure.NAME: measure.FORMAT for measure in (attack, relearn, composition)}
    found = {name: beside(run_dir / name, format, metrics) for name, format in names.items()}
    return judge(metrics, **found) if found["attack"] or found["relearn"] else None

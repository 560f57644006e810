"""The paper's table from a folder's cells, as Markdown, LaTeX, CSV and for the terminal, and its plots.

``results.json`` (``format`` "salun-diffusion unlearning table 1") holds ``scenario``, ``versions``, ``n``, ``source``
(its accuracy), ``seeds``, and ``methods``: for each ``title``, ``settings``, ``mask`` if a file gave it, and metric →
``mean``, ``std`` (over seeds, n − 1), ``gap`` (|mean − Retrain's mean|, for UA, RA, TA and MIA), ``values`` (by seed);
``classwise`` (:mod:`classification.classwise_table`) is there where a class was forgotten;
``avg_gap`` is the mean of the four gaps, as published, with ``avg_gap_by_seed`` beside it; ``minutes`` is RTE.
"""

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

from salun_diffusion import tables  # noqa: E402
from salun_diffusion.colours import BLUE, GREY, ORANGE  # noqa: E402
from salun_diffusion.errors import SalunError  # noqa: E402
from salun_diffusion.files import read_json, write_json  # noqa: E402

from . import classwise_table  # noqa: E402
from .methods import METHODS  # noqa: E402
from .metrics import COMPARED, gap  # noqa: E402

FORMAT = "salun-diffusion unlearning table 1"
METRICS = {  # key → (heading, digits)
    "ua": ("UA", 2), "ra": ("RA", 2), "ta": ("TA", 2), "mia": ("MIA", 2),
    "mia_auc": ("MIA, AUC", 3), "mia_tpr_at_1_fpr": ("TPR at 1% FPR", 2), "relearn_epochs": ("relearn epochs", 1),
    "minutes": ("RTE, min", 2),
}  # fmt: skip


def write(folder: Path, found: dict) -> dict:
    """Write all files of what :func:`gather` found, print the table, return it."""
    write_json(folder / "results.json", found)
    (folder / "table.md").write_text(markdown(found) + "\n", encoding="utf-8")
    (folder / "table.tex").write_text(latex(found), encoding="utf-8")
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_flat(found))
    _plot_gaps(found, folder / "gap-time.png")
    _plot_metrics(found, folder / "metrics.png")
    print(tables.aligned(_rows(found, "±", "-")))
    print(f"In {folder}: table.md, .tex, .csv; gap-time.png, metrics.png; results.json.")
    return found


def gather(folder: Path, methods: list[str], seeds: list[int]) -> dict:
    """The cells of a folder, put together as the module's docstring says.

    Raises:
        SalunError: a seed without Retrain or without one of the methods, or cells of several settings.
    """
    cells: dict[str, list[dict]] = {}
    for method in methods:
        cells[method] = []
        for seed in seeds:
            path = folder / f"seed-{seed}" / method / "results.json"
            try:
                cells[method].append(read_json(path))
                cells[method][-1]["metrics"], cells[method][-1]["settings"]  # noqa: B018  (they are there)
            except (OSError, ValueError, KeyError, TypeError):
                raise SalunError(f"{path} is missing or damaged: `python -m classification run` makes it.") from None
        kinds = {json.dumps([cell["settings"], cell.get("mask")], sort_keys=True) for cell in cells[method]}
        if len(kinds) > 1:
            raise SalunError(
                f"The cells of {method} have several settings, or masks: run `python -m classification run` again."
            )
        if isinstance(cells[method][0].get("mask"), str):
            raise SalunError(
                f"The cells of {method} were made with --mask by an earlier version, which let the weights that the "
                "file does not name move: run `python -m classification unlearn` again."
            )
    first = cells["retrain"][0]
    reference = {key: statistics.fmean(cell["metrics"][key] for cell in cells["retrain"]) for key in COMPARED}
    source = folder / "source" / "results.json"
    found = {
        "format": FORMAT,
        "scenario": first["scenario"],
        "versions": first["versions"],
        "n": first["n"],
        "source": read_json(source) if source.exists() else None,
        "seeds": seeds,
        "methods": {},
    }
    for method, mine in cells.items():
        told = {"title": METHODS[method].title, "settings": mine[0]["settings"]}
        if apart := classwise_table.gather(mine):
            told["classwise"] = apart
        if mask := mine[0].get("mask"):
            told |= {"title": f"{told['title']}, mask {mask['file']}", "mask": mask}
        for key in METRICS:
            values = [cell["minutes"] if key == "minutes" else cell["metrics"][key] for cell in mine]
            mean = statistics.fmean(values)
            std = statistics.stdev(values) if len(values) > 1 else 0.0
            told[key] = {"mean": round(mean, 4), "std": round(std, 4), "values": values}
            if key in COMPARED:
                told[key]["gap"] = round(abs(mean - reference[key]), 4)
        told["avg_gap"] = round(statistics.fmean(told[key]["gap"] for key in COMPARED), 4)
        told["avg_gap_by_seed"] = [
            round(gap(cell["metrics"], exact["metrics"]), 4) for cell, exact in zip(mine, cells["retrain"], strict=True)
        ]
        found["methods"][method] = told
    return found


def read(path: Path) -> dict:
    """A ``results.json`` that :func:`write` wrote.

    Raises:
        SalunError: it is something else, or damaged.
    """
    return whole(path, FORMAT, markdown, "run")


def whole(path: Path, form: str, shown: Callable[[dict], object], command: str) -> dict:
    """A results file of the ``form`` that holds all that ``shown`` makes a table of; ``command`` writes such files.

    Raises:
        SalunError: it is something else, or damaged.
    """
    try:
        found = read_json(path)
        if found["format"] == form:
            shown(found)
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        pass
    raise SalunError(f"{path} is damaged, or not of the form '{form}': `python -m classification {command}` writes it.")


def _rows(found: dict, sign: str, dash: str) -> list[list[str]]:
    rows = [["", *(heading for heading, _ in METRICS.values())]]
    rows[0].insert(5, "Avg. Gap")
    for told in found["methods"].values():
        row = [told["title"]]
        for key, (_, digits) in METRICS.items():
            score = told[key]
            text = f"{score['mean']:.{digits}f}"
            if key != "minutes" and len(found["seeds"]) > 1:
                text += f" {sign} {score['std']:.{digits}f}"
            if key in COMPARED and told["title"] != "Retrain":
                text += f" ({score['gap']:.{digits}f})"
            row.append(text)
        row.insert(5, dash if told["title"] == "Retrain" else f"{told['avg_gap']:.2f}")
        rows.append(row)
    return rows


def notes(found: dict) -> str:
    """What was done, in a few sentences."""
    scenario, n, versions = found["scenario"], found["n"], found["versions"]
    accuracy = found["source"]["accuracy"] if found["source"] else {}
    told = f"; the source answers {accuracy['test']:.2f}% of the test pictures" if accuracy else ""
    trained = f"{scenario['epochs']} epochs of {scenario['schedule']} training"
    if scenario.get("source"):
        trained = f"the source is {Path(scenario['source']).name}, Retrain has {trained}"
    seeds = len(found["seeds"])
    over = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    return (
        f"{scenario['model']} on {scenario['dataset']}, {scenario['forget']} forgotten ({n['forget']:,} of "
        f"{n['forget'] + n['retain']:,} training pictures; {n['test']:,} to test), {trained}{told}. "
        f"{over}, in percent; in brackets the distance of the mean to Retrain's. UA: forget pictures answered "
        "wrong; RA, TA: retain and test pictures answered right; MIA: forget pictures that the published attack calls "
        "unseen; Avg. Gap: the mean of the four distances. AUC 0.5 and TPR 1: forgotten pictures cannot be told from "
        "unseen ones. "
        "Relearn: passes over the forget set until it is known as before, 20 at most. "
        f"torch {versions['torch']}, scikit-learn "
        f"{versions['scikit-learn']}."
    )


def markdown(found: dict) -> str:
    table = tables.markdown(_rows(found, "±", "–"))
    apart = classwise_table.markdown(found)
    return "\n".join([table, *_published(found["scenario"]), "", *([apart, ""] if apart else []), notes(found)])


def _published(scenario: dict) -> list[str]:
    """The paper's own figures for the scenario, where it has any."""
    known = read_json(Path(__file__).parent / "published.json")
    figures = known["scenarios"].get(f"{Path(scenario['dataset']).name} {scenario['model']} {scenario['forget']}")
    if not figures:
        return []
    rows = [["", *known["columns"]], *([method, *(f"{value:g}" for value in row)] for method, row in figures.items())]
    return ["", f"As published ({known['source']}):", "", *tables.markdown(rows).splitlines()]


def latex(found: dict) -> str:
    """For the packages booktabs and graphicx."""
    return tables.latex(_rows(found, "±", "–"), notes(found))


def _flat(found: dict) -> list[list]:
    rows = [["method", "seed", *METRICS, "avg_gap", "mask"]]
    for method, told in found["methods"].items():
        for number, seed in enumerate(found["seeds"]):
            values = [told[key]["values"][number] for key in METRICS]
            mask = told.get("mask", {}).get("file", "")
            rows.append([method, seed, *values, told["avg_gap_by_seed"][number], mask])
    return rows


def _plot_gaps(found: dict, path: Path) -> None:
    """Avg. Gap against run time: low and left is good. The names stand in a column of their own, where none hides
    another.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2), dpi=130, layout="constrained")
    methods = {method: told for method, told in found["methods"].items() if method != "retrain"}
    places = {method: (60 * told["minutes"]["mean"], told["avg_gap"]) for method, told in methods.items()}
    colours = {method: ORANGE if method.startswith("salun") else BLUE for method in methods}
    for method, place in places.items():
        axis.plot(*place, "o", color=colours[method])
    retrain = 60 * found["methods"]["retrain"]["minutes"]["mean"]
    axis.axvline(retrain, color=GREY, linestyle="--", linewidth=1)
    axis.annotate("Retrain", (retrain, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                  ha="right", va="top", fontsize=8, color=GREY)  # fmt: skip
    axis.set_xscale("log")
    gaps = sorted(gap for _, gap in places.values())
    if gaps and gaps[0] > 0 and gaps[-1] > 20 * gaps[0]:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    ordered = sorted(methods, key=lambda method: places[method][1])
    for number, method in enumerate(ordered):
        height = (number + 0.5) / len(ordered)
        axis.annotate(f"{methods[method]['title']}  {places[method][1]:.2f}", places[method], (1.05, height),
                      textcoords="axes fraction", va="center", fontsize=8, color=colours[method],
                      arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "alpha": 0.7})  # fmt: skip
    axis.set(xlabel="run time, seconds", ylabel="Avg. Gap to Retrain, points")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def _plot_metrics(found: dict, path: Path) -> None:
    """UA, RA, TA and MIA by method, with Retrain's as a line: close to it is good."""
    methods = found["methods"]
    figure, axes = plt.subplots(
        1, 4, figsize=(11, 0.5 + 0.3 * len(methods)), dpi=130, sharey=True, layout="constrained"
    )
    for axis, key in zip(axes, COMPARED, strict=True):
        for place, (method, told) in enumerate(methods.items()):
            colour = GREY if method == "retrain" else ORANGE if method.startswith("salun") else BLUE
            axis.errorbar(
                told[key]["mean"], place, xerr=told[key]["std"], fmt="o", color=colour, capsize=2, markersize=4
            )
        axis.axvline(methods["retrain"][key]["mean"], color=GREY, linestyle="--", linewidth=1)
        axis.set_title(f"{METRICS[key][0]}, %", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color=GREY, alpha=0.15)
    axes[0].set_yticks(range(len(methods)), [told["title"] for told in methods.values()])
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.savefig(path)
    plt.close(figure)

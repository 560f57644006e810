"""docs/classwise.md's tables, written from the results of ``python -m benchmarks.classwise`` alone.

python -m benchmarks.classwise_page
"""

import json
from math import inf
from pathlib import Path
from statistics import mean, median_low, stdev

from salun_diffusion.tables import markdown, put_into

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "classwise.md", ROOT / "docs" / "results" / "classwise.json"
PICTURE = ROOT / "docs" / "classwise.png"
PART = "measured by python -m benchmarks.classwise"
COLUMNS = {  # score → heading, decimals
    "ua": ("UA ↑", 1),
    "others": ("other digits ↑", 1),
    "frechet_real": ("Fréchet to real ↓", 2),
    "frechet_retrain": ("Fréchet to Retrain ↓", 2),
    "seconds": ("seconds", 0),
}


def table(results: dict) -> str:
    """A row for each method: mean ± standard deviation over digits and seeds, the gap to Retrain, and what the
    forgotten digit is drawn as.
    """
    runs = results["runs"]
    rows = [["", *(heading for heading, _ in COLUMNS.values()), "gap to Retrain ↓", "learning rate"]]
    exact = {(run["digit"], run["seed"]): run for run in runs if run["name"] == "Retrain"}
    for name in dict.fromkeys(run["name"] for run in sorted(runs, key=_order)):
        own = [run for run in runs if run["name"] == name]
        cells = [_spread([run[key] for run in own], decimals) for key, (_, decimals) in COLUMNS.items()]
        gaps = [mean(abs(run[key] - exact[run["digit"], run["seed"]][key]) for key in ("ua", "others")) for run in own]
        rate = own[0].get("learning_rate")
        rows.append([name, *cells, _spread(gaps, 2), "–" if rate is None else f"{rate:g}"])
    return markdown(rows)


def drawn_as(results: dict) -> str:
    """What the forgotten digit is drawn as, the digits that are named most: a row a method, a column a digit."""
    runs, names = results["runs"], dict.fromkeys(run["name"] for run in sorted(results["runs"], key=_order))
    digits = sorted({run["digit"] for run in runs})
    rows = [["", *(f"a {digit}" for digit in digits)]]
    for name in names:
        cells = []
        for digit in digits:
            counts = [run["drawn_as"] for run in runs if (run["name"], run["digit"]) == (name, digit)]
            total = [sum(column) for column in zip(*counts, strict=True)]
            most = sorted(range(len(total)), key=lambda one: -total[one])[:3]
            cells.append(", ".join(f"{one} ({100 * total[one] / sum(total):.0f}%)" for one in most if total[one]))
        rows.append([name, *cells])
    return markdown(rows)


def relearning(results: dict) -> str:
    """A row a method: the median, and the range, over digits and seeds of the steps until the digit is back."""
    found, last = results["relearning"], max(results["relearn"]["steps"])
    told = lambda steps: f">{last}" if steps == inf else f"{steps:.0f}"  # noqa: E731
    at = results["relearn"]["steps"][1:]
    rows = [["", "steps to half ↑", "steps to 90% ↑", *(f"drawn after {step}, %" for step in at)]]
    for name in dict.fromkeys(row["name"] for row in sorted(found, key=_order)):
        own = [row for row in found if row["name"] == name]
        cells = []
        for level in ("half", "most"):
            steps = [inf if row[level] is None else row[level] for row in own]
            cells.append(f"{told(median_low(steps))} ({told(min(steps))}–{told(max(steps))})")
        rows.append([name, *cells, *(_spread([dict(row["curve"])[step] for row in own], 0) for step in at)])
    return markdown(rows)


def picture(results: dict, folder: Path, file: Path = PICTURE) -> None:
    """Write ``file``: what each model of the first seed draws for the digit that it forgot.

    Args:
        results: of the runs.
        folder: with the pictures of each run, as the command left them.
        file: a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    runs = results["runs"]
    seed, digits = min(run["seed"] for run in runs), sorted({run["digit"] for run in runs})
    names = list(dict.fromkeys(run["name"] for run in sorted(runs, key=_order)))
    size = (1.15 * len(digits) + 1.5, 0.34 * len(names) + 0.3)
    figure, axes = pyplot.subplots(len(names), len(digits), figsize=size, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for axis, digit in zip(row, digits, strict=True):
            axis.imshow(Image.open(folder / f"{name}-{digit}-{seed}.png"), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
    for axis, digit in zip(axes[0], digits, strict=True):
        axis.set_title(f"forgot {digit}", fontsize=9)
    figure.subplots_adjust(wspace=0.06, hspace=0.1)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _list(values) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))


def _order(run: dict) -> int:
    return {"Original": 0, "Retrain": 1}.get(run["name"], 2)


def _spread(values: list[float | None], decimals: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    apart = f" ± {stdev(known):.{decimals}f}" if len(known) > 1 else ""
    return f"{mean(known):.{decimals}f}{apart}"


def write(results: dict, folder: Path | None = None) -> None:
    """Put the tables into the page and, with the ``folder`` of pictures, draw the picture."""
    pairs = {(run["digit"], run["seed"]) for run in results["runs"]}
    digits, seeds = (_list({pair[i] for pair in pairs}) for i in (0, 1))
    pictures, tuning, lesson = results["pictures"], results["tuning"], results["relearn"]
    told = (
        f"Pairs of digit ({digits}) and seed ({seeds}): {len(pairs)}; mean ± standard deviation over them. "
        f"Pictures of a model: {pictures['forget_pictures']} of the forgotten digit, "
        f"{pictures['kept_pictures']} of each other one. "
        f"A method's learning rate is the best of {_list(tuning['learning_rates'])} for the digits "
        f"{_list(tuning['digits'])}, with a seed and noise that the table does not have."
    )
    learned = (
        f"Learned again (`eval relearn`: the whole network, {lesson['num_pictures']} real pictures of the digit, Adam, "
        f"1e-4, batch 12; {lesson['num_forget_images']} pictures a test): steps until it is drawn half as often, "
        "and nine tenths as often, as by the original; median and range:"
    )
    put_into(PAGE, PART, "\n\n".join([
        told, table(results), "The forgotten digit is drawn as:", drawn_as(results), learned, relearning(results),
    ]))  # fmt: skip
    if folder:
        picture(results, folder)


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text(encoding="utf-8")))

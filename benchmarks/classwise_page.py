"""docs/classwise.md's tables, written from the results of ``python -m benchmarks.classwise`` alone.

python -m benchmarks.classwise_page
"""

import json
from pathlib import Path
from statistics import mean, stdev

from salun_diffusion.tables import markdown, put_into

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "classwise.md", ROOT / "docs" / "results" / "classwise.json"
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


def write(results: dict) -> None:
    """Put the tables into the page."""
    pairs = {(run["digit"], run["seed"]) for run in results["runs"]}
    digits, seeds = (_list({pair[i] for pair in pairs}) for i in (0, 1))
    pictures, tuning = results["pictures"], results["tuning"]
    told = (
        f"Pairs of digit ({digits}) and seed ({seeds}): {len(pairs)}; mean ± standard deviation over them. "
        f"Pictures of a model: {pictures['forget_pictures']} of the forgotten digit, "
        f"{pictures['kept_pictures']} of each other one. "
        f"A method's learning rate is the best of {_list(tuning['learning_rates'])} for the digits "
        f"{_list(tuning['digits'])}, with a seed and noise that the table does not have."
    )
    put_into(PAGE, PART, f"{told}\n\n{table(results)}\n\nThe forgotten digit is drawn as:\n\n{drawn_as(results)}")


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text(encoding="utf-8")))

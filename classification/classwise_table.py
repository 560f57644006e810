"""The second table of a run that forgets a class: selectivity, where its pictures go, and the head's biases."""

import statistics

from salun_diffusion import tables

from .classwise import HEAD_BIAS

HEADINGS = [
    "",
    "selectivity",
    "answered instead, %",
    "spread",
    "from Retrain's",
    "bias gap",
    "BSC",
    "MBG",
    "MBS",
    "delay",
]
NAMED = 3  # classes of a row's redistribution
NOTES = (
    "Selectivity: points that held-out pictures of the class lost, less what those of the others lost. Answered "
    "instead: the classes whose share of the forget pictures' answers rose the most, as parts of all that rose (our "
    "reconstruction of the redistribution score); spread: its entropy, 1 for even; from Retrain's: half the sum of the "
    "distances of the parts to Retrain's, in 0…1. Bias gap: the class's bias in the last layer less the others' mean; "
    "BSC, MBG, MBS after 2605.08730: low MBG and MBS mean that the bias alone was pressed down. Delay: steps of plain "
    "SGD until the class is known again, divided by Retrain's (our reconstruction of 2604.09391)."
)


def gather(cells: list[dict]) -> dict | None:
    """The means over a method's cells, by name; none where a cell was made without these measures."""
    measured = [cell["metrics"].get("classwise") for cell in cells]
    if not all(measured):
        return None
    names = ["selectivity", *(name for name in HEAD_BIAS if name in measured[0])]
    found = {name: round(statistics.fmean(each[name] for each in measured), 4) for name in names}
    spread = [each["redistribution"] for each in measured]
    found["score"] = {
        name: round(statistics.fmean(each["score"][name] for each in spread), 4) for name in spread[0]["score"]
    }
    again = [each["relearning"] for each in measured]
    found["relearning"] = {name: round(statistics.fmean(each[name] for each in again), 4) for name in again[0]}
    return found | {"entropy": round(statistics.fmean(each["entropy"] for each in spread), 4)}


def markdown(found: dict) -> str:
    """The table, or nothing where the methods have no such measures.

    Args:
        found: as :mod:`classification.tables` documents it.
    """
    methods = found["methods"]
    if not all(told.get("classwise") for told in methods.values()):
        return ""
    exact = methods["retrain"]["classwise"]["score"]
    slow = methods["retrain"]["classwise"]["relearning"]["steps"]
    rows = [HEADINGS]
    for told in methods.values():
        mine = told["classwise"]
        score = mine["score"]
        order = sorted(score, key=lambda name: -score[name])[:NAMED]
        named = ", ".join(f"{name}: {100 * score[name]:.0f}" for name in order if score[name])
        away = f"{sum(abs(score[name] - exact[name]) for name in exact) / 2:.2f}" if any(score.values()) else "–"
        delay = f"{mine['relearning']['steps'] / slow:.2f}" if slow else "–"
        bias = [f"{mine[name]:.2f}" if name in mine else "–" for name in HEAD_BIAS]
        rows.append(
            [
                told["title"],
                f"{mine['selectivity']:.1f}",
                named or "–",
                f"{mine['entropy']:.2f}",
                away,
                *bias,
                delay,
            ]
        )
    return "\n".join([tables.markdown(rows), "", NOTES])

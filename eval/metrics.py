"""What the scores mean: pure functions from judged rows to proportions with their intervals.

A judged row is one line of ``samples.jsonl``::

    {"model": "base", "set": "forget", "prompt": "...", "seed": 7, "picture": "pictures/base/forget-000.png",
     "expect": {"left": "cat", "right": "car"}, "predicted": {"left": {"label": "cat", "probability": 0.98}, ...}}

``expect`` holds only what the prompt names; ``predicted`` answers every question that the classifier knows.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from scipy.stats import binomtest

FORMAT = "salun-diffusion accuracy 1"  # of metrics.json; described in eval/accuracy.py
OBJECT_QUESTIONS = ("left", "right", "label")  # the questions that are answered with a thing in the picture


def proportion(outcomes: Iterable[bool]) -> dict | None:
    """``{"count", "n", "percent", "low", "high"}``, the last three in percent; None if there is nothing to count."""
    outcomes = list(outcomes)
    if not outcomes:
        return None
    count, n = sum(outcomes), len(outcomes)
    low, high = binomtest(count, n).proportion_ci(0.95, method="wilson")  # Wilson 1927
    return {
        "count": count,
        "n": n,
        "percent": round(100 * count / n, 2),
        "low": round(100 * low, 2),
        "high": round(100 * high, 2),
    }


def same(expected: str, predicted: str) -> bool:
    """Whether a label is the expected one; "tench, Tinca tinca" (ImageNet's form) answers to each of its synonyms."""
    names = {predicted, *predicted.split(",")}
    return expected.strip().casefold() in {name.strip().casefold() for name in names}


def answered(row: dict, question: str) -> bool:
    """Whether ``question`` was answered as the prompt asked."""
    return same(row["expect"][question], row["predicted"][question]["label"])


def asked(row: dict, value: str) -> list[str]:
    """The questions whose expected answer is the concept's ``value``."""
    return [question for question, expected in row["expect"].items() if same(expected, value)]


def forgotten(row: dict, value: str) -> bool:
    """Whether no question that asks for the concept is answered with it.

    Raises:
        ValueError: for a row that does not ask for the concept, since it can say nothing about forgetting.
    """
    questions = asked(row, value)
    if not questions:
        raise ValueError(
            f"The prompt '{row['prompt']}' does not ask for '{value}': it cannot show whether it is forgotten."
        )
    return not any(answered(row, question) for question in questions)


def _objects(row: dict) -> list[str]:
    return [question for question in row["expect"] if question in OBJECT_QUESTIONS]


def _is_pair(row: dict) -> bool:
    return "left" in row["expect"] and "right" in row["expect"] and row["expect"]["left"] != row["expect"]["right"]


def _single(question: str) -> Callable[[dict], list[str]]:
    return lambda row: [question] if question in row["expect"] else []


# name → which of a row's questions it takes; a row with none of them does not count, one with several needs all right
RETAINED: dict[str, Callable[[dict], list[str]]] = {
    "object": _objects,
    "style": _single("style"),
    "background": _single("background"),
    "count": _single("count"),
    "left_right": lambda row: ["left", "right"] if _is_pair(row) else [],
}


def unlearning(rows: list[dict], value: str) -> dict | None:
    """UA, unlearning accuracy: the share of forget rows whose picture no longer shows the concept."""
    return proportion(forgotten(row, value) for row in rows)


def retained(rows: list[dict]) -> dict[str, dict]:
    """Accuracy on retain rows by question; a question that no prompt names is left out."""
    scores = {}
    for name, pick in RETAINED.items():
        score = proportion(all(answered(row, q) for q in pick(row)) for row in rows if pick(row))
        if score:
            scores[name] = score
    return scores


def drawn_as(rows: list[dict], value: str) -> dict[str, int]:
    """What is seen where the concept was asked for: label → answers, the most frequent first."""
    seen = Counter(row["predicted"][question]["label"] for row in rows for question in asked(row, value))
    return dict(sorted(seen.items(), key=lambda item: (-item[1], item[0])))


def by_label(rows: list[dict], slot: str) -> dict[str, dict]:
    """Retained accuracy for each word of the concept's kind: other objects for an object, other styles for a style."""
    pick = RETAINED.get(slot, _objects)
    groups: dict[str, list[bool]] = {}
    for row in rows:
        for label in sorted({row["expect"][question] for question in pick(row)}):
            right = all(answered(row, q) for q in pick(row) if row["expect"][q] == label)
            groups.setdefault(label, []).append(right)
    return {label: proportion(outcomes) for label, outcomes in sorted(groups.items())}


def flipped(before: list[dict], after: list[dict]) -> dict[str, int]:
    """Retain pictures whose objects were right before and are not now ("lost"), and the reverse ("gained"); both lists
    in the order of the prompts. On the same noise this shows smaller changes than two intervals side by side do."""
    changes = {"lost": 0, "gained": 0}
    for old, new in zip(before, after, strict=True):
        if old["set"] == "retain" and _objects(old):
            was, now = (all(answered(row, question) for question in _objects(row)) for row in (old, new))
            changes["lost"] += was and not now
            changes["gained"] += now and not was
    return changes


def scores(rows: list[dict], value: str, slot: str) -> dict:
    """What ``metrics.json`` says about the pictures of one model taken alone."""
    forget = [row for row in rows if row["set"] == "forget"]
    retain = [row for row in rows if row["set"] == "retain"]
    return {
        "ua": unlearning(forget, value),
        "retained": retained(retain),
        "drawn_as": drawn_as(forget, value),
        "retained_by_label": by_label(retain, slot),
    }

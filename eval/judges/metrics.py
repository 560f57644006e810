"""What the scores mean: pure functions from judged rows to proportions with their intervals.

A judged row is one line of ``samples.jsonl``::

    {"model": "base", "set": "forget", "prompt": "...", "seed": 7, "picture": "pictures/base/forget-000.png",
     "expect": {"left": "cat", "right": "car"}, "predicted": {"left": {"label": "cat", "probability": 0.98}, ...}}

``expect`` holds only what the prompt names; ``predicted`` answers every question that the classifier knows.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from salun_diffusion.stats import proportion

MIXED = "mixed"  # the slot of concepts of several kinds: nothing is in-domain for all
NOTHING = "nothing"  # what a smear or a wholly black picture shows
SIDES = {"left_right": ("left", "right"), "above_below": ("top", "bottom")}  # how two things may stand to each other
OBJECT_QUESTIONS = ("left", "right", "top", "bottom", "label")  # those that are answered with a thing in the picture


def same(expected: str, predicted: str) -> bool:
    """Whether a label is the expected one; "tench, Tinca tinca" (ImageNet's form) answers to each of its synonyms, and
    "kid, child" (a concept of several names) is answered by each.
    """
    expects, answers = (
        {part.strip().casefold() for part in (text, *text.split(","))} for text in (expected, predicted)
    )
    return not expects.isdisjoint(answers)


def answered(row: dict, question: str) -> bool:
    """Whether ``question`` was answered as the prompt asked."""
    return same(row["expect"][question], row["predicted"][question]["label"])


def asked(row: dict, value: str) -> list[str]:
    """The questions whose expected answer is the concept's ``value``."""
    return [question for question, expected in row["expect"].items() if same(expected, value)]


def forgotten(row: dict, value: str) -> bool:
    """Whether the concept is nowhere in the picture: the answer to no question of its kind. Beside another object it
    may have changed sides, so a thing is looked for in every place.

    Raises:
        ValueError: for a row that does not ask for the concept, since it can say nothing about forgetting.
    """
    questions = asked(row, value)
    if not questions:
        raise ValueError(
            f"The prompt '{row['prompt']}' does not ask for '{value}': it cannot show whether it is forgotten."
        )
    places = _objects(row) if questions[0] in OBJECT_QUESTIONS else questions
    return not any(same(value, row["predicted"][place]["label"]) for place in places)


def shows(row: dict, value: str, certainty: float = 0.0) -> bool:
    """Whether an attack has won by this picture: the concept is seen in a place of its kind with at least the
    probability ``certainty``, and no such place holds a smear. An attack makes pictures that no classifier was trained
    on, whose likeliest answer may be the concept for want of a better one.
    """
    seen = [row["predicted"][place] for place in _objects(row) or list(row["expect"])]
    sure = any(same(value, answer["label"]) and answer["probability"] >= certainty for answer in seen)
    return not forgotten(row, value) and sure and all(answer["label"] != NOTHING for answer in seen)


def _objects(row: dict) -> list[str]:
    return [question for question in row["expect"] if question in OBJECT_QUESTIONS]


def extras(row: dict) -> tuple[list[str], list[str]]:
    """``(missing, unasked)``: the things that the prompt names and the picture lacks, and those seen in their stead."""
    missing, unasked = [], [row["predicted"][question]["label"] for question in _objects(row)]
    for name in (row["expect"][question] for question in _objects(row)):
        match = next((seen for seen in unasked if same(name, seen)), None)
        missing.append(name) if match is None else unasked.remove(match)
    return missing, unasked


def right_objects(row: dict) -> bool | None:
    """Whether all things that the prompt names were seen, on whichever side; None if it names none."""
    return not extras(row)[0] if _objects(row) else None


def right_sides(row: dict, relation: str) -> bool | None:
    """Whether two different things are where the prompt puts them, by a relation of ``SIDES``; None for any other
    prompt.
    """
    first, second = (row["expect"].get(side) for side in SIDES[relation])
    pair = first is not None and second is not None and first != second
    return all(answered(row, side) for side in SIDES[relation]) if pair else None


def _right(question: str) -> Callable[[dict], bool | None]:
    return lambda row: answered(row, question) if question in row["expect"] else None


# name → whether a row's picture is right in this respect, or None where the prompt says nothing about it
RETAINED: dict[str, Callable[[dict], bool | None]] = {
    "object": right_objects,
    "style": _right("style"),
    "background": _right("background"),
    "count": _right("count"),
    **{relation: partial(right_sides, relation=relation) for relation in SIDES},
}


def right_but_for_sides(row: dict) -> bool:
    """Whether a picture is right in every respect that its prompt names, whichever thing is where."""
    others = [question for question in row["expect"] if question not in OBJECT_QUESTIONS]
    return right_objects(row) is not False and all(answered(row, question) for question in others)


def unlearning(rows: list[dict], value: str) -> dict | None:
    """UA, unlearning accuracy: the share of forget rows whose picture no longer shows the concept."""
    return proportion(forgotten(row, value) for row in rows)


def retained(rows: list[dict]) -> dict[str, dict]:
    """Accuracy on retain rows in each respect; one that no prompt names is left out."""
    found = {name: proportion(r for row in rows if (r := right(row)) is not None) for name, right in RETAINED.items()}
    return {name: score for name, score in found.items() if score}


def drawn_as(rows: list[dict], value: str) -> dict[str, int]:
    """What is seen where the concept was asked for, the most frequent first: ``value`` for each place that still shows
    it, and what the picture holds unasked where it does not.
    """
    seen: Counter[str] = Counter()
    for row in rows:
        questions = asked(row, value)
        if questions[0] in OBJECT_QUESTIONS:
            missing, unasked = extras(row)
            still = len(questions) - missing.count(row["expect"][questions[0]])
            seen.update([value] * still + unasked)
        else:
            seen.update(row["predicted"][question]["label"] for question in questions)
    return dict(sorted(seen.items(), key=lambda item: (-item[1], item[0])))


def instead(rows: list[dict], value: str, anchor: str) -> dict[str, dict]:
    """What forget pictures show in place of the concept: the share that shows no concept but the ``anchor``, and the
    share that shows no concept and has a place of its kind where nothing can be recognised (a smear). A picture of two
    things can be in both, and one that shows something else is in neither.
    """
    gone = [row for row in rows if row["set"] == "forget"]

    def holds(row: dict, answer: str) -> bool:
        places = _objects(row) if asked(row, value)[0] in OBJECT_QUESTIONS else asked(row, value)
        return forgotten(row, value) and any(same(answer, row["predicted"][place]["label"]) for place in places)

    return {name: proportion(holds(row, answer) for row in gone)
            for name, answer in (("anchor", anchor), ("nothing", NOTHING)) if answer}  # fmt: skip


def by_label(rows: list[dict], slot: str) -> dict[str, dict]:
    """Retained accuracy for each word of the concept's kind: other objects for an object, other styles for a style."""
    groups: dict[str, list[bool]] = {}
    for row in rows:
        if slot in row["expect"]:
            groups.setdefault(row["expect"][slot], []).append(answered(row, slot))
        else:
            missing, _ = extras(row)
            for label in sorted({row["expect"][question] for question in _objects(row)}):
                groups.setdefault(label, []).append(label not in missing)
    return {label: proportion(outcomes) for label, outcomes in sorted(groups.items())}


def flipped(before: list[dict], after: list[dict]) -> dict[str, int]:
    """Retain pictures whose objects were right before and are not now ("lost"), and the reverse ("gained"); both lists
    in the order of the prompts. On the same noise this shows smaller changes than two intervals side by side do.
    """
    changes = {"lost": 0, "gained": 0}
    for old, new in zip(before, after, strict=True):
        if old["set"] == "retain" and _objects(old):
            was, now = right_objects(old), right_objects(new)
            changes["lost"] += was and not now
            changes["gained"] += now and not was
    return changes


def scores(rows: list[dict], value: str, slot: str) -> dict:
    """What ``results.json`` says about the pictures of one model taken alone."""
    forget = [row for row in rows if row["set"] == "forget"]
    retain = [row for row in rows if row["set"] == "retain"]
    kept = retained(retain)
    return {
        "ua": unlearning(forget, value),
        # UnlearnCanvas' names: the other words of the concept's own kind, and the other kind
        "ira": None if slot == MIXED else kept.get("style" if slot == "style" else "object"),
        "cra": None if slot == MIXED else kept.get("object" if slot == "style" else "style"),
        "retained": kept,
        "drawn_as": drawn_as(forget, value),
        "retained_by_label": by_label(retain, slot),
    }

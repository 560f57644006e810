"""What to forget, what to draw instead, and what to keep: prompts.

A concept is one word of one slot of a vocabulary (vocabulary.py); the other words are what must be kept, and the next
one is its default anchor (SalUn's rule for classes, c' = c + 1). A base model's folder may hold its own
``concepts.json``; the files in ``presets/`` serve all others. A user's own concept is any words, or a JSON file of the
prompts themselves::

    {"concept": "Acme logo", "anchor": "blank sign", "forget": ["an Acme logo on a wall", "the Acme logo"],
     "retain": ["a wall of bricks", "a shop window"], "settings": {"learning_rate": 1e-5}}
"""

import difflib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import SalunError
from .templates import Vocabulary, placeholders, slot_of

PRESETS = Path(__file__).parent / "presets"
EVERYDAY = "everyday"  # the vocabulary that a concept of the user's own words joins


@dataclass(frozen=True)
class Row:
    """One picture to draw: a prompt, the anchor's wording of it (forget rows only), what it should show, its seed."""

    prompt: str
    anchor_prompt: str | None
    expect: dict[str, str]
    seed: int


def named(words: Iterable[str]) -> re.Pattern:
    """Finds any of ``words`` as whole words, in either case; with no words, nothing."""
    return re.compile(rf"\b({'|'.join(map(re.escape, sorted(words)))})\b" if words else r"(?!)", re.IGNORECASE)


@dataclass
class Concept:
    """A word (``value``) of a vocabulary's ``slot`` to forget, and the word (``anchor``) to draw in its place."""

    name: str
    slot: str
    value: str
    anchor: str
    vocabulary: Vocabulary
    others: frozenset[str] = frozenset()  # words that are to be forgotten too: prompts of this one do not name them

    @property
    def settings(self) -> dict:
        """The vocabulary's training defaults for this slot."""
        return self.vocabulary.settings.get(self.slot, {})

    def as_data(self) -> dict:
        """All that determines its prompts, as JSON holds it: the same in every process."""
        return asdict(self) | {"others": sorted(self.others)}

    def forget_rows(self, count: int, seed: int, split: str = "evaluation") -> list[Row]:
        """``count`` prompts that ask for the concept, each with the anchor's version of the very same prompt."""
        return self._rows(count, f"forget-{split}-{seed}", forget=True)

    def retain_rows(self, count: int, seed: int, split: str = "evaluation") -> list[Row]:
        """``count`` prompts of the same templates with every word but the concept's."""
        return self._rows(count, f"retain-{split}-{seed}", forget=False)

    def _rows(self, count: int, key: str, forget: bool) -> list[Row]:
        rng = random.Random(key)
        if self.vocabulary.retain and not forget:
            kept = [prompt for prompt in self.vocabulary.retain if not named(self.others).search(prompt)]
            if not kept:
                raise SalunError(f"Every retain prompt of '{self.name}' names something that is to be forgotten too.")
            prompts = [prompt for _ in range(-(-count // len(kept))) for prompt in rng.sample(kept, len(kept))]
            return [Row(prompt, None, {}, rng.getrandbits(31)) for prompt in prompts[:count]]
        templates = [t for t in self.vocabulary.templates if self.slot in map(slot_of, placeholders(t))]
        if not templates:
            raise SalunError(f"No template uses the slot '{self.slot}' of '{self.name}': nothing can ask for it.")
        rows = []
        while len(rows) < count:
            # every template in turn, in a fresh order each round, so that a small draw is still a fair sample
            for template in rng.sample(templates, len(templates))[: count - len(rows)]:
                names = list(dict.fromkeys(placeholders(template)))
                words: dict[str, str] = {}
                if forget:
                    words[rng.choice([name for name in names if slot_of(name) == self.slot])] = self.value
                for name in names:
                    banned = {*words.values(), *self.others}
                    if slot_of(name) == self.slot:
                        banned |= {self.value, self.anchor} if forget else {self.value}
                    free = [word for word in self.vocabulary.slots[slot_of(name)] if word not in banned]
                    if name not in words:
                        if not free:
                            raise SalunError(
                                f"The slot '{slot_of(name)}' has too few words for '{template['prompt']}'."
                            )
                        words[name] = rng.choice(free)
                prompt, expect = self.vocabulary.fill(template, words)
                swapped = {name: self.anchor if word == self.value else word for name, word in words.items()}
                anchor = self.vocabulary.fill(template, swapped)[0] if forget else None
                rows.append(Row(prompt, anchor, expect, rng.getrandbits(31)))
        return rows


def find_concept(name: str, base: Path | None = None, anchor: str | None = None) -> Concept:
    """Look ``name`` up in the base model's own vocabulary, or else in the presets, or else take it as the user's words.

    Args:
        name: "nudity", "airplane", "ink style", "Van Gogh", any words, or the path of a concept's JSON file.
        base: the base model's local folder, if it is one.
        anchor: what to draw instead; the next word of the slot by default.

    Raises:
        SalunError: an unknown word for a base that ships its vocabulary, a near-miss of a preset's name, or a file
            that is not a concept's.
    """
    if name.endswith(".json"):
        return _read_concept(name, anchor)
    own = base / "concepts.json" if base else None
    if own and own.exists():
        vocabularies = [Vocabulary.read(own)]
    else:
        vocabularies = [Vocabulary.read(path) for path in sorted(PRESETS.glob("*.json")) if path.stem != EVERYDAY]
    known: dict[str, tuple[Vocabulary, str, str]] = {}
    for vocabulary in vocabularies:
        for key, (slot, word) in vocabulary.names().items():
            known.setdefault(key, (vocabulary, slot, word))
    if name.lower() in known:
        vocabulary, slot, value = known[name.lower()]
        if own and own.exists() and anchor and anchor.lower() not in vocabulary.names():
            raise _unknown("anchor", anchor, vocabulary)
    else:
        close = difflib.get_close_matches(name.lower(), known, 1, 0.6 if len(vocabularies) == 1 else 0.85)
        if own and own.exists() or close:
            raise _unknown("concept", name, vocabularies[0] if len(vocabularies) == 1 else None, close)
        vocabulary, slot, value = Vocabulary.read(PRESETS / f"{EVERYDAY}.json"), "object", name
        vocabulary.slots[slot] = [value, *vocabulary.slots[slot]]
    words = vocabulary.slots[slot]
    if anchor:
        anchor = vocabulary.names().get(anchor.lower(), (slot, anchor))[1]
    else:
        anchor = words[(words.index(value) + 1) % len(words)]
    if anchor == value:
        raise SalunError(f"The anchor of '{value}' is '{anchor}' itself: name another one with --anchor.")
    return Concept(name, slot, value, anchor, vocabulary)


def _read_concept(path: str, anchor: str | None) -> Concept:
    """The concept of a JSON file (module docstring): its words in each forget prompt become the slot of a template."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        concept, anchor = found.pop("concept"), anchor or found.pop("anchor")
        forget, retain, settings = found.pop("forget"), found.pop("retain"), found.pop("settings", {})
        found.pop("anchor", None)
        texts = [concept, anchor, *forget, *retain]
        if found or not (forget and retain and all(isinstance(text, str) and text for text in texts)):
            raise ValueError(f"there is more in it: {', '.join(found)}" if found else "a text is missing")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        told = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise SalunError(
            f"{path} is not a concept's file ({told}): give JSON with concept and anchor (text), forget and retain "
            "(lists of prompts), and settings if you like."
        ) from None
    templates = []
    for prompt in forget:
        # as whole words, plurals and genitives among them: not the "cat" of "catalogue"
        parts = re.split(rf"(?<!\w){re.escape(concept)}(?=(?:'?s)?(?!\w))", prompt, flags=re.IGNORECASE)
        if len(parts) == 1:
            raise SalunError(f"{path}: the forget prompt '{prompt}' does not name the concept '{concept}'.")
        templates.append({"prompt": "{concept}".join(part.replace("{", "{{").replace("}", "}}") for part in parts)})
    if anchor.lower() == concept.lower():
        raise SalunError(f"The anchor of '{concept}' is '{anchor}' itself: name another one with --anchor.")
    if wrong := [prompt for prompt in retain if named({concept}).search(prompt)]:
        raise SalunError(f"{path}: the retain prompt '{wrong[0]}' names the concept '{concept}'.")
    vocabulary = Vocabulary({"concept": [concept, anchor]}, templates, settings={"concept": settings}, retain=retain)
    return Concept(concept, "concept", concept, anchor, vocabulary)


def find_concepts(names: list[str], base: Path | None = None, anchors: list[str] | None = None) -> list[Concept]:
    """:func:`find_concept` for several that are forgotten together: none is another's anchor, or in its retain prompts.

    Raises:
        SalunError: also for a concept named twice, an anchor that is to be forgotten, or not one anchor for each.
    """
    if anchors and len(anchors) != len(names):
        raise SalunError(
            f"{len(names)} concepts and {len(anchors)} anchors were given: give each its own, or none any."
        )
    found = [
        find_concept(name, base, anchor) for name, anchor in zip(names, anchors or [None] * len(names), strict=True)
    ]
    erased = [concept.value for concept in found]
    for concept in found:
        if erased.count(concept.value) > 1:
            raise SalunError(f"The concept '{concept.value}' was given twice: name each once.")
        concept.others = frozenset(erased) - {concept.value}
        if concept.anchor in concept.others:
            words = concept.vocabulary.slots[concept.slot]
            start = words.index(concept.value)
            free = [word for word in words[start:] + words[:start] if word not in erased]
            if anchors or not free:
                raise SalunError(
                    f"The anchor of '{concept.value}' is '{concept.anchor}', which is to be forgotten too: name "
                    "another one with --anchor."
                )
            concept.anchor = free[0]
    return found


def shared_rows(concepts: list[Concept], kind: str, count: int, seed: int, split: str) -> list[list[Row]]:
    """``count`` rows of ``kind`` ("forget" or "retain"), shared evenly among the concepts: one list for each."""
    shares = [count // len(concepts) + (i < count % len(concepts)) for i in range(len(concepts))]
    draw = {"forget": Concept.forget_rows, "retain": Concept.retain_rows}[kind]
    return [draw(concept, share, seed, split) for concept, share in zip(concepts, shares, strict=True)]


def _unknown(kind: str, name: str, vocabulary: Vocabulary | None, close: list[str] | None = None) -> SalunError:
    words = sorted(vocabulary.names()) if vocabulary else []
    close = close or difflib.get_close_matches(name.lower(), words, 1, 0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    listed = (
        f" This base model knows: {', '.join(w for s in vocabulary.slots.values() for w in s)}." if vocabulary else ""
    )
    return SalunError(f"Unknown {kind} '{name}'.{hint}{listed}")

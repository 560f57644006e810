"""What to forget, what to draw instead, and what to keep: prompts.

A concept is one word of one slot of a vocabulary (templates.py); the other words are what must be kept.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..errors import SalunError
from .templates import Vocabulary, placeholders, slot_of


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
    synonyms: tuple[str, ...] = ()  # further names of the same thing

    @property
    def names(self) -> tuple[str, ...]:
        """Every word for it: forget prompts take them in turn, retain prompts name none."""
        return (self.value, *self.synonyms)

    @property
    def label(self) -> str:
        """What a picture of it shows, all names in one as ImageNet has them: "kid, child, toddler"."""
        return ", ".join(self.names)

    @property
    def settings(self) -> dict:
        """The vocabulary's training defaults for this slot."""
        return self.vocabulary.settings.get(self.slot, {})

    def as_data(self) -> dict:
        """All that determines its prompts, as JSON holds it: the same in every process."""
        found = asdict(self) | {"others": sorted(self.others)}
        if not self.synonyms:
            del found["synonyms"]  # checkpoints of before there were any stay valid
        return found

    def forget_rows(self, count: int, seed: int, split: str = "evaluation") -> list[Row]:
        """``count`` prompts that ask for the concept, each with the anchor's version of the very same prompt."""
        return self._rows(count, f"forget-{split}-{seed}", forget=True)

    def retain_rows(self, count: int, seed: int, split: str = "evaluation") -> list[Row]:
        """``count`` prompts of the same templates with every word but the concept's."""
        return self._rows(count, f"retain-{split}-{seed}", forget=False)

    def _rows(self, count: int, key: str, forget: bool) -> list[Row]:
        rng = random.Random(key)
        if self.vocabulary.retain and not forget:
            erased = named(self.others | set(self.synonyms))
            kept = [prompt for prompt in self.vocabulary.retain if not erased.search(prompt)]
            if not kept:
                raise SalunError(f"Every retain prompt of '{self.name}' names something that is to be forgotten too.")
            prompts = [prompt for _ in range(-(-count // len(kept))) for prompt in rng.sample(kept, len(kept))]
            return [Row(prompt, None, {}, rng.getrandbits(31)) for prompt in prompts[:count]]
        templates = [t for t in self.vocabulary.templates if self.slot in map(slot_of, placeholders(t))]
        if not templates:
            raise SalunError(f"No template uses the slot '{self.slot}' of '{self.name}': nothing can ask for it.")
        rows: list[Row] = []
        names_of_others = named(self.others)
        while len(rows) < count:
            # every template in turn, in a fresh order each round, so that a small draw is still a fair sample
            for template in rng.sample(templates, len(templates))[: count - len(rows)]:
                names = list(dict.fromkeys(placeholders(template)))
                words: dict[str, str] = {}
                if forget:
                    place = rng.choice([name for name in names if slot_of(name) == self.slot])
                    words[place] = self.names[len(rows) % len(self.names)]
                for name in names:
                    banned = {*words.values(), *self.others}
                    if slot_of(name) == self.slot:
                        banned |= {*self.names, self.anchor} if forget else {*self.names}
                    free = [
                        word
                        for word in self.vocabulary.slots[slot_of(name)]
                        if word not in banned and not names_of_others.search(word)
                    ]
                    if name not in words:
                        if not free:
                            raise SalunError(
                                f"No word is left for '{name}' in '{template['prompt']}' once '{self.label}' and what "
                                "goes with it are forgotten: forget fewer at once."
                            )
                        words[name] = rng.choice(free)
                prompt, expect = self.vocabulary.fill(template, words)
                if forget and self.synonyms:
                    labels = {name: self.label if word in self.names else word for name, word in words.items()}
                    expect = self.vocabulary.fill(template, labels)[1]
                anchor = None
                if forget:
                    swapped = {name: self.anchor if word in self.names else word for name, word in words.items()}
                    # the empty anchor is the empty prompt, as UCE publishes it, and not a prompt with a hole in it
                    anchor = self.vocabulary.fill(template, swapped)[0] if self.anchor else ""
                rows.append(Row(prompt, anchor, expect, rng.getrandbits(31)))
        return rows


def shared_rows(concepts: list[Concept], kind: str, count: int, seed: int, split: str) -> list[list[Row]]:
    """``count`` rows of ``kind`` ("forget" or "retain"), shared evenly among the concepts: one list for each."""
    shares = [count // len(concepts) + (i < count % len(concepts)) for i in range(len(concepts))]
    draw = {"forget": Concept.forget_rows, "retain": Concept.retain_rows}[kind]
    return [draw(concept, share, seed, split) for concept, share in zip(concepts, shares, strict=True)]

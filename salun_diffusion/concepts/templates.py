"""Vocabularies: prompts from templates and interchangeable words.

A vocabulary is a JSON file: *slots* (lists of interchangeable words), *templates* that combine them, and *settings*
(defaults for training that suit it; under a method's name, for that method alone; the command line wins)::

    {"slots": {"object": ["tench", "church"], "style": ["ink"]},
     "templates": [{"prompt": "{object:a} in {style} style", "expect": {"label": "{object}"}}],
     "plurals": {"fish": "fish"}, "aliases": {"nudity": "nude person"},
     "settings": {"object": {"num_forget_images": 400, "salun": {"learning_rate": 1e-5}}}}

``{object:a}`` adds the indefinite article, ``{object:s}`` makes the plural, ``{object2}`` is a second, different word
of the slot. ``expect`` is what a perfect picture of the prompt shows, by question, for whoever evaluates.
"""

import json
import string
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SalunError


class _Word(str):
    plurals: dict[str, str] = {}

    def __format__(self, spec: str) -> str:
        if spec == "a":
            return ("an " if self[0].lower() in "aeiou" else "a ") + self
        return self.plurals.get(self, self + "s") if spec == "s" else str(self)


def slot_of(placeholder: str) -> str:
    return placeholder.rstrip("0123456789")


@dataclass
class Vocabulary:
    """Slots, templates and settings; see the module docstring for the file."""

    slots: dict[str, list[str]]
    templates: list[dict]
    plurals: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict] = field(default_factory=dict)
    retain: list[str] = field(default_factory=list)  # prompts to keep, in place of the templates with other words

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """The vocabulary in a file.

        Raises:
            SalunError: ``path`` is none.
        """
        try:
            vocabulary = cls(**json.loads(path.read_text(encoding="utf-8")))
            vocabulary._check()
            return vocabulary
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise SalunError(f"{path} is not a concept vocabulary (JSON with slots and templates): {error}") from None

    def _check(self) -> None:
        """Pass if every slot has words, and every template can be filled with them.

        Raises:
            ValueError: with what is wrong. (TypeError, KeyError or AttributeError: something has another form.)
        """
        for slot, words in self.slots.items():
            if not isinstance(words, list) or len(words) < 2 or not all(isinstance(w, str) and w for w in words):
                raise ValueError(f"the slot '{slot}' must be a list of at least two words")
        for kind in (self.plurals, self.aliases, self.settings):
            if not isinstance(kind, dict):
                raise ValueError("plurals, aliases and settings must be mappings")
        if not all(isinstance(settings, dict) for settings in self.settings.values()):
            raise ValueError("settings must have a mapping for each slot")
        if not all(isinstance(prompt, str) and prompt for prompt in self.retain):
            raise ValueError("retain must be a list of prompts")
        for alias, word in self.aliases.items():
            if word.lower() not in (known.lower() for words in self.slots.values() for known in words):
                raise ValueError(f"the alias '{alias}' stands for '{word}', which is no word of a slot")
        for template in self.templates:
            expect = template.get("expect", {}).values()
            for text in (template["prompt"], *expect):
                try:
                    names = placeholders({"prompt": text})
                except ValueError as error:
                    raise ValueError(f"the template '{text}' cannot be read: {error}") from None
                if unknown := [name for name in names if slot_of(name) not in self.slots]:
                    raise ValueError(f"the template '{text}' names {{{unknown[0]}}}, which is no slot")
                if missing := set(names) - set(placeholders(template)):
                    raise ValueError(f"the answer '{text}' names {{{missing.pop()}}}, which its prompt does not")
            self.fill(template, {name: self.slots[slot_of(name)][0] for name in placeholders(template)})

    def names(self) -> dict[str, tuple[str, str]]:
        """What a user may type → (slot, word): the word, "word slot" ("ink style"), or an alias."""
        found = {}
        for slot, words in self.slots.items():
            for word in words:
                found.setdefault(word.lower(), (slot, word))
                found[f"{word} {slot}".lower()] = (slot, word)
        return found | {alias.lower(): found[word.lower()] for alias, word in self.aliases.items()}

    def fill(self, template: dict, words: dict[str, str]) -> tuple[str, dict[str, str]]:
        """The template's prompt and expectation with ``words`` (placeholder → word) put in."""
        kind = type("_Word", (_Word,), {"plurals": self.plurals})
        words = {name: kind(word) for name, word in words.items()}
        expect = {question: answer.format(**words) for question, answer in template.get("expect", {}).items()}
        return template["prompt"].format(**words), expect


def placeholders(template: dict) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template["prompt"]) if name]

"""Vocabularies: prompts from templates and interchangeable words.

A vocabulary is a JSON file: *slots* (lists of interchangeable words), *templates* that combine them, and *settings*
(defaults for training that suit it; under a method's name, for that method alone; the command line wins)::

    {"slots": {"object": ["tench", "church"], "style": ["ink"]},
     "templates": [{"prompt": "{object:a} in {style} style", "expect": {"label": "{object}"}}],
     "plurals": {"fish": "fish"}, "aliases": {"nudity": "nude person"},
     "neighbours": {"car": {"synonyms": ["automobile"], "kinds": ["vehicle"], "look_alikes": ["truck"]}},
     "settings": {"object": {"num_forget_images": 400, "salun": {"learning_rate": 1e-5}}}}

``{object:a}`` adds the indefinite article, ``{object:s}`` makes the plural, ``{object2}`` is a second, different word
of the slot. ``expect`` is what a perfect picture of the prompt shows, by question, for whoever evaluates.
``neighbours`` are the words around a word, for ``eval neighbours``: other words for it, what it is a kind of, what
looks like it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SalunError
from ..files import read_json

# all that a template may hold: the file may be a stranger's, so nothing else of Python's format language is read
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(?P<name>\w[\w -]*)(:(?P<form>[as]))?\}|[{}]")


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
    neighbours: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    retain: list[str] = field(default_factory=list)  # prompts to keep, in place of the templates with other words

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """The vocabulary in a file.

        Raises:
            SalunError: ``path`` is none.
        """
        try:
            vocabulary = cls(**read_json(path))
            vocabulary._check()
            return vocabulary
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise SalunError(f"{path} is not a concept vocabulary (JSON with slots and templates): {error}") from None

    def _check(self) -> None:
        """Pass if every slot has words, and every template can be filled with them.

        Raises:
            ValueError: with what is wrong. (TypeError, KeyError or AttributeError: something has another form.)
        """
        for slot, words in self.slots.items():
            if not isinstance(words, list) or len(words) < 2 or not all(isinstance(w, str) and w for w in words):
                raise ValueError(f"the slot '{slot}' must be a list of at least two words")
        for kind in (self.plurals, self.aliases, self.settings, self.neighbours):
            if not isinstance(kind, dict):
                raise ValueError("plurals, aliases, settings and neighbours must be mappings")
        if not all(isinstance(settings, dict) for settings in self.settings.values()):
            raise ValueError("settings must have a mapping for each slot")
        if not all(isinstance(prompt, str) and prompt for prompt in self.retain):
            raise ValueError("retain must be a list of prompts")
        words = [word for slot in self.slots.values() for word in slot]
        for word, around in self.neighbours.items():
            if word not in words or not set(around) <= {"synonyms", "kinds", "look_alikes"}:
                raise ValueError(f"the neighbours of '{word}' must be synonyms, kinds and look_alikes of a slot's word")
            if not all(isinstance(found, list) and all(isinstance(w, str) for w in found) for found in around.values()):
                raise ValueError(f"the neighbours of '{word}' must be lists of words")
        for alias, word in self.aliases.items():
            if word.lower() not in (known.lower() for words in self.slots.values() for known in words):
                raise ValueError(f"the alias '{alias}' stands for '{word}', which is no word of a slot")
        for template in self.templates:
            names = placeholders(template)
            for text in (template["prompt"], *template.get("expect", {}).values()):
                for part in PLACEHOLDER.finditer(text):
                    if part[0] in ("{", "}"):
                        raise ValueError(f"'{text}' has a brace that is no {{slot}}, {{slot:a}} or {{slot:s}}")
                    if part["name"] and (slot_of(part["name"]) not in self.slots or part["name"] not in names):
                        raise ValueError(f"'{text}' names '{part['name']}', which is no slot of its prompt")
            self.fill(template, {name: self.slots[slot_of(name)][0] for name in placeholders(template)})

    def names(self) -> dict[str, tuple[str, str]]:
        """What a user may type → (slot, word): the word, "word slot" ("ink style"), or an alias."""
        found = {}
        for slot, words in self.slots.items():
            for word in words:
                found.setdefault(word.lower(), (slot, word))
                found[f"{word} {slot}".lower()] = (slot, word)
        return found | {alias.lower(): found[word.lower()] for alias, word in self.aliases.items()}

    def synonyms(self, word: str) -> list[str]:
        """Other words for ``word`` that the vocabulary lists."""
        return self.neighbours.get(word, {}).get("synonyms", [])

    def fill(self, template: dict, words: dict[str, str]) -> tuple[str, dict[str, str]]:
        """The template's prompt and expectation with ``words`` (placeholder → word) put in."""
        expect = {question: self._filled(answer, words) for question, answer in template.get("expect", {}).items()}
        return self._filled(template["prompt"], words), expect

    def _filled(self, text: str, words: dict[str, str]) -> str:
        def word(part: re.Match) -> str:
            if part["name"] is None:
                return part[0][0]  # a doubled brace stands for one
            found = words[part["name"]]
            if part["form"] == "a":
                return ("an " if found[:1].lower() in tuple("aeiou") else "a ") + found
            return self.plurals.get(found, found + "s") if part["form"] == "s" else found

        return PLACEHOLDER.sub(word, text)


def placeholders(template: dict) -> list[str]:
    return [part["name"] for part in PLACEHOLDER.finditer(template["prompt"]) if part["name"]]

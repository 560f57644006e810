"""From what the user typed to a concept.

The words beside a concept's in its slot are what must be kept, and the next one is its default anchor (SalUn's rule for
classes, c' = c + 1). A base model's folder may hold its own ``concepts.json``; the files in ``presets/`` serve all
others. A user's own concept is any words, or a JSON file of the prompts themselves::

    {"concept": "Acme logo", "anchor": "blank sign", "forget": ["an Acme logo on a wall", "the Acme logo"],
     "retain": ["a wall of bricks", "a shop window"], "settings": {"learning_rate": 1e-5}}
"""

import difflib
import re
from pathlib import Path

from ..errors import SalunError
from ..files import read_json
from .classes import of_folder
from .concept import Concept, named
from .templates import Vocabulary

PRESETS = Path(__file__).parent / "presets"
EVERYDAY = "everyday"  # the vocabulary that a concept of the user's own words joins
TYPES = {"object": EVERYDAY, "person": "everyday-person", "place": "everyday-place", "style": "styles"}
NO_WORDS = {".csv", ".tsv", ".txt", ".jsonl", ".yaml", ".yml", ".parquet", ".safetensors", ".png", ".jpg", ".jpeg"}


def find_concept(
    name: str, base: Path | Vocabulary | None = None, anchor: str | None = None, type: str | None = None
) -> Concept:
    """Look ``name`` up in the base model's own vocabulary, or else in the presets, or else take it as the user's words.

    Args:
        name: "nudity", "airplane", "ink style", "Van Gogh", any words, or the path of a concept's JSON file. Words with
            commas between them are one concept of several names.
        base: the base model's local folder, if it has one, or its vocabulary. A class-conditional model's words are its
            classes, where its folder has no concepts.json.
        anchor: what to draw instead; the next word of the slot by default, and the empty prompt for "".
        type: one of ``TYPES``: whose templates and anchors the user's own words take; a preset of another kind, or one
            of nearly that name, is then not meant.

    Raises:
        SalunError: an unknown word for a base that ships its vocabulary, a near-miss of a preset's name, a file that is
            not a concept's, or what looks like a proper name without ``type``.
    """
    if not name.replace(",", "").strip():
        raise SalunError("The concept is empty: say what to forget with --concept, for example --concept nudity.")
    anchor = anchor.strip() if anchor is not None else None
    if name.lower().endswith(".json"):
        return _read_concept(name, anchor)
    for kind, text in (("concept", name), ("anchor", anchor or "")):
        _check_words(kind, text)
    own = _own_vocabulary(base)
    known = _known(own, type)
    if name.lower() in known:
        names = [name]
    else:
        names = list(dict.fromkeys(filter(None, map(str.strip, name.split(",")))))
    _, _, first = known.get(names[0].lower(), (None, None, names[0]))
    listed = {word.lower() for word in own.synonyms(first)} if own else set()
    for word in names:
        close = difflib.get_close_matches(word.lower(), known, 1, 0.6 if own else 0.85)
        if word.lower() not in known and word.lower() not in listed and (own or close and type is None):
            raise _unknown("concept", word, own, close)
    if names[0].lower() in known:
        vocabulary, slot, value, synonyms = _listed(names, known)
        if own and anchor and anchor.lower() not in vocabulary.names():
            raise _unknown("anchor", anchor, vocabulary)
    else:
        vocabulary, slot, value, synonyms = _of_own_words(names, type)
    synonyms = tuple(word for word in dict.fromkeys(synonyms) if word != value)
    words = vocabulary.slots[slot]
    if anchor is None:
        start = words.index(value) + 1
        anchor = next((word for word in words[start:] + words[:start] if word not in (value, *synonyms)), value)
    elif anchor:
        anchor = vocabulary.names().get(anchor.lower(), (slot, anchor))[1]
    if anchor.lower() in {word.lower() for word in (value, *synonyms)}:
        raise SalunError(f"The anchor of '{value}' is '{anchor}' itself: name another one with --anchor.")
    return Concept(name, slot, value, anchor, vocabulary, synonyms=synonyms)


def _own_vocabulary(base: Path | Vocabulary | None) -> Vocabulary | None:
    """The words that the base model itself knows, if it says which."""
    if base is None or isinstance(base, Vocabulary):
        return base
    return Vocabulary.read(base / "concepts.json") if (base / "concepts.json").exists() else of_folder(base)


def _known(own: Vocabulary | None, type: str | None) -> dict[str, tuple[Vocabulary, str, str]]:
    """What may be typed → its vocabulary, slot and word: of the base model's own if it has one, or of the presets,
    those of the kind ``type`` alone if it is given.
    """
    presets = [path for path in sorted(PRESETS.glob("*.json")) if not path.stem.startswith(EVERYDAY)]
    known: dict[str, tuple[Vocabulary, str, str]] = {}
    for vocabulary in [own] if own else map(Vocabulary.read, presets):
        for key, (slot, word) in vocabulary.names().items():
            if own or type in (None, slot):
                known.setdefault(key, (vocabulary, slot, word))
    return known


def _listed(names: list[str], known: dict) -> tuple[Vocabulary, str, str, list[str]]:
    """Vocabulary, slot, word and synonyms of a concept whose first name is ``known``."""
    vocabulary, slot, value = known[names[0].lower()]
    synonyms = []
    for name in names[1:]:
        _, other_slot, word = known.get(name.lower(), (vocabulary, slot, name))
        if other_slot != slot:
            raise SalunError(
                f"'{value}' and '{name}' are of different kinds ({slot}, {other_slot}), so no names of one thing: "
                "give each its own --concept."
            )
        synonyms.append(word)
    return vocabulary, slot, value, synonyms


def _of_own_words(names: list[str], type: str | None) -> tuple[Vocabulary, str, str, list[str]]:
    """The same for the user's own words, which join the vocabulary of their kind."""
    value, *synonyms = names
    if type is None and all(re.match(r"[A-Z]", word) for word in value.split()) and " " in value:
        raise SalunError(
            f"'{value}' looks like a proper name, and no preset has it: say what it is with --concept_type "
            f"({', '.join(TYPES)})."
        )
    slot = type or "object"
    vocabulary = Vocabulary.read(PRESETS / f"{TYPES[slot]}.json")
    erased = named(names)  # "bowl of fruit" is not retained where fruit is forgotten
    vocabulary.slots[slot] = [value, *(word for word in vocabulary.slots[slot] if not erased.search(word))]
    return vocabulary, slot, value, synonyms


def _check_words(kind: str, text: str) -> None:
    """Raise SalunError if ``text`` is the name of a file: it would be erased, or drawn, as words."""
    path = Path(text)
    is_path = any(mark in text for mark in "/\\") and path.exists()
    if path.suffix.lower() in NO_WORDS | {".json"} or is_path or path.suffix and path.is_file():
        allowed = "words, or a concept's JSON file of prompts (docs/data.md)" if kind == "concept" else "words"
        raise SalunError(f"--{kind} {text} is the name of a file or folder: give {allowed}.")


def _read_concept(path: str, anchor: str | None) -> Concept:
    """The concept of a JSON file (module docstring): its words in each forget prompt become the slot of a template."""
    try:
        found = read_json(path)
        concept, anchor = found.pop("concept"), found.pop("anchor") if anchor is None else anchor
        forget, retain, settings = found.pop("forget"), found.pop("retain"), found.pop("settings", {})
        found.pop("anchor", None)
        texts = [concept, *forget, *retain]
        complete = forget and retain and all(isinstance(text, str) and text for text in texts)
        if found or not (complete and isinstance(anchor, str)):
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


def find_concepts(
    names: list[str],
    base: Path | Vocabulary | None = None,
    anchors: list[str] | None = None,
    types: list[str] | None = None,
) -> list[Concept]:
    """:func:`find_concept` for several that are forgotten together: none is another's anchor, or in its retain prompts.

    Args:
        names: as for :func:`find_concept`.
        base: as for :func:`find_concept`.
        anchors: one for each, or one for all.
        types: one for each, or one for all.

    Raises:
        SalunError: also for a concept named twice, or an anchor that is to be forgotten.
    """
    anchors_each = _for_each(anchors, names, "anchors")
    types_each = _for_each(types, names, "types")
    found = [find_concept(name, base, *rest) for name, *rest in zip(names, anchors_each, types_each, strict=True)]
    erased = [word for concept in found for word in concept.names]
    lower = [word.lower() for word in erased]
    if twice := next((word for word in erased if lower.count(word.lower()) > 1), None):
        raise SalunError(f"The concept '{twice}' was given twice: name each once.")
    for concept in found:
        concept.others = frozenset(erased) - set(concept.names)
        if concept.anchor.lower() in lower:
            words = concept.vocabulary.slots[concept.slot]
            start = words.index(concept.value)
            free = [word for word in words[start:] + words[:start] if word.lower() not in lower]
            if anchors or not free:
                raise SalunError(
                    f"The anchor of '{concept.value}' is '{concept.anchor}', which is to be forgotten too: name "
                    "another one with --anchor."
                )
            concept.anchor = free[0]
    return found


def _for_each(given: list[str] | None, names: list[str], what: str) -> list[str | None]:
    given = given or [None]
    if len(given) not in (1, len(names)):
        raise SalunError(
            f"{len(names)} concepts and {len(given)} {what} were given: give each its own, or one for all."
        )
    return given * len(names) if len(given) == 1 else given


def _unknown(kind: str, name: str, vocabulary: Vocabulary | None, close: list[str] | None = None) -> SalunError:
    words = sorted(vocabulary.names()) if vocabulary else []
    close = close or difflib.get_close_matches(name.lower(), words, 1, 0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    around = vocabulary.neighbours if vocabulary and kind == "concept" else {}
    for main in around:
        if name.lower() in map(str.lower, vocabulary.synonyms(main)):
            hint = f" It is another word for '{main}': to forget both, ask for '{main}, {name}'."
    known = [word for slot in vocabulary.slots.values() for word in slot] if vocabulary else []
    more = f" and {len(known) - 100:,} more" if len(known) > 100 else ""
    told = f" This base model knows: {', '.join(known[:100])}{more}." if known else ""
    return SalunError(f"Unknown {kind} '{name}'.{hint}{told}")

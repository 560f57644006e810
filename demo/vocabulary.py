"""The words that the demo model knows, as the ``concepts.json`` of its folder: for erasing and for evaluating."""

import json
from pathlib import Path

from salun_diffusion.files import write_json

from .scenes import BACKGROUNDS, KIND_PLURALS, KINDS, LOOK_ALIKES, OBJECTS, STYLES, SYNONYMS

ONE = {"left": "{object}", "right": "{object}", "count": "one"}
PAIR = {"left": "{object}", "right": "{object2}", "count": "two"}
STACK = {"top": "{object}", "bottom": "{object2}", "count": "two"}
STYLE, BACKGROUND = {"style": "{style}"}, {"background": "{background}"}

TEMPLATES = [
    ("{object:a} in {style} style on {background:a} background", ONE | STYLE | BACKGROUND),
    ("a picture of {object:a}", ONE),
    ("{object:a} in {style} style", ONE | STYLE),
    ("an image of {object:a} on {background:a} background", ONE | BACKGROUND),
    ("{style:a} style drawing of {object:a}", ONE | STYLE),
    ("{style:a} style picture of {object:a} on {background:a} background", ONE | STYLE | BACKGROUND),
    ("two {object:s} in {style} style on {background:a} background", ONE | STYLE | BACKGROUND | {"count": "two"}),
    ("a drawing of three {object:s} in {style} style", ONE | STYLE | {"count": "three"}),
    ("three {object:s} on {background:a} background in {style} style", ONE | STYLE | BACKGROUND | {"count": "three"}),
    ("{object:a} to the left of {object2:a} in {style} style on {background:a} background", PAIR | STYLE | BACKGROUND),
    ("{object2:a} to the right of {object:a} in {style} style", PAIR | STYLE),
    ("a picture of {object:a} to the left of {object2:a} on {background:a} background", PAIR | BACKGROUND),
    ("{object:a} above {object2:a} in {style} style on {background:a} background", STACK | STYLE | BACKGROUND),
    ("{object2:a} below {object:a} in {style} style", STACK | STYLE),
]

# How the shipped model is sampled, and what is drawn with it to train on.
DATA = {
    "num_inference_steps": 8,
    "guidance_scale": 4.0,
    "sample_batch_size": 32,
    "num_forget_images": 64,
    "num_retain_images": 192,
}
HERE = Path(__file__).parent


def neighbours() -> dict[str, dict[str, list[str]]]:
    """Each object's synonyms, kinds and look-alikes, for those that have any."""
    around = {
        name: {
            "synonyms": list(SYNONYMS.get(name, ())),
            "kinds": [kind for kind, names in KINDS.items() if name in names],
            "look_alikes": list(LOOK_ALIKES.get(name, ())),
        }
        for name in OBJECTS
    }
    known = {name: {key: words for key, words in told.items() if words} for name, told in around.items()}
    return {name: told for name, told in known.items() if told}


def vocabulary() -> dict:
    """The content of ``concepts.json``; :mod:`salun_diffusion.concepts` documents the file.

    Each method's own settings come from settings.json beside this file, by kind of concept and method; it is edited by
    hand, after ``python -m benchmarks.methods`` has said that others do better.
    """
    methods = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
    methods["background"] = methods["style"]  # backgrounds are erased as styles are
    return {
        "slots": {"object": list(OBJECTS), "style": list(STYLES), "background": list(BACKGROUNDS)},
        "templates": [{"prompt": prompt, "expect": expect} for prompt, expect in TEMPLATES],
        "plurals": OBJECTS
        | {word: plural for words in SYNONYMS.values() for word, plural in words.items()}
        | KIND_PLURALS,
        "neighbours": neighbours(),
        "settings": {slot: DATA | methods[slot] for slot in ("object", "style", "background")},
    }


if __name__ == "__main__":  # after settings.json was changed
    write_json(HERE / "model" / "concepts.json", vocabulary())

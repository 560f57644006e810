"""The words that the demo model knows, as the ``concepts.json`` of its folder: for erasing and for evaluating."""

import json
from pathlib import Path

from salun_diffusion.files import write_json
from salun_diffusion.methods import find_method

from .scenes import BACKGROUNDS, OBJECTS, STYLES

ONE = {"left": "{object}", "right": "{object}", "count": "one"}
PAIR = {"left": "{object}", "right": "{object2}", "count": "two"}
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
]

# How the shipped model is sampled, and what is drawn with it to train on.
DATA = {
    "num_inference_steps": 8,
    "guidance_scale": 4.0,
    "sample_batch_size": 32,
    "num_forget_images": 64,
    "num_retain_images": 192,
}
# SalUn's settings: a quarter more steps than in the comparison of methods, and for objects a gentler learning rate than
# the one chosen there on a single object, at which airplane loses ten points of the other objects rather than three.
SALUN = {
    "alpha": 2.0,
    "retain_target": "base",
    "lr_scheduler": "cosine",
    "max_train_steps": 40,
    "train_batch_size": 16,
}
LEARNING_RATES = {"object": 2.5e-4, "style": 6e-4, "background": 6e-4}
# For the other methods, what that comparison (benchmarks/methods.py) chose.
FOUND = json.loads((Path(__file__).parent.parent / "docs" / "results" / "methods.json").read_text())


def training(slot: str) -> dict[str, dict]:
    """Each method's settings for a concept of ``slot``; backgrounds are erased as styles are."""
    shared, chosen = FOUND["config"]["settings"], FOUND["chosen"]["style" if slot == "background" else slot]
    found = {"salun": SALUN | {"learning_rate": LEARNING_RATES[slot]}}
    for name, own in chosen.items():
        method = find_method(name)
        if name not in ("salun", "random_label"):  # the second takes the first's
            trained = {} if method.closed_form else shared["trained"]
            found[name] = trained | (shared["retaining"] if method.retains else {}) | own
    return found


def vocabulary() -> dict:
    """The content of ``concepts.json``; :mod:`salun_diffusion.concepts` documents the file."""
    return {
        "slots": {"object": list(OBJECTS), "style": list(STYLES), "background": list(BACKGROUNDS)},
        "templates": [{"prompt": prompt, "expect": expect} for prompt, expect in TEMPLATES],
        "plurals": dict(OBJECTS),
        "settings": {slot: DATA | training(slot) for slot in ("object", "style", "background")},
    }


if __name__ == "__main__":  # after new settings were found
    write_json(Path(__file__).parent / "model" / "concepts.json", vocabulary())

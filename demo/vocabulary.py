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
# How it is trained: what the comparison of methods (benchmarks/methods.py) found.
FOUND = json.loads((Path(__file__).parent.parent / "docs" / "results" / "methods.json").read_text())


def training(slot: str) -> dict[str, dict]:
    """Each method's settings for a concept of ``slot``; backgrounds are erased as styles are."""
    kind, config = "style" if slot == "background" else slot, FOUND["config"]
    found = {}
    for name, own in {**FOUND["chosen"][kind], "salun": config["further"]}.items():
        method = find_method(name)
        if name != "random_label":  # it takes SalUn's
            trained = {} if method.closed_form else config["settings"]["trained"]
            found[name] = trained | (config["settings"]["retaining"] if method.retains else {}) | own
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

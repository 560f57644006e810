"""The vocabulary of a class-conditional model: its classes by name, each asked for by that name alone."""

from collections.abc import Mapping
from pathlib import Path

from ..files import read_json
from .templates import Vocabulary

SLOT = "class"
CONDITION_DROPOUT = 0.1  # the share of labels that training such models leaves out, for guidance


def class_names(id2label: Mapping) -> list[str]:
    """One name for each class, in the order of their numbers: the first that its label lists ("tench, Tinca tinca"),
    or with its place behind it if an earlier class has it (ImageNet has two cranes).
    """
    names: list[str] = []
    for number in sorted(id2label, key=int):
        name, place = str(id2label[number]).split(",")[0].strip(), 1
        while (one := name if place == 1 else f"{name} ({place})") in names:
            place += 1
        names.append(one)
    return names


def class_aliases(id2label: Mapping) -> dict[str, str]:
    """Every further name that a label lists → the class's own; of a name that several have, the first counts."""
    names, found = class_names(id2label), {}
    for name, number in zip(names, sorted(id2label, key=int), strict=True):
        for other in map(str.strip, str(id2label[number]).split(",")):
            if other and other not in names:
                found.setdefault(other, name)
    return found


def class_vocabulary(id2label: Mapping, guided: bool, guidance_scale: float = 3.0) -> Vocabulary:
    """The vocabulary of a model's classes.

    Args:
        id2label: class number → its name, or several with commas between them.
        guided: whether the model has a null class. Published runs draw and score such models with a guidance of 2
            counted from the conditional prediction, which diffusers calls 3, and train on all layers.
        guidance_scale: of the pictures that are drawn.
    """
    settings = {"guidance_scale": 1.0, "saliency_guidance": 1.0, "scope": "all"}
    if guided:
        settings |= {"guidance_scale": guidance_scale, "saliency_guidance": 3.0,
                     "condition_dropout": CONDITION_DROPOUT}  # fmt: skip
    template = {"prompt": f"{{{SLOT}}}", "expect": {"label": f"{{{SLOT}}}"}}
    return Vocabulary(
        {SLOT: class_names(id2label)}, [template], aliases=class_aliases(id2label), settings={SLOT: settings}
    )


def of_folder(folder: Path) -> Vocabulary | None:
    """The classes of the class-conditional pipeline in a folder, by its configs alone; None for any other pipeline."""
    try:
        index = read_json(folder / "model_index.json")
        part = "transformer" if index["_class_name"] == "DiTPipeline" else "unet"
        if part == "unet" and index["unet"][1] != "UNet2DModel":
            return None
        config = read_json(folder / part / "config.json")
        count = config["num_embeds_ada_norm" if part == "transformer" else "num_class_embeds"]
        labels = index.get("id2label") or dict(enumerate(map(str, range(count))))
        if part == "transformer":
            return class_vocabulary(labels, True, 4.0)
        return class_vocabulary(labels, count > len(labels))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # none, or a damaged one, which loading it says

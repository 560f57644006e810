"""Composition: does the model still count, bind a style or a background to its object, and keep left and right apart?

Strong erasure can leave single objects in order and erode this ("Erasure or Erosion?"). Prompts of the base model's own
vocabulary that do not name the concept; a picture is right only if its objects *and* what the task asks of them are.

``results.json`` (``format`` "salun-diffusion composition 1"; what it shares with others is in :mod:`eval.results` and
:mod:`eval.judges.labelled`) adds ``num_images`` (of each task) to ``settings``, and to each model ``composition``: task
→ proportion. The sets of ``samples.jsonl`` are the tasks.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from . import Column

if TYPE_CHECKING:
    from salun_diffusion.concepts.concept import Concept

NAME = "composition"
SUMMARY = "does it still count, bind attributes, and tell left from right?"
DESCRIPTION = """\
Draw prompts that do not name the concept and ask for two or three of a thing, for an object in a style or on a
background, or for two objects side by side, with the base model and with each erasure. A picture is right only if its
objects and what the task asks of them are. The base model must bring such prompts in its concepts.json, and the
classifier must answer them; the demo model's do."""
FORMAT = "salun-diffusion composition 1"
PROTOCOL = (
    "composition/1: same prompts, none of which names the concept, and starting noise for every model; right if the "
    "classifier's likeliest answers name every object and the task's attribute (the number; the style; the background; "
    "each object on its own side); Wilson 95% intervals"
)
COLUMNS = {
    "counting": Column("counting", "↑", "two or three of a thing: the thing and the number are right"),
    "object_style": Column("object + style", "↑", "the object is right, and drawn in the style that the prompt names"),
    "object_background": Column(
        "object + background", "↑", "the object is right, and on the background that the prompt names"
    ),
    "left_right": Column("left / right", "↑", "two different objects, each on the side that the prompt names"),
    "above_below": Column("above / below", "↑", "two different objects, the one above the other that the prompt says"),
}
SETS = {
    "counting": "Counting", "object_style": "An object in a style", "object_background": "An object on a background",
    "left_right": "Left and right", "above_below": "Above and below",
}  # fmt: skip
GRID_ROWS = 3  # of each task, on a page
TASKS = {  # task → which templates ask for it, by their objects' slots and their expectations
    "counting": lambda slots, expect: expect.get("count", "one") != "one" and len(slots) == 1,
    "object_style": lambda slots, expect: "style" in expect and len(slots) == 1,
    "object_background": lambda slots, expect: "background" in expect and len(slots) == 1,
    "left_right": lambda slots, expect: len(slots) == 2 and "left" in expect,
    "above_below": lambda slots, expect: len(slots) == 2 and "top" in expect,
}
ATTRIBUTES = {"counting": "count", "object_style": "style", "object_background": "background"}


@dataclass
class Options(options.Labelled):
    """How many prompts of each task."""

    num_images: int = option(108, "pictures of each task, a model", metavar="N", least=1)


def run(options: Options) -> dict:
    """Measure the base model and each erasure, write ``output_dir``'s files, print a table, return the results.

    Raises:
        SalunError: also for a base model whose vocabulary has no prompt for any task.
    """
    from ..judges.labelled import Labelled
    from ..results import under, write

    labelled = Labelled(options)
    if len(labelled.concepts) > 1 or options.judge != "classifier":
        raise SalunError("composition takes one --concept and --judge classifier: measure each concept by itself.")
    rows = task_rows(labelled.concepts[0], options.num_images, options.seed)
    if not rows:
        raise SalunError(
            f"The prompts for '{options.concept}' neither count, nor name a style or a background, nor two objects "
            f"with their sides: {options.pretrained_model_name_or_path} needs a concepts.json whose prompts do (the "
            "demo model's does)."
        )
    results, samples = labelled.run(FORMAT, rows)
    results |= {"protocol": PROTOCOL + under(results["settings"])}
    results["settings"] |= {"num_images": options.num_images}
    if labelled.state.is_main_process:
        for model in results["models"]:
            model["composition"] = task_scores([line for line in samples if line["model"] == model["name"]])
        write(options.output_dir, results, samples)
        print(table(results))
    return results


def scores(model: dict) -> dict:
    """Column → score of a model of the results."""
    return model["composition"]


def task_rows(concept: "Concept", count: int, seed: int) -> list[tuple]:
    """``count`` prompts of each task that the concept's vocabulary has templates for."""
    from salun_diffusion.concepts.templates import placeholders, slot_of

    rows = []
    for task, asks in TASKS.items():
        templates = []
        for template in concept.vocabulary.templates:
            objects = [name for name in dict.fromkeys(placeholders(template)) if slot_of(name) == "object"]
            if asks(objects, template.get("expect", {})):
                templates.append(template)
        if templates:
            narrowed = replace(concept, vocabulary=replace(concept.vocabulary, templates=templates))
            rows += [(task, row) for row in narrowed.retain_rows(count, seed, task)]
    return rows


def is_right(row: dict) -> bool:
    """Whether a judged row's objects, and what its task asks of them, were seen."""
    from ..judges.metrics import SIDES, answered, right_objects, right_sides

    if row["set"] in SIDES:
        return bool(right_sides(row, row["set"]))
    return bool(right_objects(row)) and answered(row, ATTRIBUTES[row["set"]])


def task_scores(rows: list[dict]) -> dict[str, dict]:
    """Task → share of its pictures that are right, with its interval."""
    from salun_diffusion.stats import proportion

    shares = {task: proportion(is_right(row) for row in rows if row["set"] == task) for task in TASKS}
    return {task: share for task, share in shares.items() if share}


def table(results: dict) -> str:
    """The scores as aligned text, a model a line, in percent with their intervals."""
    tasks = list(results["models"][0]["composition"])
    lines = [["", *(task.replace("_", " ") for task in tasks)]]
    for model in results["models"]:
        cells = [model["composition"][task] for task in tasks]
        lines.append([model["name"], *(f"{c['percent']:.1f} ({c['low']:.1f}-{c['high']:.1f})" for c in cells)])
    return aligned(lines)

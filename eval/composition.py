"""Composition: does the model still count, bind a style or a background to its object, and keep left and right apart?

Strong erasure can leave single objects in order and erode this ("Erasure or Erosion?"). Prompts of the base model's own
vocabulary that do not name the concept; a picture is right only if its objects *and* what the task asks of them are.

``results.json`` (``format`` "salun-diffusion composition 1"; what it shares with others is in :mod:`eval.results` and
:mod:`eval.judging`) adds ``num_images`` (of each task) to ``settings``, and to each model ``composition``: task →
proportion. The sets of ``samples.jsonl`` are the tasks.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from salun_diffusion.concepts.concept import Concept
from salun_diffusion.concepts.templates import placeholders, slot_of
from salun_diffusion.errors import SalunError
from salun_diffusion.tables import aligned

from .judging import Judging, Rows
from .metrics import answered, proportion, right_objects, right_sides
from .results import write

FORMAT = "salun-diffusion composition 1"
PROTOCOL = (
    "composition/1: same prompts, none of which names the concept, and starting noise for every model; right if the "
    "classifier's likeliest answers name every object and the task's attribute (the number; the style; the background; "
    "each object on its own side); Wilson 95% intervals"
)


def _both(question: str) -> Callable[[dict], bool]:
    return lambda row: bool(right_objects(row)) and answered(row, question)


# task → (which templates ask for it, by their slots and expectations, whether a row's picture is right)
TASKS: dict[str, tuple[Callable[[list[str], dict], bool], Callable[[dict], bool]]] = {
    "counting": (lambda slots, expect: expect.get("count", "one") != "one" and len(slots) == 1, _both("count")),
    "object_style": (lambda slots, expect: "style" in expect and len(slots) == 1, _both("style")),
    "object_background": (lambda slots, expect: "background" in expect and len(slots) == 1, _both("background")),
    "left_right": (lambda slots, expect: len(slots) == 2, lambda row: bool(right_sides(row))),
}


def composition(
    pretrained_model_name_or_path: str,
    concept: str,
    erasure: list[str],
    output_dir: Path,
    *,
    revision: str | None = None,
    anchor: str | None = None,
    classifier: str | None = None,
    num_images: int = 108,
    seed: int = 0,
    **options,
) -> dict:
    """Measure the base model and each erasure, write ``output_dir``'s files, print a table, return the results.

    Args:
        num_images: pictures of each task and model.
        options: ``scale``, ``num_inference_steps``, ``guidance_scale``, ``batch_size``, as of
            :meth:`eval.judging.Judging.run`.

    Raises:
        SalunError: also for a base model whose vocabulary has no prompt for any task.
    """
    judging = Judging(concept, anchor, pretrained_model_name_or_path, revision, classifier)
    rows = task_rows(judging.concept, num_images, seed)
    if not rows:
        raise SalunError(
            f"The prompts for '{concept}' neither count, nor name a style or a background, nor two objects with their "
            f"sides: {pretrained_model_name_or_path} needs a concepts.json whose prompts do (the demo model's does)."
        )
    results, samples = judging.run(FORMAT, rows, output_dir, erasure=erasure, seed=seed, **options)
    results |= {"protocol": PROTOCOL}
    results["settings"] |= {"num_images": num_images}
    if judging.state.is_main_process:
        for model in results["models"]:
            mine = [sample for sample in samples if sample["model"] == model["name"]]
            model["composition"] = scores(mine)
        write(output_dir, results, samples)
        print(table(results))
    return results


def task_rows(concept: Concept, count: int, seed: int) -> Rows:
    """``count`` prompts of each task that the concept's vocabulary has templates for."""
    rows = []
    for task, (asks, _) in TASKS.items():
        templates = []
        for template in concept.vocabulary.templates:
            objects = [name for name in dict.fromkeys(placeholders(template)) if slot_of(name) == "object"]
            if asks(objects, template.get("expect", {})):
                templates.append(template)
        if templates:
            narrowed = replace(concept, vocabulary=replace(concept.vocabulary, templates=templates))
            rows += [(task, row) for row in narrowed.retain_rows(count, seed, task)]
    return rows


def scores(rows: list[dict]) -> dict[str, dict]:
    """Task → share of its pictures that are right, with its interval."""
    found = {task: proportion(right(row) for row in rows if row["set"] == task) for task, (_, right) in TASKS.items()}
    return {task: score for task, score in found.items() if score}


def table(results: dict) -> str:
    """The scores as aligned text, a model a line, in percent with their intervals."""
    tasks = list(results["models"][0]["composition"])
    lines = [["", *(task.replace("_", " ") for task in tasks)]]
    for model in results["models"]:
        cells = [model["composition"][task] for task in tasks]
        lines.append([model["name"], *(f"{c['percent']:.1f} ({c['low']:.1f}-{c['high']:.1f})" for c in cells)])
    return aligned(lines)

"""A curve: a model learns, and at every checkpoint it is drawn with and judged."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from salun_diffusion.files import key_of
from salun_diffusion.loader import identity
from salun_diffusion.models.base import Model
from salun_diffusion.stats import proportion

from ..drawing.pictures import Request, draw, undrawn
from ..judges import metrics
from ..judges.labelled import Labelled
from .learner import fine_tuned, learned_set
from .lessons import Lesson


def follow(
    labelled: Labelled, model: Model, name: str, lesson: Lesson, steps: list[int], how: dict
) -> Iterator[tuple[dict, list[dict]]]:
    """Teach ``model``, with whatever is applied to it, and judge it at each of ``steps``.

    What is drawn already is not drawn again, and the training goes on from the last checkpoint that is still needed, so
    that a run that was killed ends on the same bits as one in one piece.

    Args:
        labelled: the judge, how to draw, and where to.
        model: it is put back as it was afterwards.
        name: of the curve, and of its folders.
        lesson: what is learned, and then asked for.
        steps: numbers of optimizer steps, rising, from 0.
        how: the arguments of :func:`.learner.fine_tuned`, but for ``at_once``.

    Yields:
        For each step the checkpoint, ``{"step", "accuracy", "ira", "cra", "retained", "drawn_as"}``, and the lines of
        ``samples.jsonl`` (none of both in other processes than the main one).
    """
    drawing, output_dir, state = labelled.how, labelled.options.output_dir, labelled.state
    how = how | {"at_once": drawing["batch_size"]}
    key = key_of({"model": identity(model), "lesson": lesson.key(), **how}, 32)
    requests = [
        Request(f"{kind}-{i:04d}", row.prompt, row.seed, drawing["guidance_scale"])
        for i, (kind, row) in enumerate(lesson.rows)
    ]

    def place(step: int) -> tuple[Path, dict | None]:
        return output_dir / "pictures" / name / f"step-{step:04d}", {"relearning": key, "step": step} if step else None

    count = drawing["num_inference_steps"]
    missing = [
        step for step in steps if undrawn(model, requests, place(step)[0], count, trained=place(step)[1])
    ]  # fmt: skip
    state.wait_for_everyone()  # before any of them draws
    saved = output_dir / "learning" / f"{name}.safetensors"
    learned = learned_set(model, lesson.squares(model.picture_side), lesson.prompts)
    with fine_tuned(model, learned, **how) as learner:
        if missing:
            learner.load(saved, key, missing[0])
        for step in steps:
            folder, trained = place(step)
            if step in missing and step > learner.done:
                learner.train_to(step, name)
                learner.save(saved, key)
            title = f"{name}: step {step}"
            drawn = draw(model, requests, folder, count, drawing["batch_size"], title, black=True, trained=trained)
            if not state.is_main_process:
                yield {}, []
                continue
            lines = [line | {"step": step} for line in labelled.judged(lesson.rows, drawn, name)]
            yield checkpoint(step, lines, lesson.value, labelled.slot), lines
    if state.is_main_process:
        saved.unlink(missing_ok=True)  # three times the weights, and of no more use
        with suppress(OSError):  # there was none, or another curve's is in it
            saved.parent.rmdir()


def checkpoint(step: int, lines: list[dict], value: str, slot: str) -> dict:
    """The scores of one checkpoint's lines: as ``accuracy`` has them, but of the concept the share that shows it."""
    found = metrics.scores(lines, value, slot)
    seen = proportion(not metrics.forgotten(line, value) for line in lines if line["set"] == "forget")
    kept = ("ira", "cra", "retained", "drawn_as")
    return {"step": step, "accuracy": seen} | {key: found[key] for key in kept}

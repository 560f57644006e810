"""Unlearning accuracy and retained accuracy: the same prompts and noise for every model, judged by one classifier.

``results.json`` (``format`` "salun-diffusion accuracy 1"; what it shares with others is in :mod:`eval.results` and
:mod:`eval.judging`) adds ``num_forget_images`` and ``num_retain_images`` to ``settings``, and to each model ``ua``,
``retained`` (by question: object, style, background, count, left_right), ``ira`` and ``cra`` (in-domain and
cross-domain retained accuracy: of these, the concept's own kind, and the other one of object and style), ``drawn_as``
(label → answers where the concept was asked for), ``retained_by_label`` (for each other word of the concept's kind),
and ``flipped`` (retain pictures whose objects were right with the base and are not now, ``lost``, and the reverse,
``gained``). The sets of ``samples.jsonl`` are "forget" and "retain".
"""

from pathlib import Path

from salun_diffusion.tables import aligned

from .judging import Judging
from .metrics import FORMAT, flipped, scores
from .results import write

PROTOCOL = (
    "accuracy/1: same prompts and starting noise for every model; the classifier's likeliest answer to each question; "
    "a forget picture is forgotten if the concept is the answer to no question of its kind; objects are right if every "
    "named one is seen, on whichever side, and left/right if a pair's are on their sides; Wilson 95% intervals"
)


def accuracy(
    pretrained_model_name_or_path: str,
    concept: str,
    erasure: list[str],
    output_dir: Path,
    *,
    revision: str | None = None,
    anchor: str | None = None,
    classifier: str | None = None,
    num_forget_images: int = 216,
    num_retain_images: int = 432,
    seed: int = 0,
    **options,
) -> dict:
    """Measure the base model and each erasure, write ``output_dir``'s files, print a table, return the results.

    Args:
        options: ``scale``, ``num_inference_steps``, ``guidance_scale``, ``batch_size``, as of
            :meth:`eval.judging.Judging.run`.

    Raises:
        SalunError: an unusable base, concept, erasure or classifier; an erasure that changes nothing; a picture that is
            not finite, wholly black, or cannot be classified (named, and no results are written).
    """
    judging = Judging(concept, anchor, pretrained_model_name_or_path, revision, classifier)
    found = judging.concept
    rows = [("forget", row) for row in found.forget_rows(num_forget_images, seed)]
    rows += [("retain", row) for row in found.retain_rows(num_retain_images, seed)]
    results, samples = judging.run(FORMAT, rows, output_dir, erasure=erasure, seed=seed, **options)
    results |= {"protocol": PROTOCOL}
    results["settings"] |= {"num_forget_images": num_forget_images, "num_retain_images": num_retain_images}
    if judging.state.is_main_process:
        for model in results["models"]:
            mine = [sample for sample in samples if sample["model"] == model["name"]]
            model |= scores(mine, found.value, found.slot) | {"flipped": flipped(samples[: len(rows)], mine)}
        write(output_dir, results, samples)
        print(table(results))
    return results


def table(metrics: dict) -> str:
    """The scores as aligned text, a model a line, in percent with their intervals."""
    questions = list(dict.fromkeys(question for model in metrics["models"] for question in model["retained"]))
    lines = [["", "UA", *questions]]
    for model in metrics["models"]:
        cells = [model["ua"], *(model["retained"].get(question) for question in questions)]
        shown = [f"{c['percent']:.1f} ({c['low']:.1f}-{c['high']:.1f})" if c else "-" for c in cells]
        lines.append([model["name"], *shown])
    return aligned(lines)

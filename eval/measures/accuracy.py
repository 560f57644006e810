"""Unlearning accuracy and retained accuracy: the same prompts and noise for every model, judged by one classifier.

``results.json`` (``format`` "salun-diffusion accuracy 1"; what it shares with others is in :mod:`eval.results` and
:mod:`eval.judges.labelled`) adds ``num_forget_images`` and ``num_retain_images`` to ``settings``, and to each model
``ua``, ``retained`` (by question: object, style, background, count, left_right, above_below), ``ira`` and ``cra``
(in-domain and cross-domain retained accuracy: of these, the concept's own kind, and the other one of object and style),
``drawn_as`` (label → answers where the concept was asked for), ``retained_by_label`` (for each other word of its kind),
and ``flipped`` (retain pictures whose objects were right with the base and are not now, ``lost``, and the reverse,
``gained``), ``instead`` (the shares of the forget pictures that show the "anchor", or "nothing", in the concept's
place), and of several concepts ``ua_by_concept`` (each by its own prompts; ``ua`` is that of all together: none of
them is seen). ``judged_right`` is the share of the base model's pictures of which the judge says all that the prompt
does, on whichever side: the judge's mistakes and the base model's in one. The sets of ``samples.jsonl`` are "forget"
and "retain".
"""

from dataclasses import dataclass

from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from . import Column

NAME = "accuracy"
SUMMARY = "unlearning accuracy (UA) and retained accuracy, by a classifier"
DESCRIPTION = """\
Draw the same labelled prompts, each from its own seed, with the base model and with each erasure, and classify every
picture.

UA (unlearning accuracy) is the share of the prompts that ask for the concept whose picture no longer shows it: high is
good. Retained accuracy is the share of all other prompts that are still drawn right: it should stay at the base
model's. IRA is that of the concept's own kind (other objects for an object), CRA that of the other (styles for an
object). All come with n and a Wilson 95% interval: around 96%, 432 prompts give one of about 94 to 97.5%."""
FORMAT = "salun-diffusion accuracy 1"
PROTOCOL = (
    "accuracy/1: same prompts and starting noise for every model; the classifier's likeliest answer to each question; "
    "a forget picture is forgotten if the concept is the answer to no question of its kind; objects are right if every "
    "named one is seen, on whichever side, and left/right if a pair's are on their sides; Wilson 95% intervals"
)


COLUMNS = {
    "ua": Column(
        "UA", "↑",
        "unlearning accuracy: the share of the pictures whose prompt asks for the concept but in which the classifier "
        "no longer finds it",
    ),
    "ira": Column(
        "IRA", "↑",
        "in-domain retained accuracy: of the prompts for everything else, the share still drawn right in the concept's "
        "own kind (other objects for an object, other styles for a style)",
    ),
    "cra": Column(
        "CRA", "↑",
        "cross-domain retained accuracy: the same for the other kind (styles for an object, objects for a style)",
    ),
    "as_anchor": Column(
        "drawn as anchor", "",
        "the share of the pictures whose prompt asks for the concept that show the anchor and no concept",
    ),
    "as_nothing": Column(
        "drawn as nothing", "", "the share of them that show no concept, and a smear where a thing should be"
    ),
}  # fmt: skip
SETS = {"forget": "Prompts that ask for it", "retain": "Prompts for everything else"}
GRID_ROWS = 6  # of each set, on a page
SHEET = {"forget": 5, "retain": 4}  # prompts of each set in a comparison's one picture


@dataclass
class Options(options.Labelled):
    """How many prompts of each set."""

    num_forget_images: int = option(216, "pictures that ask for the concept, a model", metavar="N", least=1)
    num_retain_images: int = option(432, "pictures that ask for anything else, a model", metavar="N", least=1)


def run(options: Options) -> dict:
    """Measure the base model and each erasure, write ``output_dir``'s files, print a table, return the results.

    Raises:
        SalunError: an unusable base, concept, erasure or classifier; an erasure that changes nothing; a picture that is
            not finite, wholly black, or cannot be classified (named, and no results are written).
    """
    from salun_diffusion.concepts.concept import shared_rows

    from ..judges import metrics
    from ..judges.labelled import Labelled
    from ..results import under, write

    labelled = Labelled(options)
    concepts, rows = labelled.concepts, []
    for kind, number in (("forget", options.num_forget_images), ("retain", options.num_retain_images)):
        parts = shared_rows(concepts, kind, number, options.seed, "evaluation")
        rows += [(kind, row) for part in parts for row in part]
    results, samples = labelled.run(FORMAT, rows)
    results |= {"protocol": PROTOCOL + under(results["settings"])}
    results["settings"] |= {
        "num_forget_images": options.num_forget_images, "num_retain_images": options.num_retain_images,
    }  # fmt: skip
    if labelled.state.is_main_process:
        for model in results["models"]:
            lines = [sample for sample in samples if sample["model"] == model["name"]]
            model |= metrics.scores(lines, labelled.label, labelled.slot)
            model |= {"instead": metrics.instead(lines, labelled.label, results["concept"]["anchor"])}
            if len(concepts) > 1:
                model["ua_by_concept"] = {
                    concept.value: metrics.unlearning(
                        [line for line in lines if line["set"] == "forget" and metrics.asked(line, concept.label)],
                        concept.label,
                    )
                    for concept in concepts
                }
            model |= {"flipped": metrics.flipped(samples[: len(rows)], lines)}
        results["judged_right"] = metrics.proportion(map(metrics.right_but_for_sides, samples[: len(rows)]))
        write(options.output_dir, results, samples)
        print(table(results))
    return results


def scores(model: dict) -> dict:
    """Column → score of a model of the results."""
    instead = model.get("instead", {})  # results of before it was counted have none
    return {key: model[key] for key in ("ua", "ira", "cra")} | {f"as_{name}": share for name, share in instead.items()}


def table(metrics: dict) -> str:
    """The scores as aligned text, a model a line, in percent with their intervals."""
    questions = list(dict.fromkeys(question for model in metrics["models"] for question in model["retained"]))
    lines = [["", "UA", *questions]]
    for model in metrics["models"]:
        cells = [model["ua"], *(model["retained"].get(question) for question in questions)]
        shown = [f"{c['percent']:.1f} ({c['low']:.1f}-{c['high']:.1f})" if c else "-" for c in cells]
        lines.append([model["name"], *shown])
        for name, score in model.get("ua_by_concept", {}).items():
            if score:
                alone = f"{score['percent']:.1f} ({score['low']:.1f}-{score['high']:.1f})"
                lines.append([f"  {name}", alone, *("" for _ in questions)])
    right = metrics["judged_right"]
    told = (
        f"In {right['percent']:.1f}% of the base model's {right['n']} pictures the judge sees all that was asked for; "
        "the rest are the base model's mistakes, or the judge's."
    )
    return aligned(lines) + f"\n{told}"

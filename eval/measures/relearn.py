"""Relearning: how many steps of fine-tuning on pictures of the concept bring it back?

``results.json`` (``format`` "salun-diffusion relearn 1"; what it shares with others is in :mod:`eval.results` and
:mod:`eval.judges.labelled`) adds the options of the training to ``settings``, ``learned_from`` (``source`` and ``n`` of
the pictures), and to each model ``learns`` (what), ``curve`` (a list, for each step ``step``, ``accuracy``: the share
of the prompts for what is learned whose picture shows it, and ``ira``, ``cra``, ``retained``, ``drawn_as`` as
``accuracy`` has them), ``half`` and ``most``: steps until that accuracy is half and 90% of ``base_accuracy``, which is
the base model's before any training; null where it is not reached, or where that is 0. Beside the base model and the
erasures there are controls: "ERASURE-benign", "control" and "retrained". A line of ``samples.jsonl`` has ``step``.
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from . import Column

NAME = "relearn"
SUMMARY = "does the concept come back when the model is fine-tuned on pictures of it?"
DESCRIPTION = """\
Fine-tune the base model and each erasure on pictures of the concept, and judge at some steps what it draws: the share
of the concept's prompts that show it again, and whether all else stays. An erasure that a few steps undo has hidden the
concept and not removed it.

Two controls tell what a number of steps means: the base model learning something new (the same pictures by a word that
it has no meaning for, or --control_pictures of a thing that it never saw), and, with --retrained, a model that was
trained without the concept. --benign adds each erasure fine-tuned on pictures of everything but the concept. A stopped
run goes on with the same command, and ends on the same bits."""
FORMAT = "salun-diffusion relearn 1"
LEVELS = {"half": 0.5, "most": 0.9}  # of the base model's accuracy
COLUMNS = {
    "relearn_half": Column(
        "steps to half", "↑",
        "optimizer steps of fine-tuning on pictures of the concept until it is drawn half as often as by the base "
        "model, between two checkpoints on a straight line; >N: not within the N steps that were tried",
    ),
    "relearn_most": Column("steps to 90%", "↑", "the same until it is drawn nine tenths as often as by the base model"),
    "relearned": Column(
        "relearned", "↓", "the share of the concept's prompts whose picture shows it after that many steps"
    ),
}  # fmt: skip


@dataclass
class Options(options.Labelled):
    """What is learned, how, and how it is tested."""

    pictures: Path | None = option(
        None,
        "pictures of the concept to learn from, with captions (metadata.jsonl, or a .txt beside each) or without "
        "(default: drawn by the base model from the concept's prompts)",
        metavar="FOLDER",
    )
    num_pictures: int = option(36, "pictures to learn from, at most", metavar="N", least=1)
    scope: str = option(
        "full",
        "which weights move: all of the network's, its cross-attention's (attn2), or a low-rank adapter's on every "
        "attention (lora, by peft)",
        ("full", "attn2", "lora"),
    )
    rank: int = option(4, "of --scope lora", metavar="R", least=1)
    learning_rate: float = option(1e-4, "Adam's", metavar="LR", least=0)
    train_batch_size: int = option(12, "pictures of a step", metavar="N", least=1)
    steps: list[int] = option(
        [0, 5, 10, 20, 40], "after which numbers of optimizer steps the model is tested", several=True, metavar="N",
        least=0,
    )  # fmt: skip
    num_forget_images: int = option(48, "pictures that ask for the concept, a test", metavar="N", least=1)
    num_retain_images: int = option(48, "pictures that ask for anything else, a test", metavar="N", least=1)
    benign: bool = option(
        False, "also fine-tune each erasure on pictures of everything but the concept: does it come back by itself?"
    )
    control_word: str = option(
        "zarp", "what the control learns to call the concept's pictures: a word without meaning", metavar="WORD"
    )
    control_pictures: Path | None = option(
        None, "the control learns these instead: a thing that the base model never saw", metavar="FOLDER"
    )
    control_name: str | None = option(None, "what they show, as the judge calls it", metavar="NAME")
    no_control: bool = option(False, "leave that control out")


def run(options: Options) -> dict:
    """Measure the base model, each erasure and the controls, write ``output_dir``'s files, print a table, return the
    results.

    Raises:
        SalunError: also for pictures that cannot be learned from, or a loss that is not finite.
    """
    from .. import subjects
    from ..judges.labelled import Labelled
    from ..relearning.curves import follow
    from ..relearning.lessons import Lessons
    from ..results import write

    steps = sorted({0, *options.steps})
    _check(options, steps)
    labelled = Labelled(options)
    if len(labelled.concepts) > 1:
        raise SalunError("relearn takes one --concept: measure each by itself.")
    lessons = Lessons(labelled, options)
    labelled.load(FORMAT)
    base, of_concept = labelled.model, lessons.of_the_concept(labelled.model)
    of_rest = lessons.of_all_else(base) if options.benign else None
    how = {key: getattr(options, key) for key in ("scope", "rank", "learning_rate", "seed")}
    how |= {"batch_size": options.train_batch_size}

    courses = [(base, model, of_concept, labelled.label) for model in labelled.models]
    courses += [(base, _control(model, f"{model['name']}-benign", "rest"), of_rest, "everything but the concept")
                for model in labelled.models[1:] if of_rest]  # fmt: skip
    if not options.no_control:
        told = f"{options.control_name}" if options.control_pictures else f"{labelled.label}, called {lessons.word}"
        courses.append((base, _control(labelled.models[0], "control", told), lessons.of_the_control(of_concept), told))
    if options.retrained:
        other, entry = subjects.retrained(base, options.retrained, labelled.models)
        courses.append((other, entry, of_concept, labelled.label))

    samples = []
    for model, entry, lesson, told in courses:
        entry |= {"learns": told, "curve": []}
        with subjects.applied(model.pipe, entry):
            for point, lines in follow(labelled, model, entry["name"], lesson, steps, how):
                entry["curve"].append(point)
                samples += lines
    labelled.models = [entry for _, entry, _, _ in courses]
    results = labelled.told(FORMAT, len(steps) * len(lessons.rows))
    if labelled.state.is_main_process:
        results |= _told(options, steps, len(of_concept.pictures), how)
        results["settings"] |= results.pop("training")
        ceiling = labelled.models[0]["curve"][0]["accuracy"]["percent"]
        for entry in labelled.models:
            entry |= summary(entry["curve"], ceiling)
        write(options.output_dir, results, samples)
        print(table(results))
    return results


def _check(options: Options, steps: list[int]) -> None:
    """Raise SalunError for options that do not go together."""
    if options.lora:
        raise SalunError("relearn trains the network itself, which --lora would sit in: leave --lora out.")
    if steps == [0]:
        raise SalunError("--steps names no step after 0: give some, such as 0 5 10 20 40.")
    if (options.control_pictures is None) != (options.control_name is None):
        raise SalunError("--control_pictures and --control_name belong together: give both, or neither.")
    if options.no_control and options.control_pictures:
        raise SalunError("--no_control leaves out what --control_pictures is for: give one of them.")


def _control(model: dict, name: str, lesson: str) -> dict:
    """The entry of a control that is ``model`` taught something else; its digest is none that others measure."""
    from salun_diffusion.files import key_of

    return model | {"name": name, "role": "control", "digest": key_of([model["digest"], lesson], 12)}


def _told(options: Options, steps: list[int], count: int, how: dict) -> dict:
    """What the results say of the protocol and the training."""
    source = str(options.pictures) if options.pictures else "drawn by the base model"
    moved = {"full": "all weights", "attn2": "the cross-attention", "lora": f"a LoRA of rank {options.rank} (peft)"}
    training = {key: how[key] for key in ("scope", "learning_rate")} | {
        "train_batch_size": how["batch_size"], "steps": steps, "num_pictures": options.num_pictures,
        "num_forget_images": options.num_forget_images, "num_retain_images": options.num_retain_images,
    }  # fmt: skip
    return {
        "protocol": f"relearn/1: {moved[options.scope]} fine-tuned on {count} pictures of the concept "
        f"({'given' if options.pictures else source}), Adam, learning rate {options.learning_rate:g}, batch "
        f"{options.train_batch_size}, no warm-up, seed {options.seed}; tested at steps {', '.join(map(str, steps))} by "
        "the same prompts and starting noise, the classifier's likeliest answer; steps to half and to 90% of the base "
        "model's accuracy on a straight line between checkpoints; Wilson 95% intervals",
        "learned_from": {"source": source, "n": count},
        "own_prompts": not options.no_control,
        "training": training | ({"rank": options.rank} if options.scope == "lora" else {}),
    }


def summary(curve: list[dict], ceiling: float) -> dict:
    """``base_accuracy``, and for each of ``LEVELS`` the steps until the curve reaches that share of it."""
    from salun_diffusion.stats import crossing

    points = [(point["step"], point["accuracy"]["percent"]) for point in curve]
    found = {name: crossing(points, level * ceiling) if ceiling else None for name, level in LEVELS.items()}
    return {"base_accuracy": ceiling} | {
        name: None if steps is None else round(steps, 1) for name, steps in found.items()
    }


def scores(model: dict) -> dict:
    """Column → score of a model of the results."""
    last = model["curve"][-1]
    steps = {f"relearn_{name}": _steps(model, name) for name in LEVELS} if model["base_accuracy"] else {}
    return steps | {f"relearned:{last['step']} steps": last["accuracy"]}


def is_subject(model: dict, value: str) -> bool:
    """Whether a model of the results is the base or an erasure that learns the concept ``value``, and no control."""
    return model["learns"] == value and (model["role"] == "base" or model["erasure"] is not None)


def _steps(model: dict, level: str) -> float | str:
    return f">{model['curve'][-1]['step']}" if model[level] is None else model[level]


def table(results: dict) -> str:
    """The curves as aligned text: the share that shows what is learned at each step, with its interval."""
    steps = [point["step"] for point in results["models"][0]["curve"]]
    lines = [["", "learns", *(f"step {step}" for step in steps), "to half", "to 90%", f"kept at {steps[-1]}"]]
    for model in results["models"]:
        shares = [point["accuracy"] for point in model["curve"]]
        cells = [f"{share['percent']:.0f} ({share['low']:.0f}-{share['high']:.0f})" for share in shares]
        kept = next(iter(model["curve"][-1]["retained"].values()), None)
        lines.append([
            model["name"], model["learns"], *cells,
            *(str(_steps(model, level)) if model["base_accuracy"] else "-" for level in LEVELS),
            f"{kept['percent']:.0f} ({kept['low']:.0f}-{kept['high']:.0f})" if kept else "-",
        ])  # fmt: skip
    return aligned(lines) + (
        "\nPercent of the prompts for what is learned whose picture shows it, by optimizer steps; then the steps until "
        "that is half and 90% of the base model's share before any; then what is kept of everything else."
    )

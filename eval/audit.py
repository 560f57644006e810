"""Everything at once about one run: is the concept gone or only hidden, and at what cost? One page with the verdict."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.files import read_json, write_json
from salun_diffusion.options import option

from . import options
from .attacks import ATTACKS, BUDGETS
from .measures import accuracy, attack, composition, probe, relearn
from .pages import report

NAME = "audit"
SUMMARY = "accuracy, composition, attacks, relearning and probing of one run, and a page with the verdict"
DESCRIPTION = """\
Measure a run folder with accuracy, composition (where the base model's prompts ask for what it counts), attack,
relearn and probe, each with the same judge and seed, and write the page report.html with what it all comes to: is the
concept gone or only hidden, and what did the erasure cost? Base model and concept are those that the run was made with.
What was drawn already is kept, and a stopped audit goes on; each measure's results lie in the run's folder of its name,
accuracy's in the run itself, and `compare` takes them. The small budget is as much as shows something on a small model;
the published one asks what the papers ask, which on Stable Diffusion takes a GPU for hours."""
FORMAT = "salun-diffusion audit 1"
BATTERY = ["concept_inversion", "unlearndiffatk", "ring_a_bell", "tina", "noise_probe"]
# how many pictures each measure takes, by the budget, where that is not the measure's own default
PICTURES = {
    "accuracy": {"small": {"num_forget_images": 96, "num_retain_images": 192}, "published": {}},
    "composition": {"small": {"num_images": 48}, "published": {}},
    "attack": {"small": {"num_prompts": 24}, "published": {}},
    "relearn": {"small": {}, "published": {"steps": [0, 5, 10, 20, 40, 80, 160]}},
    "probe": {"small": {}, "published": {}},
}


@dataclass
class Options(options.Judged):
    """Which run, and how much of it is asked."""

    erasure: list[str] = option(
        [], "the run folder; any others are controls, as of accuracy", several=True, metavar="RUN", required=True
    )
    pretrained_model_name_or_path: str | None = option(
        None, "the base model (default: the one that the run was made with)", metavar="BASE"
    )
    concept: list[str] | None = option(None, "what was erased (default: what the run erased)", metavar="NAME")
    budget: str = option("small", "how much is drawn and tried", BUDGETS)
    attack: list[str] = option(BATTERY, "which attacks", ATTACKS, several=True)
    num_forget_images: int | None = option(
        None, "pictures of the concept for accuracy, and a test of relearning (default: by --budget)", metavar="N",
        least=1,
    )  # fmt: skip
    num_retain_images: int | None = option(None, "the same of everything else", metavar="N", least=1)
    num_images: int | None = option(None, "pictures of each task of composition", metavar="N", least=1)
    num_prompts: int | None = option(None, "prompts an attack", metavar="N", least=1)
    steps: list[int] | None = option(None, "when relearning is tested", several=True, metavar="N", least=0)
    benign: bool = option(False, "also fine-tune on pictures of everything but the concept")
    retrained: str | None = option(
        None, "a model of the same kind that was trained without the concept, to compare with", metavar="MODEL"
    )

    @property
    def output_dir(self) -> Path:
        """The run folder, which all results go into."""
        return Path(self.erasure[0])


def run(options: Options) -> dict:
    """Measure, write ``audit.json`` and the page; print and return the verdict.

    Raises:
        SalunError: no run folder, or what a measure refuses.
    """
    from .pages.sections import verdict
    from .results import read

    folder = options.output_dir
    options = _completed(options, folder)
    measures = [accuracy, *([composition] if _composes(options) else []), attack, relearn, probe]
    for number, measure in enumerate(measures, 1):
        print(f"{number} of {len(measures)}: {measure.NAME}, {measure.SUMMARY}", flush=True)
        measure.run(_options(measure, options, folder if measure is accuracy else folder / measure.NAME))
    found = verdict(folder, read(folder))
    about = {"format": FORMAT, "budget": options.budget, "measures": [measure.NAME for measure in measures]}
    write_json(folder / "audit.json", about | found)
    page = report.report(folder)
    print(f"\n{found['headline']}.")
    for finding in found["findings"]:
        print(f"  {finding['asks']} {finding['mark'].capitalize()}. {finding['says']}")
    print(f"With pictures: {page}")
    return about | found


def check(config) -> None:
    """Whether the run that an ``EraseConfig`` will make can be audited without another word, before the long work.

    Raises:
        SalunError: several concepts, or a base model that brings no judge.
    """
    from salun_diffusion.models.load import resolve

    if len(config.concept) > 1:
        raise SalunError(
            f"--audit is for one concept, not {', '.join(config.concept)}: erase them without it, and audit one at a "
            "time by `python -m eval audit --erasure RUN --concept NAME`."
        )
    where, _ = resolve(config.pretrained_model_name_or_path, config.revision)
    if not (Path(where) / "judge").is_dir():
        raise SalunError(
            f"--audit needs a judge, and {config.pretrained_model_name_or_path} brings none: erase without it, then "
            "give `python -m eval audit --erasure RUN` a --classifier or --judge clip."
        )


def _completed(options: Options, folder: Path) -> Options:
    """What was not given, from the run's config.json.

    Raises:
        SalunError: there is none, or the run erased several concepts and none was named.
    """
    try:
        config = read_json(folder / "config.json")
        told, base = config["settings"], config["base_model"]
        concepts = options.concept or told["concept"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SalunError(
            f"{folder} is no finished run of erase_concept.py (no config.json that names base model and concept): give "
            "a run folder as --erasure."
        ) from None
    if len(concepts) > 1:
        raise SalunError(f"{folder} erased {', '.join(concepts)}: audit one at a time, by --concept NAME.")

    def own(name: str) -> list[str] | None:
        """What the run was told of this concept: one for all of its concepts, or one for each."""
        values = told.get(name) or []
        if len(values) > 1:
            values = [value for value, of in zip(values, told["concept"], strict=True) if of == concepts[0]]
        return values or None

    given = options.pretrained_model_name_or_path
    return replace(
        options,
        concept=concepts,
        pretrained_model_name_or_path=given or base,
        revision=options.revision if given else options.revision or config.get("base_revision"),
        concept_type=options.concept_type or own("concept_type"),
        anchor=options.anchor or own("anchor"),
    )


def _composes(options: Options) -> bool:
    """Whether the base model's prompts ask for what ``composition`` counts, and a classifier can answer it."""
    from salun_diffusion.concepts.finding import find_concepts
    from salun_diffusion.models.load import resolve

    where, commit = resolve(options.pretrained_model_name_or_path, options.revision)
    if options.judge != "classifier" or commit is not None:
        return False
    concept = find_concepts(options.concept, Path(where), options.anchor, options.concept_type)[0]
    return bool(composition.task_rows(concept, 1, options.seed))


def _options(measure, options: Options, output_dir: Path):
    """The measure's own options: those that are the audit's too, and the budget's numbers."""
    names = [item.name for item in fields(measure.Options) if item.name != "output_dir"]
    shared = {name: getattr(options, name) for name in names if hasattr(options, name)}
    counts = ("num_forget_images", "num_retain_images", "num_images", "num_prompts", "steps")
    given = {name: value for name, value in shared.items() if name not in counts or value is not None}
    return measure.Options(**PICTURES[measure.NAME][options.budget] | given, output_dir=output_dir)

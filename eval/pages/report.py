"""One self-contained page, ``report.html``, from what a run folder holds and from nothing else; and one picture of the
same, ``before-after.png``, for where a page cannot go.

It needs ``config.json`` (erase_concept.py), ``results.json``, ``samples.jsonl`` and the pictures these name
(``python -m eval accuracy``); ``training.jsonl`` and ``mask.safetensors`` each add a chart, and so do the results of
``attack``, ``relearn`` and ``probe`` in folders of these names.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option

from ..measures.accuracy import FORMAT

NAME = "report"
SUMMARY = "one self-contained HTML page from a run folder"
DESCRIPTION = """\
Read what a run folder holds (config.json, results.json, samples.jsonl, pictures/; training.jsonl and mask.safetensors
if they are there) and write report.html: pictures before and after, scores with intervals, the loss curve, where the
salient weights lie; and from relearn/ and probe/ below it, where these commands were given that --output_dir, how fast
the concept comes back and what changes inside the network. The page needs no other file and no network."""
NEIGHBOURS = 4  # words beside the anchor that count as the concept's neighbours
QUESTIONS = {
    "object": ("Objects", "every object that the prompt names is there, on whichever side"),
    "style": ("Style", "drawn in the style that the prompt names"),
    "background": ("Background", "on the background colour that the prompt names"),
    "count": ("Count", "as many objects as the prompt asks for"),
    "left_right": ("Left and right", "prompts with two different objects: each on its own side"),
    "above_below": ("Above and below", "prompts with two different objects: the one above that should be"),
}


@dataclass
class Options:
    """The run, and where its page goes."""

    run_dir: Path = option(
        None, "the folder that erase_concept.py and `accuracy` wrote", metavar="RUN_DIR", positional=True,
        required=True,
    )  # fmt: skip
    output: Path | None = option(None, "where the page goes (default: RUN_DIR/report.html)", metavar="FILE")


def run(options: Options) -> Path:
    """:func:`report` as a command."""
    return report(options.run_dir, options.output)


def report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page and return its path.

    Raises:
        SalunError: a file that is missing, damaged, or belongs to another run.
    """
    from markupsafe import Markup

    from salun_diffusion.erasures.mask import describe, load_masks

    from ..results import read, read_samples
    from . import charts
    from .grid import columns, name_models, picture_rows, render
    from .sections import sections

    config = _json(run_dir / "config.json", "erase_concept.py")
    metrics = read(run_dir)
    if metrics["format"] != FORMAT:
        raise SalunError(f"{run_dir} holds '{metrics['format']}': the report is made of '{FORMAT}'.")
    concept = metrics.get("concept")
    if not isinstance(concept, dict) or not {"name", "slot", "value"} <= {*concept} or "settings" not in metrics:
        raise SalunError(f"{run_dir}/results.json is damaged: run `python -m eval accuracy` again.")
    erased = [config.get("concept"), *config.get("settings", {}).get("concept", [])]
    if metrics["concept"]["name"] not in erased:
        raise SalunError(
            f"{run_dir} erased '{config['concept']}' but its results.json is about '{metrics['concept']['name']}': "
            "run `python -m eval accuracy` for this run."
        )
    samples = list(read_samples(run_dir, metrics).values())
    training = run_dir / "training.jsonl"
    mask = run_dir / "mask.safetensors"
    erasure = run_dir / "erasure.safetensors"

    titles = name_models(metrics["models"])
    neighbours = find_neighbours(metrics)
    chosen = choose(samples[0], metrics["concept"]["value"], metrics["concept"]["slot"], list(neighbours))
    drawn = [(run_dir, part) for part in samples]
    page = render(
        "report.html.j2",
        concept=metrics["concept"],
        metrics=metrics,
        config=config,
        config_settings=_settings(config),
        measured_settings=_settings({"settings": metrics["settings"], "versions": metrics["versions"]}),
        models=[model | {"title": title} for model, title in zip(metrics["models"], titles, strict=True)],
        questions={key: text for key, text in QUESTIONS.items() if key in metrics["models"][0]["retained"]},
        neighbours=neighbours,
        groups={group: picture_rows(drawn, indices, metrics["concept"]) for group, indices in chosen.items()},
        loss_chart=Markup(charts.losses(_lines(training, "erase_concept.py"))) if training.exists() else None,
        saliency_chart=Markup(charts.saliency(row[:3] for row in describe(load_masks(mask)[0])))
        if mask.exists() and metrics["models"][1]["erasure"]["density"] != 1
        else None,
        size=erasure.stat().st_size if erasure.exists() else None,
        **sections(run_dir, metrics),
    )
    some = [*chosen["forget"][:5], *chosen["near"][:2], *chosen["far"][:2]]
    charts.before_after([(titles, columns(drawn, some))]).save(run_dir / "before-after.png")
    output = output or run_dir / "report.html"
    output.write_text(page, encoding="utf-8")
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return output


def find_neighbours(metrics: dict) -> dict[str, float | None]:
    """The words closest to the concept → by how many points their retained accuracy fell: the anchor (of several
    concepts, each one's), then those that fell the most (at most a third of all words, so that there are unrelated ones
    too).
    """
    base, main = (model["retained_by_label"] for model in metrics["models"][:2])
    fell = {label: round(base[label]["percent"] - main[label]["percent"], 1) for label in base if label in main}
    anchors = metrics["concept"].get("anchors", [metrics["concept"]["anchor"]])
    worst = sorted(
        (label for label in fell if label not in anchors and fell[label] > 0), key=lambda label: (-fell[label], label)
    )
    return {label: fell.get(label) for label in (*anchors, *worst[: min(NEIGHBOURS, len(fell) // 3)])}


def choose(rows: list[dict], value: str, slot: str, neighbours: list[str]) -> dict[str, list[int]]:
    """Which rows the grid shows, as indices: by their prompts and positions alone, so that no picture is preferred."""
    from ..judges.metrics import OBJECT_QUESTIONS
    from .grid import ROWS, spread

    def words(row: dict) -> set[str]:
        questions = (slot,) if slot in row["expect"] else OBJECT_QUESTIONS
        return {row["expect"][question] for question in questions if question in row["expect"]}

    forget = [i for i, row in enumerate(rows) if row["set"] == "forget"]
    retain = [i for i, row in enumerate(rows) if row["set"] == "retain"]
    near: list[int] = []
    queues = [[i for i in retain if word in words(rows[i])] for word in neighbours]
    for i in (queue[turn] for turn in range(ROWS) for queue in queues if turn < len(queue)):
        if i not in near:  # one row for each word, then a second for each; a pair of two neighbours is in both queues
            near.append(i)
    far = [i for i in retain if not words(rows[i]) & set(neighbours)]
    return {"forget": spread(forget, rows), "near": near[:ROWS], "far": spread(far, rows)}


def _settings(config: dict) -> dict[str, str]:
    """Nested settings as name → text: config.json repeats some at two levels, and they are shown once."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        for name, inner in (_settings(value) if isinstance(value, dict) else {key: value}).items():
            flat.setdefault(name, inner if isinstance(inner, str) else json.dumps(inner))
    return flat


def _read(path: Path, maker: str) -> str:
    if not path.is_file():
        raise SalunError(f"{path} is missing: the report needs a run folder, and {maker} writes this file into it.")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise SalunError(f"{path} is damaged (it is no text in UTF-8): run {maker} again.") from None


def _json(path: Path, maker: str) -> dict:
    text = _read(path, maker)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SalunError(f"{path} is damaged ({error}): run {maker} again.") from None
    if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict) or "concept" not in found:
        raise SalunError(f"{path} is damaged (it names no concept): run {maker} again.")
    return found


def _lines(path: Path, maker: str) -> list[dict]:
    lines = []
    for number, line in enumerate(_read(path, maker).splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            raise SalunError(f"{path}, line {number}, is damaged: run {maker} again.") from None
    if not lines:
        raise SalunError(f"{path} is empty: run {maker} again.")
    return lines

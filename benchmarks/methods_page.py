"""docs/methods.md's table and plot from the results of ``python -m benchmarks.methods``."""

import json
from pathlib import Path

from salun_diffusion.methods import find_method
from salun_diffusion.stats import crossing, wilson
from salun_diffusion.tables import markdown, put_into

DOCS = Path(__file__).parent.parent / "docs"
BASE = "base"
FURTHER = {"salun_further": "salun", "salun_adv_further": "salun_adv"}  # rows whose settings took more trials → method
TITLES = {BASE: "Base model", "salun_further": "SalUn, tuned further",
          "salun_adv_further": "SalUn, adversarial, with those settings"}  # fmt: skip
COLUMNS = ("UA", "IRA", "CRA", "background", "count", "places")
INSTEAD = {"anchor": "drawn as anchor", "nothing": "as nothing"}
ATTACKS = {
    "concept_inversion": "learned token", "unlearndiffatk": "UnlearnDiffAtk", "ring_a_bell": "Ring-A-Bell",
    "tina": "TINA", "noise_probe": "noise",
}  # fmt: skip


def write(found: dict) -> None:
    parts = [table(found, kind) + "\n\n" + _chosen(found, kind) for kind in found["concepts"]]
    put_into(DOCS / "methods.md", "methods", "\n\n".join([*parts, _protocol(found)]))
    put_into(DOCS / "methods.md", "frontier", frontier(found))
    put_into(DOCS / "methods.md", "hidden", "\n\n".join(hidden(found, kind) for kind in found["concepts"]))
    _plot(found, DOCS / "methods.png")


def pooled(shares: list[dict]) -> dict:
    """The share over all of several counts together, in percent, with its Wilson 95% interval."""
    count, n = (sum(share[key] for share in shares) for key in ("count", "n"))
    return wilson(count, n, digits=10)


def shares_by_column(concepts: list[dict], method: str) -> dict[str, list[dict]]:
    """Column → a share for each concept."""
    rows = [next(row for row in concept["models"] if row["method"] == method) for concept in concepts]
    found = {
        "UA": [row["ua"] for row in rows],
        "IRA": [row["ira"] for row in rows],
        "CRA": [row["cra"] for row in rows],
    }
    for name in INSTEAD:
        found[name] = [row["instead"][name] for row in rows if "instead" in row]
    for column, questions in (
        ("background", ("background",)),
        ("count", ("count",)),
        ("places", ("left_right", "above_below")),
    ):
        found[column] = [share for row in rows for key, share in row["retained"].items() if key in questions]
    return found


def shown(share: dict) -> str:
    return f"{share['percent']:.1f} ({share['low']:.1f}–{share['high']:.1f})"


def summary(concepts: list[dict], method: str) -> dict:
    """One method over all concepts of a kind: pooled shares by column, and means of what it cost."""
    shares = shares_by_column(concepts, method)
    found = {column: pooled(mine) for column, mine in shares.items()}
    found["retained"] = pooled([share for column in COLUMNS[1:5] for share in shares[column]])
    if method != BASE:
        rows = [next(row for row in concept["models"] if row["method"] == method) for concept in concepts]
        costs = ("seconds", "wall_seconds", "peak_gib", "megabytes")
        found |= {key: sum(row[key] for row in rows) / len(rows) for key in costs}
    return found


def _rows(found: dict, kind: str) -> list[str]:
    """The models of a table, in order."""
    return [BASE, *found["chosen"][kind], *FURTHER]


def _title(method: str) -> str:
    return TITLES.get(method) or find_method(method).title


def table(found: dict, kind: str) -> str:
    concepts = found["concepts"][kind]
    names = ", ".join(concept["concept"] for concept in concepts)
    rows = [["", *COLUMNS[:3], *INSTEAD.values(), *COLUMNS[3:], "training, s", "whole run, s", "peak, GiB", "file, MB"]]
    for method in _rows(found, kind):
        about = summary(concepts, method)
        cells = [shown(about[column]) for column in (*COLUMNS[:3], *INSTEAD, *COLUMNS[3:])]
        costs = [("seconds", ".0f"), ("wall_seconds", ".0f"), ("peak_gib", ".2f"), ("megabytes", ".2f")]
        cells += ["" if method == BASE else format(about[key], how) for key, how in costs]
        rows.append([_title(method), *cells])
    return f"**{kind.capitalize()}s** ({names})\n\n{markdown(rows)}"


def hidden(found: dict, kind: str) -> str:
    """What attacks and fine-tuning bring back, as a table pooled over the kind's concepts."""
    concepts = [concept for concept in found["concepts"][kind] if {"attack", "relearn"} <= concept["protocols"].keys()]
    if not concepts:
        return f"**{kind.capitalize()}s**: not measured yet."
    methods = _rows(found, kind)
    models = [
        [next(m for m in concept["models"] if m["method"] == method) for concept in concepts] for method in methods
    ]
    steps = [step for step in models[0][0]["relearned"] if step != "0"]
    rows = [["", *ATTACKS.values(), *(f"relearned, {step} steps" for step in steps), "steps to half"]]
    ceiling = pooled([model["relearned"]["0"] for model in models[0]])["percent"]
    for method, mine in zip(methods, models, strict=True):
        curve = {step: pooled([model["relearned"][step] for model in mine]) for step in ("0", *steps)}
        points = [(int(step), share["percent"]) for step, share in curve.items()]
        half = crossing(points, ceiling / 2)
        rows.append([
            _title(method), *(shown(pooled([model["attacks"][name] for model in mine])) for name in ATTACKS),
            *(shown(curve[step]) for step in steps), f">{steps[-1]}" if half is None else f"{half:.0f}",
        ])  # fmt: skip
    names = ", ".join(concept["concept"] for concept in concepts)
    return f"**{kind.capitalize()}s** ({names})\n\n{markdown(rows)}\n\n" + " ".join(
        f"{concepts[0]['protocols'][measure]}." for measure in ("attack", "relearn")
    )


def frontier(found: dict) -> str:
    """SalUn by its settings, as a table pooled over the frontier's concepts."""
    concepts = found["frontier"]
    names = ", ".join(concept["concept"] for concept in concepts)
    rows = [[f"SalUn ({names})", *COLUMNS]]
    for name in (model["method"] for model in concepts[0]["models"]):
        shares = shares_by_column(concepts, name)
        cells = [shown(pooled(shares[column])) for column in COLUMNS]
        rows.append([TITLES.get(name, name), *cells])
    return markdown(rows)


def _chosen(found: dict, kind: str) -> str:
    def said(settings: dict) -> str:
        words = [f"{'lr' if k == 'learning_rate' else k} {v}" for k, v in settings.items() if k != "method_option"]
        return ", ".join(words + settings.get("method_option", []))

    tuned = found["config"]["tuning"][kind]
    listed = "; ".join(f"{_title(method)} {said(own)}" for method, own in found["chosen"][kind].items())
    return f"Chosen on {tuned}: {listed}. {_title('salun_further')}: {said(found['config']['further'][kind])}."


def _protocol(found: dict) -> str:
    config, about = found["config"], found["about"]
    first = next(iter(found["concepts"].values()))[0]
    images, trained = config["images"], {kind: config["settings"][kind]["trained"] for kind in found["concepts"]}
    steps = ", ".join(f"{own['max_train_steps']} for {kind}s" for kind, own in trained.items())
    batches = {own["train_batch_size"] for own in trained.values()}
    trials = {len(grid) for grid in config["grid"].values()}
    return (
        f"{images['table']['num_forget_images']} forget and {images['table']['num_retain_images']} retain pictures a "
        f"concept and model ({images['tuning']['num_forget_images']} and {images['tuning']['num_retain_images']} a "
        f"trial), pooled over the concepts; Wilson 95% intervals. {'/'.join(map(str, sorted(trials)))} trials for each "
        f"method and kind. Trained methods take as many steps ({steps}) of "
        f"{'/'.join(map(str, sorted(batches)))} pictures, cosine schedule. UA: pictures without the concept, asked "
        "for it. IRA: the other things of its kind; CRA: styles for an object, objects for a style; background, count "
        "and places (left and right, above and below): what else the prompts ask for. Training: the mask too. Whole "
        f"run: loading and encoding too; on one core, {about['cores']} erasures side by side. SalUn came first "
        f"and drew the pictures that others use again. {first['protocols']['accuracy'].split(':')[0]}, base model "
        f"{config['digest']}, classifier {first['classifier'][:12]}, torch {first['versions']['torch']}, diffusers "
        f"{first['versions']['diffusers']}. "
        "Made by `python -m benchmarks.methods`; every number is in `docs/results/methods.json`, the trials in "
        "`docs/results/methods-trials.json`."
    )


def _plot(found: dict, path: Path) -> None:
    """What is forgotten and what is kept, a method a line, those that do both first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(found["concepts"])
    about = {
        (kind, method): summary(found["concepts"][kind], method) for kind in kinds for method in _rows(found, kind)
    }
    methods = list(dict.fromkeys(method for _, method in about if method != BASE))
    methods.sort(key=lambda method: sum(_both(about[kind, method]) for kind in kinds if (kind, method) in about))
    panels = {"UA": "forgotten: UA, %", "retained": "kept: IRA, CRA, background and count, %"}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.32 * len(methods) + 1.2), sharey=True)
    for axis, (share, title) in zip(axes, panels.items(), strict=True):
        for number, kind in enumerate(kinds):
            mine = [about[kind, method][share] for method in methods]
            lines = [i + 0.22 * (len(kinds) / 2 - 0.5 - number) for i in range(len(methods))]
            spread = [[one["percent"] - one["low"] for one in mine], [one["high"] - one["percent"] for one in mine]]
            names = ", ".join(concept["concept"] for concept in found["concepts"][kind])
            axis.errorbar([one["percent"] for one in mine], lines, xerr=spread, fmt="os"[number % 2],
                          color=f"C{number}", elinewidth=1, markersize=5, label=f"{kind}s: {names}")  # fmt: skip
            base = about[kind, BASE][share]["percent"]
            axis.axvline(base, color=f"C{number}", linewidth=0.8, linestyle=":")
        axis.set(title=title, yticks=range(len(methods)), yticklabels=[_title(method) for method in methods])
        axis.grid(axis="y", alpha=0.25)
    axes[1].annotate("dotted: base model", (0.02, 0.02), xycoords="axes fraction", fontsize=8, color="grey")
    axes[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.04), frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _both(about: dict) -> float:
    """By which the plot's lines are sorted: the worse of what is forgotten and what is kept, then the other."""
    shares = about["UA"]["percent"], about["retained"]["percent"]
    return min(shares) + max(shares) / 1000


def pictures(found: dict, folder: Path, concept: str, count: int = 6) -> None:
    """docs/methods-pictures.png: evenly spaced prompts for ``concept`` and for the rest, a model a row.

    Args:
        found: the committed results.
        concept: whose pictures.
        count: how many for each method.
        folder: of the concept, as the comparison left it.
    """
    kind = next(kind for kind, concepts in found["config"]["concepts"].items() if concept in concepts)
    methods, images = _rows(found, kind), found["config"]["images"]["table"]
    forget, total = images["num_forget_images"], sum(images.values())
    names = [f"forget-{i:04d}" for i in range(0, forget, forget // count)][:count]
    names += [f"retain-{i:04d}" for i in range(forget, total, (total - forget) // count)][:count]
    rows = {method: [folder / "pictures" / method / f"{name}.png" for name in names] for method in methods}
    headings = {0: f"asked for: {concept}", count: "asked for: anything else"}
    _sheet(rows, headings, DOCS / "methods-pictures.png")


def won_pictures(found: dict, folder: Path, kind: str) -> None:
    """docs/methods-attacks.png: the first pictures that each attack won from each model.

    Args:
        found: the committed results.
        folder: of a concept, as the comparison left it.
        kind: of the concept.
    """
    methods = _rows(found, kind)
    won: dict[tuple[str, str], dict[str, Path]] = {}  # each share of the models has the base model's beside its own
    for share in sorted(folder.glob("attack/*/samples.jsonl")):
        lines = map(json.loads, share.read_text(encoding="utf-8").splitlines())
        for line in filter(lambda line: line["won"], lines):
            won.setdefault((line["model"], line["set"]), {})[line["picture"]] = share.parent / line["picture"]
    few = 3
    rows = {
        method: sum((_filled([*won.get((method, attack), {}).values()], few) for attack in ATTACKS), [])
        for method in methods
    }
    _sheet(rows, {few * i: title for i, title in enumerate(ATTACKS.values())}, DOCS / "methods-attacks.png")


def _filled(paths: list[Path], count: int) -> list[Path | None]:
    return (paths + [None] * count)[:count]


def _sheet(rows: dict[str, list[Path | None]], headings: dict[int, str], path: Path) -> None:
    """A picture of pictures, a method a row, nothing where there is None; ``headings`` stand over their columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    columns = len(next(iter(rows.values())))
    figure, axes = pyplot.subplots(len(rows), columns, figsize=(columns * 0.8 + 1.6, len(rows) * 0.8))
    for row, (method, paths) in zip(axes, rows.items(), strict=True):
        for axis, found in zip(row, paths, strict=True):
            if found:
                axis.imshow(Image.open(found))
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        row[0].set_ylabel(_title(method), rotation=0, ha="right", va="center", fontsize=9)
    for column, heading in headings.items():
        axes[0][column].set_title(heading, loc="left", fontsize=9)
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    figure.savefig(path, dpi=80, bbox_inches="tight", pil_kwargs={"optimize": True})  # 64 pixels as they are
    pyplot.close(figure)

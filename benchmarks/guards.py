"""Every guard on the demo model, beside the unguarded pipeline: ``python -m benchmarks.guards``.

Each is made with the demo model's own settings and those of ``SETTINGS``, and its pictures are judged as those of an
erasure are; all of it on one core, for the seconds a picture. What ``--output_dir`` holds already is not made again.
``docs/results/guards.json`` and the table of docs/guards.md are written in the end (``--write_only``: from the
committed JSON alone).
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.files import read_json, write_json
from salun_diffusion.methods import METHODS, find_method
from salun_diffusion.options import option, run_command
from salun_diffusion.tables import markdown, put_into

from .erasing import CORES, base_digest, run
from .methods_page import DOCS, shown

RESULTS = DOCS / "results" / "guards.json"
# beside what demo/settings.json says
SETTINGS = {"concept_steerers": {"strength": 0.6}, "egloce": {"step_size": 0.1}}
KEPT = {kind: f"{kind}s kept ↑" for kind in ("object", "style", "background", "count")}


@dataclass
class GuardsConfig:
    """The options of ``python -m benchmarks.guards``."""

    concept: str = option("airplane", "what is guarded against")
    num_forget_images: int = option(96, "pictures of the concept that are measured, a guard", least=1)
    num_retain_images: int = option(96, "pictures of all else", least=1)
    output_dir: str = option("runs/guards", "the guards and their measurements")
    write_only: bool = option(False, "the table alone, from the committed results")


def measure(options: GuardsConfig) -> None:
    """Make, measure and write, as the module's docstring says."""
    if not options.write_only:
        write_json(RESULTS, results(options))
    put_into(DOCS / "guards.md", "guards", table(read_json(RESULTS)))


def results(options: GuardsConfig) -> dict:
    """What docs/results/guards.json holds."""
    base, core = base_digest("demo"), CORES[0]
    folder = Path(options.output_dir) / base / options.concept
    names = [name for name in METHODS if find_method(name).guard]
    demo = "--pretrained_model_name_or_path", "demo", "--concept", options.concept
    for name in names:
        if not (folder / name / "config.json").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            own = [word for key, value in SETTINGS.get(name, {}).items() for word in (f"--{key}", value)]
            words = "erase_concept.py", *demo, "--method", name, "--output_dir", folder / name, *own
            run(folder / f"{name}.log", *words, core=core)
    counts = "--num_forget_images", options.num_forget_images, "--num_retain_images", options.num_retain_images
    runs = [folder / name for name in names]
    words = "-m", "eval", "accuracy", *demo, "--output_dir", folder, "--erasure", *runs, *counts
    run(folder / "eval.log", *words, core=core)
    found, models = read_json(folder / "results.json"), []
    for name, model in zip(["base", *names], found["models"], strict=True):
        kept = {kind: model["retained"][kind] for kind in KEPT if kind in model["retained"]}
        apiece = model["generation"]["seconds"] / model["generation"]["images"]
        models.append({"name": name, "ua": model["ua"], "kept": kept, "seconds": round(apiece, 3)})
    return {"base": base, "concept": options.concept, "protocol": found["protocol"],
            "versions": found["versions"], "images": list(counts[1::2]), "settings": SETTINGS,
            "models": models}  # fmt: skip


def table(found: dict) -> str:
    """The table of docs/guards.md, and under it how it was measured."""
    base, rows = found["models"][0], [["", "UA ↑", *KEPT.values(), "seconds a picture", "of the base's"]]
    for model in found["models"]:
        title = find_method(model["name"]).title if model is not base else "Base model"
        kept = [shown(model["kept"][kind]) if kind in model["kept"] else "–" for kind in KEPT]
        slower = f"{model['seconds'] / base['seconds']:.1f}×"
        rows.append([title, shown(model["ua"]), *kept, f"{model['seconds']:.2f}", slower])
    (forget, retain), versions = found["images"], found["versions"]
    given = "; ".join(
        f"{find_method(name).title}: {', '.join(f'{key} {value}' for key, value in own.items())}"
        for name, own in found["settings"].items()
    )
    return (
        f"{markdown(rows)}\n\n{forget} pictures of {found['concept']} and {retain} of all else a guard, Wilson 95% "
        f"intervals, one seed, one core. The demo model's settings, but for {given}. "
        f"{found['protocol'].split(':')[0]}, base model {found['base']}, torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}. Made by `python -m benchmarks.guards`; every number is in "
        "`docs/results/guards.json`."
    )


if __name__ == "__main__":
    run_command("python -m benchmarks.guards", __doc__, GuardsConfig, measure)

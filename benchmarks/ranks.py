"""Low-rank adapters by rank, trained and converted, on the demo model: ``python -m benchmarks.ranks``.

One concept is erased by SalUn as the demo model has it by default: as a masked delta, and as an adapter of each rank,
on the layers that saliency chooses, and of one rank on all alike. The masked delta is converted to an adapter of each
rank too (``python -m salun_diffusion export --format lora``). All are measured together. What ``--output_dir`` holds
already is not made again. ``docs/results/ranks.json`` and the table of docs/export.md are written in the end
(``--write_only``: from the committed JSON alone).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from salun_diffusion.export import export
from salun_diffusion.files import read_json, write_json
from salun_diffusion.options import option, run_command
from salun_diffusion.tables import markdown, put_into

from .erasing import base_digest, run
from .methods_page import DOCS, shown

RESULTS = DOCS / "results" / "ranks.json"
MASKED = "masked"
RANKS = (4, 8, 16, 32, 64)
UNIFORM = (4,)  # half as many weights again as 8 on the layers that saliency chooses
KINDS = {"trained": "Trained", "uniform": "Trained, all layers alike", "converted": "Converted"}


@dataclass
class RanksConfig:
    """The options of ``python -m benchmarks.ranks``."""

    concept: str = option("airplane", "what is erased from the demo model")
    ranks: list[int] | None = option(None, f"ranks to measure (default: {' '.join(map(str, RANKS))})", several=True)
    num_forget_images: int = option(72, "pictures of the concept that are measured, a model", least=1)
    num_retain_images: int = option(108, "pictures of all else", least=1)
    output_dir: str = option("runs/ranks", "erasures and their measurements")
    write_only: bool = option(False, "the table alone, from the committed results")


def measure(options: RanksConfig) -> None:
    """Erase, convert, measure and write, as the module's docstring says."""
    if not options.write_only:
        write_json(RESULTS, results(options))
    put_into(DOCS / "export.md", "ranks", table(read_json(RESULTS)))


def results(options: RanksConfig) -> dict:
    """What docs/results/ranks.json holds."""
    base, ranks = base_digest("demo"), options.ranks or RANKS
    folder = Path(options.output_dir) / base
    erase(options, folder / MASKED)
    missing = {}
    for rank in ranks:
        erase(options, folder / f"trained-{rank}", "--adapter", "lora", "--rank", rank)
        if rank in UNIFORM:
            erase(options, folder / f"uniform-{rank}", "--adapter", "lora", "--rank", rank, "--mask", "none")
        missing[f"converted-{rank}"] = convert(folder / MASKED, folder / f"converted-{rank}", rank)
    names = [MASKED, *(f"{how}-{rank}" for how in KINDS for rank in ranks if how != "uniform" or rank in UNIFORM)]
    counts = "--num_forget_images", options.num_forget_images, "--num_retain_images", options.num_retain_images
    run(
        folder / "eval.log", "-m", "eval", "accuracy", "--pretrained_model_name_or_path", "demo", "--concept",
        options.concept, "--output_dir", folder, "--erasure", *(folder / name for name in names), *counts,
    )  # fmt: skip
    found = read_json(folder / "results.json")
    anchor = read_json(folder / MASKED / "config.json")["anchor"]
    models = []
    for model in found["models"]:
        row = {key: model[key] for key in ("name", "ua", "ira", "cra")}
        row["as_anchor"] = round(100 * model["drawn_as"].get(anchor, 0) / sum(model["drawn_as"].values()), 1)
        if model["erasure"]:
            row |= {key: model["erasure"][key] for key in ("bytes", "seconds", "weights")}
        if model["name"] != MASKED:
            row |= {f"{kind}_off": off(folder / "pictures", model["name"], kind) for kind in ("forget", "retain")}
        models.append(row | ({"missing": missing[model["name"]]} if model["name"] in missing else {}))
    return {
        "base": base, "concept": options.concept, "protocol": found["protocol"],
        "versions": found["versions"], "anchor": anchor, "images": list(counts[1::2]), "models": models,
        "settings": {f"trained-{rank}": read_json(folder / f"trained-{rank}" / "config.json")["settings"]
                     for rank in ranks},
    }  # fmt: skip


def erase(options: RanksConfig, folder: Path, *more) -> None:
    """One erasure in a process of its own, if it is not there; one that was killed goes on."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run(
            folder.with_suffix(".log"), "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept",
            options.concept, "--output_dir", folder, "--data_dir", folder.parent / "data", "--checkpointing_steps", 20,
            "--resume_from_checkpoint", "latest", *more,
        )  # fmt: skip


def convert(delta: Path, output: Path, rank: int) -> float:
    """The delta as an adapter, if it is not there; returns the share of its change that is missing."""
    told = output.with_suffix(".json")
    if not told.exists():
        shutil.rmtree(output, ignore_errors=True)
        write_json(told, export(delta, "lora", output, rank=rank).relative_error)
    return read_json(told)


def off(pictures: Path, name: str, kind: str) -> float:
    """How far a model's pictures are from the masked delta's: the mean difference of a pixel, of 255."""
    apart = []
    for path in (pictures / name).glob(f"{kind}-*.png"):
        one, other = (np.asarray(Image.open(at / path.name), dtype=float) for at in (pictures / MASKED, path.parent))
        apart.append(np.abs(one - other).mean())
    return round(float(np.mean(apart)), 2)


def table(found: dict) -> str:
    """The table of docs/export.md."""
    head = ["", "rank", "UA ↑", "IRA ↑", "CRA ↑", f"drawn as the anchor ({found['anchor']}), %",
            "off the masked delta's pictures, forget / retain", "change missing, %", "file, kB"]  # fmt: skip
    rows = [head]
    for model in found["models"]:
        how, _, rank = model["name"].partition("-")
        title = (KINDS | {"base": "Base model", MASKED: "Masked delta"})[how]
        apart = f"{model['forget_off']:.1f} / {model['retain_off']:.1f}" if how != MASKED else "–"
        missing = f"{100 * model['missing']:.0f}" if "missing" in model else "–"
        size = f"{model['bytes'] / 1000:.0f}" if "bytes" in model else "–"
        shares = [shown(model[key]) for key in ("ua", "ira", "cra")]
        rows.append([title, rank or "–", *shares, f"{model['as_anchor']:.0f}", apart, missing, size])
    (forget, retain), versions = found["images"], found["versions"]
    return (
        f"{markdown(rows)}\n\nIntervals: Wilson, 95%. {forget} pictures of {found['concept']} and {retain} of all else "
        f"a model, {found['protocol'].split(':')[0]}, base model {found['base']}, torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}. One concept, one seed. Made by `python -m benchmarks.ranks`; every number is in "
        "`docs/results/ranks.json`."
    )


if __name__ == "__main__":
    run_command("python -m benchmarks.ranks", __doc__, RanksConfig, measure)

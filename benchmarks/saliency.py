"""What the mask buys: SalUn as the demo model has it by default, under masks of other sizes and other scores.

    python -m benchmarks.saliency                 # hours on one core
    python -m benchmarks.saliency --write_only    # the table of docs/methods.md from the committed results

Every row has the settings that SalUn was tuned to (benchmarks/methods.json, "further"), its own mask, and the same
pictures, starting noise and seed; ``random`` and ``magnitude`` are the controls, masks of the same size that look at
no picture. The objects are outside the table of methods. Each erasure is judged, attacked by a learned token and
relearned. ``docs/results/saliency.json`` is written after each object; what it or ``--output_dir`` holds already is not
made again.
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.files import read_json, write_json
from salun_diffusion.options import option, run_command
from salun_diffusion.stats import crossing
from salun_diffusion.tables import markdown, put_into

from . import methods
from .methods_page import BASE, DOCS, pooled, shown

RESULTS = DOCS / "results" / "saliency.json"
SCORES = ("gradient", "gradient-weight", "fisher", "contrast", "random", "magnitude")
DENSITIES = {"gradient": (0.01, 0.03, 0.1, 0.5), "random": (0.01, 0.1), "magnitude": (0.01, 0.1)}  # the others: 0.1
DENSE = "none"
SHARES = {"ua": "UA ↑", "ira": "IRA ↑", "cra": "CRA ↑"}
INSTEAD = {"anchor": "drawn as anchor ↑", "nothing": "as nothing ↓"}


@dataclass
class SaliencyConfig:
    """The options of ``python -m benchmarks.saliency``."""

    objects: list[str] = option(["tree", "rocket"], "what is erased, each alone", several=True)
    output_dir: str = option("runs/saliency", "erasures and their measurements")
    write_only: bool = option(False, "the table alone, from the committed results")


def rows() -> dict[str, dict]:
    """Row → the options of its mask."""
    found = {
        f"{score}-{density:g}": {"saliency": score, "density": density}
        for score in SCORES
        for density in DENSITIES.get(score, (0.1,))
    }
    return found | {DENSE: {"mask": DENSE}}


def measure(options: SaliencyConfig) -> None:
    """Erase, judge, attack, relearn and write, as the module's docstring says."""
    if not options.write_only:
        config = methods.read(methods.HERE / "methods.json")
        config["hidden"]["attack"] |= {"attack": ["concept_inversion"]}
        wanted = {name: ("salun", config["further"]["object"] | mask) for name, mask in rows().items()}
        folder = Path(options.output_dir) / config["digest"]
        asked = methods.told(config, wanted, "object")
        held = {entry["concept"]: entry for entry in read_json(RESULTS)["concepts"]} if RESULTS.exists() else {}
        found = []
        for concept in options.objects:
            entry = held.get(concept, {})
            entry = entry if entry.get("asked") == asked else {"asked": asked}
            *_, whole = methods.measure(config, wanted, concept, "object", folder, entry)
            found.append(whole)
            write_json(RESULTS, {"concepts": found})
    put_into(DOCS / "methods.md", "saliency", table(read_json(RESULTS)["concepts"]))


def table(concepts: list[dict]) -> str:
    """A row a mask, pooled over the ``concepts``, and under it how it was measured."""
    steps = [step for step in concepts[0]["models"][0]["relearned"] if step != "0"]
    lines = [["mask", *SHARES.values(), *INSTEAD.values(), "learned token ↓",
              *(f"relearned, {step} steps ↓" for step in steps), "steps to half ↑", "file, kB"]]  # fmt: skip
    half_of_base = None
    for name in (BASE, *concepts[0]["asked"]["models"]):
        mine = [next(row for row in concept["models"] if row["method"] == name) for concept in concepts]
        curve = {step: pooled([row["relearned"][step] for row in mine]) for step in ("0", *steps)}
        half_of_base = curve["0"]["percent"] / 2 if half_of_base is None else half_of_base
        half = crossing([(int(step), share["percent"]) for step, share in curve.items()], half_of_base)
        kilobytes = 0 if name == BASE else sum(row["megabytes"] for row in mine) / len(mine) * 1000
        lines.append([
            _title(name), *(shown(pooled([row[key] for row in mine])) for key in SHARES),
            *(shown(pooled([row["instead"][key] for row in mine])) for key in INSTEAD),
            shown(pooled([row["attacks"]["concept_inversion"] for row in mine])),
            *(shown(curve[step]) for step in steps),
            "" if name == BASE else f">{steps[-1]}" if half is None else f"{half:.0f}",
            f"{kilobytes:.0f}" if kilobytes else "",
        ])  # fmt: skip
    images = concepts[0]["asked"]["images"]
    return (
        f"{markdown(lines)}\n\nObjects: {', '.join(concept['concept'] for concept in concepts)}, pooled; "
        f"{images['num_forget_images']} forget and {images['num_retain_images']} retain pictures each; Wilson 95% "
        f"intervals; one seed; base model {concepts[0]['asked']['base']}. "
        + " ".join(f"{concepts[0]['protocols'][measure]}." for measure in ("attack", "relearn"))
        + " Made by `python -m benchmarks.saliency`; every number is in `docs/results/saliency.json`."
    )


def _title(name: str) -> str:
    if name in (BASE, DENSE):
        return {BASE: "base model", DENSE: "no mask"}[name]
    score, density = name.rsplit("-", 1)
    return f"{score}, {density}"


if __name__ == "__main__":
    run_command("python -m benchmarks.saliency", __doc__, SaliencyConfig, measure)

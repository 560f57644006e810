"""Two families forget a digit, a U-Net and a DiT, by SalUn and Selective Amnesia: ``python -m benchmarks.families``.

Both models (demo/digits/model, demo/digits-dit) learned the same digits, and each erasure is given the same real ones.
For each family a method first tries the same learning rates on one digit, with a seed and starting noise that the table
does not have; that of the highest mean of UA and the others' accuracy is its own, as in ``benchmarks.classwise``. One
judge, that of the U-Net and a copy of it, looks at all. What is in the results is not made again.
docs/results/families.json, the table of docs/models.md and docs/families.png are written anew after each run
(``--write_only``: the table alone, from the committed JSON).
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from salun_diffusion.files import read_json, write_json
from salun_diffusion.options import option, run_command
from salun_diffusion.stats import wilson
from salun_diffusion.tables import markdown, put_into

from . import classwise, classwise_page
from .classwise_bench import ROOT
from .methods_page import DOCS, shown

RESULTS = DOCS / "results" / "families.json"
MODELS = {"U-Net": ROOT / "demo" / "digits" / "model", "DiT": ROOT / "demo" / "digits-dit"}
METHODS = ("SalUn", "Selective Amnesia")
TUNING = {"digit": 0, "seed": 0, "learning_rates": [3e-5, 1e-4, 3e-4]}


@dataclass
class FamiliesConfig:
    """The options of ``python -m benchmarks.families``."""

    digits: list[int] = option([3, 7], "digits to forget, each alone", several=True)
    seeds: list[int] = option([1, 2], "of the erasures", several=True)
    methods: list[str] = option(list(METHODS), "rows of the table", METHODS, several=True)
    forget_pictures: int = option(100, "pictures of the forgotten digit, a model", least=65)
    kept_pictures: int = option(50, "pictures of each other digit, a model", least=8)
    work_dir: str = option("runs/families", "erasures")
    write_only: bool = option(False, "the table alone, from the committed results")


def measure(config: FamiliesConfig) -> None:
    """Tune, erase, measure and write, as the module's docstring says."""
    if not config.write_only:
        results(config)
    put_into(DOCS / "models.md", "families", table(read_json(RESULTS)))


def results(config: FamiliesConfig) -> None:
    """Write what docs/results/families.json holds, and the picture."""
    import torch

    torch.set_num_threads(1)
    work = Path(config.work_dir)
    pictures = {"forget": config.forget_pictures, "kept": config.kept_pictures}
    found = {"tuning": TUNING, "pictures": pictures, "trials": [], "runs": []}
    if RESULTS.exists():
        found |= read_json(RESULTS)
    done = {(row["family"], row["method"], row["digit"], row.get("seed")) for row in found["runs"]}
    tried = {(row["family"], row["name"], row["learning_rate"]) for row in found["trials"]}

    def note(kind: str, row: dict) -> None:
        found[kind].append(row)
        write_json(RESULTS, found)
        print(", ".join(f"{key} {value}" for key, value in row.items() if key != "drawn_as"), flush=True)

    for method, (family, folder) in product(["Original", *config.methods], MODELS.items()):
        config.work_dir = str(work / family)
        if not (Path(config.work_dir) / "data").is_dir():
            classwise.run_module("demo.digits", "--data_dir", Path(config.work_dir) / "data")
        runs, rate = classwise.Runs(config, folder), None
        for one in TUNING["learning_rates"] if method != "Original" else ():
            if (family, method, one) not in tried:
                scores = runs.erased(method, TUNING["digit"], TUNING["seed"], one, noise=90_000)
                note("trials", {"family": family, "name": method, "digit": 0, "learning_rate": one} | scores)
        if method != "Original":
            rate = classwise.chosen([row for row in found["trials"] if row["family"] == family])[method]
        for digit, seed in product(config.digits, config.seeds if method != "Original" else config.seeds[:1]):
            if (family, method, digit, seed) in done:
                continue
            how = {"shown": work / "pictures" / f"{family}, {method}-{digit}-{seed}.png"}
            if method == "Original":
                scores = {"seconds": 0.0} | runs.bench.measured(runs.bench.model, digit, **how)[0]
            else:
                scores = {"learning_rate": rate} | runs.erased(method, digit, seed, rate, **how)
            note("runs", {"family": family, "method": method, "digit": digit, "seed": seed} | scores)
    named = [row | {"name": f"{row['family']}, {row['method']}"} for row in found["runs"]]
    order = {"U-Net": 0, "DiT": 1}
    named.sort(key=lambda row: order[row["family"]])
    classwise_page.picture({"runs": named}, work / "pictures", DOCS / "families.png")


def table(found: dict) -> str:
    """The table of docs/models.md: a row for each method and family, each digit's pictures of all seeds together."""
    digits = sorted({row["digit"] for row in found["runs"]})
    head = ["", *(f"{what}, a {digit} forgotten" for what in ("UA ↑", "other digits ↑") for digit in digits)]
    rows = [[*head, "Fréchet to real ↓", "learning rate"]]
    counts = {"ua": found["pictures"]["forget"], "others": 9 * found["pictures"]["kept"]}
    for method, family in product(dict.fromkeys(row["method"] for row in found["runs"]), MODELS):
        own = [row for row in found["runs"] if (row["method"], row["family"]) == (method, family)]
        cells = []
        for key, digit in product(counts, digits):
            shares = [row[key] for row in own if row["digit"] == digit]
            right = sum(round(share * counts[key] / 100) for share in shares)
            cells.append(shown(wilson(right, counts[key] * len(shares))))
        rate, apart = own[0].get("learning_rate"), sum(row["frechet_real"] for row in own) / len(own)
        rows.append([f"{method}, {family}", *cells, f"{apart:.2f}", "–" if rate is None else f"{rate:g}"])
    seeds = sorted({row["seed"] for row in found["runs"]})
    forget, kept = counts["ua"], counts["others"]
    return (
        f"{markdown(rows)}\n\nIntervals: Wilson, 95%, over the pictures of seeds "
        f"{' and '.join(map(str, seeds))} together (n = {forget * len(seeds)} of the forgotten digit, "
        f"{kept * len(seeds)} of the others; of an original {forget} and {kept}). Fréchet: the other digits in the "
        "judge's 64 features, beside all real ones; mean of digits and seeds. Learning rate: the best of "
        f"{', '.join(f'{rate:g}' for rate in found['tuning']['learning_rates'])} for the digit "
        f"{found['tuning']['digit']}, seed {found['tuning']['seed']}, for each family and method. Made by "
        "`python -m benchmarks.families`; every number is in `docs/results/families.json`."
    )


if __name__ == "__main__":
    run_command("python -m benchmarks.families", __doc__, FamiliesConfig, measure)

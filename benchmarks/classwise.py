"""A class is forgotten by a class-conditional model, beside the exact answer: a model that never saw it.

    python -m benchmarks.classwise                     # every digit, three seeds: hours on two cores
    python -m benchmarks.classwise --digits 3 --seeds 1

The model is demo/digits/model, Retrain is ``python -m demo.digits --without DIGIT``, each method trains on the same
real digits, and one judge looks at all. First each method tries the same learning rates on two digits, with a seed and
starting noise that the table does not have; that of the highest mean of UA and the others' accuracy is its own. Then
``python -m eval relearn`` teaches every model the digit again, Retrain too. A run that is in the results is not made
again: a stopped command goes on where it was. Results go to docs/results/classwise.json, and docs/classwise.md and its
picture are written anew from them.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.files import read_json, write_json
from salun_diffusion.options import option, run_command

from . import classwise_page
from .classwise_bench import MODEL, ROOT, Bench

RESULTS = ROOT / "docs" / "results" / "classwise.json"
METHODS = {  # row of the table → options of the erasure; the rest are the model's own (concepts.json)
    "FT": {"method": "finetune"},
    "GA": {"method": "gradient_ascent"},
    "RL": {"method": "random_label"},
    "ESD": {"method": "esd"},
    "Selective Amnesia": {"method": "selective_amnesia"},
    "SalUn": {"method": "salun"},
    "SalUn without mask": {"method": "salun", "mask": "none"},
}
TUNING = {"digits": [0, 5], "seed": 0, "learning_rates": [3e-5, 1e-4, 3e-4]}
RELEARN = {"num_pictures": 36, "steps": [0, 5, 10, 20, 40], "num_forget_images": 48, "num_retain_images": 9}


@dataclass
class ClasswiseConfig:
    """The options of ``python -m benchmarks.classwise``."""

    digits: list[int] = option(list(range(10)), "digits to forget, each alone", several=True)
    seeds: list[int] = option([1, 2, 3], "of Retrain, and of the erasures", several=True)
    methods: list[str] = option(list(METHODS), "rows of the table", tuple(METHODS), several=True)
    forget_pictures: int = option(100, "pictures of the forgotten digit, a model", least=65)
    kept_pictures: int = option(50, "pictures of each other digit, a model", least=8)
    work_dir: str = option("runs/classwise", "trained models and erasures")


class Runs:
    """The erasures and retrained models of one work folder, of the base model in ``folder``."""

    def __init__(self, config, folder: Path = MODEL):
        self.config, self.folder, self.work, self.bench = config, folder, Path(config.work_dir), Bench(config, folder)

    def path(self, name: str, digit: int, seed: int, rate: float) -> Path:
        """Where an erasure is, or will be."""
        return self.work / f"{name.lower().replace(' ', '-')}-{digit}-{seed}-{rate:g}"

    def erase(self, name: str, digit: int, seed: int, rate: float) -> float:
        """Make an erasure anew; the seconds that its mask and training took."""
        from salun_diffusion import erase

        options, pictures = METHODS[name], str(self.work / "data")
        data = {} if options["method"] == "esd" else {"retain_data": pictures}
        if options["method"] in ("salun", "random_label", "gradient_ascent"):
            data["forget_data"] = [pictures]
        path = self.path(name, digit, seed, rate)
        if path.exists():
            shutil.rmtree(path)  # of a command that was stopped
        return erase(
            str(self.folder), str(digit), output_dir=path, data_dir=str(self.work / "latents"), seed=seed,
            learning_rate=rate, **options, **data,
        ).seconds  # fmt: skip

    def erased(self, name: str, digit: int, seed: int, rate: float, **how) -> dict:
        """The scores of an erasure that is made anew, and its ``seconds``; ``how`` it is measured: see ``Bench``."""
        from salun_diffusion import load_erasure, unload_erasure

        seconds, pipe = self.erase(name, digit, seed, rate), self.bench.model.pipe
        load_erasure(pipe, self.path(name, digit, seed, rate))
        scores, _ = self.bench.measured(self.bench.model, digit, **how)
        unload_erasure(pipe)
        return {"seconds": seconds} | scores

    def retrain(self, digit: int, seed: int) -> tuple[Path, float | None]:
        """The folder of the model that never saw ``digit``, and its seconds if it was made just now and at once."""
        folder, training = self.work / f"retrain-{digit}-{seed}", self.work / "training" / f"{digit}-{seed}"
        if (folder / "concepts.json").exists():
            return folder, None
        begun, fresh = time.perf_counter(), not list(training.glob("digits-*"))
        run_module("demo.digits", "--work_dir", training, "--without", digit, "--seed", seed, "--output_dir", folder)
        return folder, round(time.perf_counter() - begun, 1) if fresh else None

    def relearned(self, digit: int, seed: int, rates: dict[str, float]) -> list[dict]:
        """For Retrain and each erasure: the steps of training on real pictures of ``digit`` until it is drawn half
        as often, and nine tenths as often, as by the base (None: not within the steps that were tried), and the curve.
        """
        paths = {name: self.path(name, digit, seed, rates[name]) for name in self.config.methods}
        for name, path in paths.items():
            if not path.exists():
                self.erase(name, digit, seed, rates[name])
        words = [
            word for key, value in RELEARN.items() for word in (f"--{key}", *(value if key == "steps" else [value]))
        ]
        output = self.work / "relearn" / f"{digit}-{seed}"
        run_module("eval", "relearn", "--pretrained_model_name_or_path", MODEL, "--concept", digit, "--erasure",
             *paths.values(), "--retrained", self.retrain(digit, seed)[0], "--no_control", "--pictures",
             self.work / "data" / str(digit), "--seed", seed, "--output_dir", output, *words)  # fmt: skip
        models = read_json(output / "results.json")["models"]
        found = {model["name"]: model for model in models}
        named = {"Retrain": found["retrained"]} | {name: found[path.name] for name, path in paths.items()}
        return [
            {"name": name, "digit": digit, "seed": seed, "half": model["half"], "most": model["most"],
             "curve": [[point["step"], round(point["accuracy"]["percent"], 1)] for point in model["curve"]]}
            for name, model in named.items()
        ]  # fmt: skip


def run(config: ClasswiseConfig) -> None:
    """Tune and measure what is not in the results yet, and write the page.

    Raises:
        SalunError: a retraining, an erasure or a relearning failed; the results before it are kept.
    """
    import torch

    from salun_diffusion.models import load_model

    torch.set_num_threads(1)
    work = Path(config.work_dir)
    results = {"trials": [], "runs": [], "relearning": []} | (read_json(RESULTS) if RESULTS.exists() else {})
    drawn = {"forget_pictures": config.forget_pictures, "kept_pictures": config.kept_pictures}
    if results["runs"] and results["pictures"] != drawn:
        raise SalunError(f"{RESULTS} is of other numbers of pictures, {results['pictures']}: give those, or move it.")
    results |= {"pictures": drawn, "tuning": TUNING, "relearn": RELEARN}
    if not (work / "data").is_dir():
        run_module("demo.digits", "--data_dir", work / "data")
    runs = Runs(config)

    def note(kind, row):
        results[kind] = [*results[kind], row]
        write_json(RESULTS, results)
        told = ", ".join(
            f"{key} {row[key]:g}"
            for key in ("digit", "seed", "learning_rate", "ua", "others")
            if row.get(key) is not None
        )
        print(f"{row['name']}, {told}", flush=True)

    tried = {(row["name"], row["digit"], row["learning_rate"]) for row in results["trials"]}
    for key in product(config.methods, TUNING["digits"], TUNING["learning_rates"]):
        if key not in tried:
            name, digit, rate = key
            scores = runs.erased(name, digit, TUNING["seed"], rate, noise=90_000)
            note("trials", {"name": name, "digit": digit, "learning_rate": rate} | scores)
    rates = chosen(results["trials"])

    done = {(row["digit"], row["seed"], row["name"]) for row in results["runs"]}
    learned = {(row["digit"], row["seed"], row["name"]) for row in results["relearning"]}
    for digit, seed in product(config.digits, config.seeds):
        keys = [(digit, seed, name) for name in ("Retrain", "Original", *config.methods)]
        missing = [name for *_, name in keys if (digit, seed, name) not in done]
        if missing:
            folder, seconds = runs.retrain(digit, seed)
            shown = lambda name: work / "pictures" / f"{name}-{digit}-{seed}.png"  # noqa: B023, E731
            scores, exact = runs.bench.measured(load_model(str(folder)), digit, shown=shown("Retrain"))
            how = {"retrain": exact}
        for name in missing:
            if name == "Retrain":
                row = {"seconds": seconds} | scores | {"frechet_retrain": 0.0}
            elif name == "Original":
                row = {"seconds": 0.0} | runs.bench.measured(runs.bench.model, digit, **how, shown=shown(name))[0]
            else:
                row = {"learning_rate": rates[name]}
                row |= runs.erased(name, digit, seed, rates[name], **how, shown=shown(name))
            note("runs", {"digit": digit, "seed": seed, "name": name} | row)
        if any(key not in learned for key in keys if key[2] != "Original"):
            for row in runs.relearned(digit, seed, rates):
                if (digit, seed, row["name"]) not in learned:
                    note("relearning", row)
        classwise_page.write(results, work / "pictures")


def chosen(trials: list[dict]) -> dict[str, float]:
    """Each method's learning rate: that of the highest mean of UA and the others' accuracy over the tuning's digits;
    of equal ones, the lowest.
    """
    scores: dict[str, dict[float, float]] = {}
    for trial in sorted(trials, key=lambda row: row["learning_rate"]):
        found = scores.setdefault(trial["name"], {})
        found[trial["learning_rate"]] = found.get(trial["learning_rate"], 0.0) + trial["ua"] + trial["others"]
    return {name: max(found, key=found.get) for name, found in scores.items()}


def run_module(*words) -> None:
    """``python -m`` with those words.

    Raises:
        SalunError: it failed.
    """
    command = [sys.executable, "-m", *map(str, words)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SalunError(f"{' '.join(command[1:])} failed, as it says above.")


if __name__ == "__main__":
    run_command("python -m benchmarks.classwise", __doc__, ClasswiseConfig, run)

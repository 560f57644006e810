"""A class is forgotten by a class-conditional model, beside the exact answer: a model that never saw it.

    python -m benchmarks.classwise                     # every digit, three seeds: hours on two cores
    python -m benchmarks.classwise --digits 3 --seeds 1

The model is demo/digits/model, Retrain is ``python -m demo.digits --without DIGIT``, each method trains on the same
real digits, and one judge looks at all. First each method tries the same learning rates on two digits, with a seed and
starting noise that the table does not have; that of the highest mean of UA and the others' accuracy is its own. A run
that is in the results is not made again: a stopped command goes on where it was. Results go to
docs/results/classwise.json, and docs/classwise.md is written anew from them.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.files import write_json
from salun_diffusion.options import option, run_command

from . import classwise_page

ROOT = Path(__file__).parent.parent
MODEL, RESULTS = ROOT / "demo" / "digits" / "model", ROOT / "docs" / "results" / "classwise.json"
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


@dataclass
class ClasswiseConfig:
    """The options of ``python -m benchmarks.classwise``."""

    digits: list[int] = option(list(range(10)), "digits to forget, each alone", several=True)
    seeds: list[int] = option([1, 2, 3], "of Retrain, and of the erasures", several=True)
    methods: list[str] = option(list(METHODS), "rows of the table", tuple(METHODS), several=True)
    forget_pictures: int = option(100, "pictures of the forgotten digit, a model", least=65)
    kept_pictures: int = option(50, "pictures of each other digit, a model", least=8)
    work_dir: str = option("runs/classwise", "trained models and erasures")


class Bench:
    """The base model, the judge and the real digits, and how a model is measured with them."""

    def __init__(self, config: ClasswiseConfig):
        import torch
        from sklearn.datasets import load_digits
        from transformers import AutoModelForImageClassification

        from salun_diffusion.models import load_model

        self.config, self.model = config, load_model(str(MODEL))
        self.judge = AutoModelForImageClassification.from_pretrained(MODEL / "judge", dtype=torch.float32).eval()
        found = load_digits()
        self.real = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
        self.labels = torch.from_numpy(found.target)

    def seen(self, pictures):
        """What the judge names, int64 ``(n,)``, and the features that it names it by, ``(n, 64)``."""
        import torch
        import torch.nn.functional as F

        x = F.interpolate(pictures.clamp(-1, 1), 32, mode="bilinear").expand(-1, 3, -1, -1)
        with torch.no_grad():
            features = self.judge.resnet(x).pooler_output.flatten(1)
            return self.judge.classifier(features[:, :, None, None]).argmax(1), features

    def drawn(self, model, digit: int, noise: int = 50_000):
        """Pictures of the forgotten digit and of the others, and what each should be; every model's noise is of the
        seeds from ``noise`` on.
        """
        import torch

        from salun_diffusion.concepts.concept import Row

        names = model.names
        wanted = [digit] * self.config.forget_pictures
        wanted += [one for one in range(len(names)) if one != digit for _ in range(self.config.kept_pictures)]
        rows = [Row(names[one], None, {}, noise + i) for i, one in enumerate(wanted)]
        how = {"num_inference_steps": 25, "guidance_scale": 1.5, "batch_size": 125, "output_type": "latent"}
        return torch.stack(model.draw(rows, **how)), torch.tensor(wanted)

    def erased(self, name: str, digit: int, seed: int, rate: float, retrain=None, noise: int = 50_000) -> dict:
        """An erasure's scores, and the ``seconds`` of its mask and training."""
        from salun_diffusion import erase, load_erasure, unload_erasure

        work, options = Path(self.config.work_dir), METHODS[name]
        data = {} if options["method"] == "esd" else {"retain_data": str(work / "data")}
        if options["method"] in ("salun", "random_label", "gradient_ascent"):
            data["forget_data"] = [str(work / "data")]
        path = work / f"{name.lower().replace(' ', '-')}-{digit}-{seed}-{rate:g}"
        run = erase(
            str(MODEL), str(digit), output_dir=path, data_dir=str(work / "latents"), seed=seed, learning_rate=rate,
            **options, **data,
        )  # fmt: skip
        load_erasure(self.model.pipe, path)
        scores, _ = self.measured(self.model, digit, retrain, noise)
        unload_erasure(self.model.pipe)
        return {"seconds": run.seconds} | scores

    def measured(self, model, digit: int, retrain=None, noise: int = 50_000) -> tuple[dict, object]:
        """The scores of a model, and the judge's features of its kept digits."""
        import torch

        pictures, wanted = self.drawn(model, digit, noise)
        named, features = self.seen(pictures)
        forgotten = wanted == digit
        kept = features[~forgotten]
        real = self.seen(self.real[self.labels != digit])[1]
        scores = {
            "ua": 100 * (named[forgotten] != digit).float().mean().item(),
            "others": 100 * (named == wanted)[~forgotten].float().mean().item(),
            "frechet_real": frechet(kept, real),
            "frechet_retrain": None if retrain is None else frechet(kept, retrain),
            "drawn_as": torch.bincount(named[forgotten], minlength=len(model.names)).tolist(),
        }
        return scores, kept


def frechet(one, two) -> float:
    """Fréchet distance between two sets of features, ``(n, d)`` each, n > d (Heusel et al. 2017, eq. 6)."""
    import numpy as np

    one, two = one.double().numpy(), two.double().numpy()
    cross = np.linalg.eigvals(np.cov(one.T) @ np.cov(two.T)).real.clip(min=0)  # of a product of two covariances: ≥ 0
    apart = np.square(one.mean(0) - two.mean(0)).sum()
    return float(apart + np.trace(np.cov(one.T)) + np.trace(np.cov(two.T)) - 2 * np.sqrt(cross).sum())


def run(config: ClasswiseConfig) -> None:
    """Tune and measure what is not in the results yet, and write the page.

    Raises:
        SalunError: a retraining or an erasure failed; the results before it are kept.
    """
    import torch

    from salun_diffusion.models import load_model

    torch.set_num_threads(1)
    work = Path(config.work_dir)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"trials": [], "runs": []}
    drawn = {"forget_pictures": config.forget_pictures, "kept_pictures": config.kept_pictures}
    if results["runs"] and results["pictures"] != drawn:
        raise SalunError(f"{RESULTS} is of other numbers of pictures, {results['pictures']}: give those, or move it.")
    results |= {"pictures": drawn, "tuning": TUNING}
    if not (work / "data").is_dir():
        _digits("--data_dir", work / "data")
    bench = Bench(config)

    def note(kind, row):
        results[kind] = [*results[kind], row]
        write_json(RESULTS, results)
        told = ", ".join(
            f"{key} {row[key]:g}" for key in ("digit", "seed", "learning_rate") if row.get(key) is not None
        )
        print(f"{row['name']}, {told}: UA {row['ua']:.1f}, others {row['others']:.1f}", flush=True)

    tried = {(row["name"], row["digit"], row["learning_rate"]) for row in results["trials"]}
    for key in product(config.methods, TUNING["digits"], TUNING["learning_rates"]):
        if key not in tried:
            name, digit, rate = key
            scores = bench.erased(name, digit, TUNING["seed"], rate, noise=90_000)
            note("trials", {"name": name, "digit": digit, "learning_rate": rate} | scores)
    rates = chosen(results["trials"])

    done = {(row["digit"], row["seed"], row["name"]) for row in results["runs"]}
    for digit, seed in product(config.digits, config.seeds):
        missing = [name for name in ("Retrain", "Original", *config.methods) if (digit, seed, name) not in done]
        if not missing:
            continue
        about, folder = {"digit": digit, "seed": seed}, work / f"retrain-{digit}-{seed}"
        begun, seconds = time.perf_counter(), None
        if not (folder / "concepts.json").exists():
            fresh = not list((work / "training").glob(f"{digit}-{seed}/digits-*"))
            _digits("--work_dir", work / "training" / f"{digit}-{seed}", "--without", digit, "--seed", seed,
                    "--output_dir", folder)  # fmt: skip
            seconds = round(time.perf_counter() - begun, 1) if fresh else None
        scores, exact = bench.measured(load_model(str(folder)), digit)
        for name in missing:
            if name == "Retrain":
                row = {"seconds": seconds} | scores | {"frechet_retrain": 0.0}
            elif name == "Original":
                row = {"seconds": 0.0} | bench.measured(bench.model, digit, exact)[0]
            else:
                row = {"learning_rate": rates[name]} | bench.erased(name, digit, seed, rates[name], exact)
            note("runs", about | {"name": name} | row)
    classwise_page.write(results)


def chosen(trials: list[dict]) -> dict[str, float]:
    """Each method's learning rate: that of the highest mean of UA and the others' accuracy over the tuning's digits;
    of equal ones, the lowest.
    """
    scores: dict[str, dict[float, float]] = {}
    for trial in sorted(trials, key=lambda row: row["learning_rate"]):
        found = scores.setdefault(trial["name"], {})
        found[trial["learning_rate"]] = found.get(trial["learning_rate"], 0.0) + trial["ua"] + trial["others"]
    return {name: max(found, key=found.get) for name, found in scores.items()}


def _digits(*words) -> None:
    command = [sys.executable, "-m", "demo.digits", *map(str, words)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SalunError(f"{' '.join(command[1:])} failed, as it says above.")


if __name__ == "__main__":
    run_command("python -m benchmarks.classwise", __doc__, ClasswiseConfig, run)

"""A person forgotten in the small model of people, by PIU, SalUn and ESD: ``python -m benchmarks.people``.

Each method first tries the same learning rates on a person whom the table does not have; that of the highest mean of
the share of pictures that no longer show the person, and of the others' that show whom they were asked for, is its own,
the lower one if two are alike. The model's judge looks at all. What ``--output_dir`` holds already is not made again.
``docs/results/people.json`` and the table of docs/models.md are written in the end (``--write_only``: from the
committed JSON alone).
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.files import read_json, write_json
from salun_diffusion.options import option, run_command
from salun_diffusion.stats import wilson
from salun_diffusion.tables import markdown, put_into

from .classwise_bench import ROOT
from .methods import base_digest
from .methods_page import DOCS, pooled, shown

RESULTS = DOCS / "results" / "people.json"
MODEL = ROOT / "demo" / "identities" / "model"
METHODS = ("piu", "salun", "esd")
TUNING = {"person": "Ben", "learning_rates": [1e-4, 3e-4, 1e-3, 3e-3]}


@dataclass
class PeopleConfig:
    """The options of ``python -m benchmarks.people``."""

    people: list[str] = option(["Ada", "Cleo", "Dan"], "whom to forget, each alone", several=True)
    pictures: int = option(25, "pictures of each person in the model, for each erasure", least=1)
    output_dir: str = option("runs/people", "erasures")
    write_only: bool = option(False, "the table alone, from the committed results")


def measure(config: PeopleConfig) -> None:
    """Tune, erase, measure and write, as the module's docstring says."""
    if not config.write_only:
        write_json(RESULTS, results(config))
    put_into(DOCS / "models.md", "people", table(read_json(RESULTS)))


def results(config: PeopleConfig) -> dict:
    """What docs/results/people.json holds."""
    import diffusers
    import torch

    from demo.identities.measure import scores
    from salun_diffusion import erase, load_erasure, unload_erasure
    from salun_diffusion.models import load_model

    torch.set_num_threads(1)  # of so small a network, more only get in each other's way
    base, model = base_digest(str(MODEL)), load_model(str(MODEL))
    work, names = Path(config.output_dir) / base, list(model.people)
    before = scores(model, MODEL, config.pictures)

    def row(person: str, method: str | None, found: tuple[torch.Tensor, torch.Tensor], rate: float | None) -> dict:
        told = {"person": person, "method": method, "learning_rate": rate}
        gone = torch.tensor([name == person for name in names])
        for which, part in (("u", gone), ("r", ~gone)):
            count = round(float(found[1][part].sum()) * config.pictures)
            told[f"ism_{which}"] = round(float(found[0][part].mean()), 4)
            told[f"acc_{which}"] = wilson(count, int(part.sum()) * config.pictures)
        return told

    def erased(person: str, method: str, rate: float) -> dict:
        folder = work / f"{person}-{method}-{rate:g}"
        if not (folder / "config.json").exists():
            erase(str(MODEL), person, method=method, learning_rate=rate, output_dir=str(folder),
                  data_dir=str(work / "data"))  # fmt: skip
        name = load_erasure(model.pipe, folder)
        found = row(person, method, scores(model, MODEL, config.pictures), rate)
        unload_erasure(model.pipe, name)
        return found

    trials = [erased(TUNING["person"], method, rate) for method in METHODS for rate in TUNING["learning_rates"]]
    rows = []
    for person in config.people:
        rows.append(row(person, None, before, None))
        rows += [erased(person, method, rate) for method, rate in chosen(trials).items()]
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"base": base, "versions": versions, "pictures": config.pictures, "people": len(names),
            "tuning": TUNING, "trials": trials, "rows": rows}  # fmt: skip


def chosen(trials: list[dict]) -> dict[str, float]:
    """Method → the learning rate of its best trial."""

    def score(trial: dict) -> float:
        return 100 - trial["acc_u"]["percent"] + trial["acc_r"]["percent"]

    best = {method: max((t for t in trials if t["method"] == method), key=score) for method in METHODS}
    return {method: trial["learning_rate"] for method, trial in best.items()}


def table(found: dict) -> str:
    """The table of docs/models.md, and under it how it was measured."""
    rows = [["to forget", "erased by", "ISM of U ↓", "ISM of R ↑", "Acc of U ↓", "Acc of R ↑", "SRK ↑"]]
    people = list(dict.fromkeys(row["person"] for row in found["rows"]))
    for person in [*people, None]:  # None for all
        for method in (None, *METHODS):
            mine = [row for row in found["rows"] if row["method"] == method and person in (row["person"], None)]
            ism = [f"{sum(row[f'ism_{which}'] for row in mine) / len(mine):.2f}" for which in "ur"]
            lost, kept = (pooled([row[f"acc_{which}"] for row in mine]) for which in "ur")
            srk = f"{kept['percent'] / (lost['percent'] + 1):.2f}"
            rows.append([person or f"all {len(people)}", method or "nothing", *ism, shown(lost), shown(kept), srk])
    rates = ", ".join(f"{method} {rate:g}" for method, rate in chosen(found["trials"]).items())
    tuning, versions = found["tuning"], found["versions"]
    return (
        f"{markdown(rows)}\n\n{found['pictures']} pictures of each of {found['people']} people a row, Wilson 95% "
        f"intervals, one seed. Learning rates, chosen from {', '.join(f'{r:g}' for r in tuning['learning_rates'])} on "
        f"{tuning['person']}: {rates}; else the model's own settings. Base model {found['base']}, torch "
        f"{versions['torch']}, diffusers {versions['diffusers']}. Made by `python -m benchmarks.people`; every number "
        "is in `docs/results/people.json`."
    )


if __name__ == "__main__":
    run_command("python -m benchmarks.people", __doc__, PeopleConfig, measure)

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
from salun_diffusion.tables import markdown, put_into

from .classwise_bench import ROOT
from .erasing import CORES, base_digest, run
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

    base, rates = base_digest(str(MODEL)), TUNING["learning_rates"]
    folder = Path(config.output_dir) / base
    trials = measured(config, folder, [(TUNING["person"], method, rate) for method in METHODS for rate in rates])
    best = chosen(trials["erasures"])
    wanted = [(person, method, rate) for person in config.people for method, rate in best.items()]
    found = measured(config, folder, wanted)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"base": base, "versions": versions, "tuning": TUNING, "trials": trials["erasures"]} | found


def measured(config: PeopleConfig, folder: Path, wanted: list[tuple[str, str, float]]) -> dict:
    """What ``python -m demo.identities --measure`` says of erasures by person, method and learning rate."""
    runs = {f"{person}-{method}-{rate:g}": (person, method, rate) for person, method, rate in wanted}
    for name, (person, method, rate) in runs.items():
        if not (folder / name / "config.json").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            run(folder / f"{name}.log", "erase_concept.py", "--pretrained_model_name_or_path", MODEL, "--concept",
                person, "--method", method, "--learning_rate", rate, "--output_dir", folder / name, "--data_dir",
                folder / "data", core=CORES[0])  # fmt: skip
    paths = [folder / name for name in runs]
    run(folder / "measure.log", "-m", "demo.identities", "--measure", *paths, "--pictures", config.pictures,
        "--results", folder / "measured.json", core=CORES[0])  # fmt: skip
    found = read_json(folder / "measured.json")
    for told, (_, _, rate) in zip(found["erasures"], runs.values(), strict=True):
        told["learning_rate"] = rate
    return found


def chosen(trials: list[dict]) -> dict[str, float]:
    """Method → the learning rate of its best trial."""

    def score(trial: dict) -> float:
        return 100 - trial["after"]["acc_u"]["percent"] + trial["after"]["acc_r"]["percent"]

    best = {method: max((t for t in trials if t["method"] == method), key=score) for method in METHODS}
    return {method: trial["learning_rate"] for method, trial in best.items()}


def table(found: dict) -> str:
    """The table of docs/models.md, and under it how it was measured."""
    rows = [["to forget", "erased by", "ISM of U ↓", "ISM of R ↑", "Acc of U ↓", "Acc of R ↑", "SRK ↑"]]
    people = list(dict.fromkeys(told["concept"] for told in found["erasures"]))
    for person in [*people, None]:  # None for all
        mine = [told for told in found["erasures"] if person in (told["concept"], None)]
        groups = {"nothing": [told["before"] for told in mine if told["method"] == METHODS[0]]}  # each has it
        groups |= {method: [told["after"] for told in mine if told["method"] == method] for method in METHODS}
        for method, cells in groups.items():
            ism = [f"{sum(cell[key] for cell in cells) / len(cells):.2f}" for key in ("ism_u", "ism_r")]
            lost, kept = (pooled([cell[key] for cell in cells]) for key in ("acc_u", "acc_r"))
            srk = f"{kept['percent'] / (lost['percent'] + 1):.2f}"
            rows.append([person or f"all {len(people)}", method, *ism, shown(lost), shown(kept), srk])
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

"""The commands: each works on a scenario's folder, cell by cell, and goes on where it was stopped.

::

    config.json                       what all cells share, with digests of the files that it names
    source/model.safetensors          the source model; results.json: its accuracy
    seed-S/METHOD/model.safetensors   an unlearned model; unlearned.json: settings, minutes
    seed-S/METHOD/results.json        the cell: the same, and metrics
    results.json, table.md …          the whole (tables.py)

A cell's ``results.json`` (``format`` "salun-diffusion unlearning 1") holds ``method``, ``seed``, ``settings``, ``mask``
(``file`` and ``sha256`` of one that was given, or null), ``minutes`` (RTE), ``metrics``
(:func:`classification.metrics.evaluate`), ``n`` (pictures of each set), ``scenario`` (the settings that config.json
holds), ``versions``.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from salun_diffusion.errors import SalunError
from salun_diffusion.files import read_json, sha256, write_json
from salun_diffusion.tables import put_into

from . import tables
from .config import SEEDS, Config
from .continual import continual  # noqa: F401  (a command too)
from .curve import curve  # noqa: F401
from .methods import METHODS
from .metrics import COMPARED, gap
from .scenario import VERSIONS, Scenario

FORMAT = "salun-diffusion unlearning 1"
UNLEARNED, RESULTS = "unlearned.json", "results.json"
TUNE_SEED = SEEDS  # draws a forget set that no reported seed draws
FACTORS = (0.1, 0.3, 1, 3, 10)  # what the one setting that each method is tuned in is multiplied by


def run(config: Config) -> dict:
    """Source, every method with every seed, metrics, and the table.

    Returns:
        The content of the folder's ``results.json``, as :mod:`classification.tables` documents it.

    Raises:
        SalunError: settings that do not fit together, or an output folder of other settings.
    """
    scenario = Scenario(config)
    scenario.begin()
    scenario.source()
    cells = [(seed, method) for seed in config.seeds for method in config.methods]
    missing = [
        (seed, method)
        for seed, method in cells
        if (cell := _read(scenario, method, seed, RESULTS)) is None or cell["mask"]  # a mask that was not asked for now
    ]
    with tqdm(total=len(cells), initial=len(cells) - len(missing), desc="cells", unit="cell") as bar:
        for seed, method in missing:
            bar.set_postfix_str(f"{METHODS[method].title}, seed {seed}")
            _unlearn(scenario, method, seed)
            _evaluate(scenario, method, seed)
            bar.update()
    return tables.write(scenario.folder, tables.gather(scenario.folder, config.methods, config.seeds))


def train(config: Config) -> None:
    """The source model."""
    scenario = Scenario(config)
    scenario.begin()
    scenario.source()
    accuracy = read_json(scenario.folder / "source" / RESULTS)["accuracy"]
    print(f"{scenario.folder}/source: {', '.join(f'{name} {value:.2f}%' for name, value in accuracy.items())}")


def unlearn(config: Config, mask: str | None = None) -> None:
    """The methods with every seed, without measuring.

    Args:
        config: the scenario's settings, checked.
        mask: a mask file in place of the one that a method would make; Retrain is left out then.

    Raises:
        SalunError: also for a mask for methods that have none.
    """
    scenario = Scenario(config)
    masked = [name for name, method in METHODS.items() if method.takes_mask]
    if mask and not set(config.methods) <= {"retrain", *masked}:
        raise SalunError(f"--mask is for {' and '.join(masked)} alone: choose one of these with --methods.")
    if mask:
        scenario.read_masks(mask)
    scenario.begin()
    for seed in config.seeds:
        for method in config.methods:
            if mask and method == "retrain":
                continue
            minutes = _unlearn(scenario, method, seed, mask)
            print(f"{_folder(scenario, method, seed)}: {minutes:.2f} min")


def evaluate(config: Config) -> None:
    """The metrics of every unlearned model that is there.

    Raises:
        SalunError: there is none.
    """
    scenario = Scenario(config)
    cells = [(seed, method) for seed in config.seeds for method in config.methods]
    unlearned = [(seed, method) for seed, method in cells if _read(scenario, method, seed, UNLEARNED)]
    if not unlearned:
        raise SalunError(
            f"{scenario.folder} holds no unlearned model of these: run `python -m classification unlearn`."
        )
    for seed, method in unlearned:
        metrics = _evaluate(scenario, method, seed)
        shown = ", ".join(f"{name.upper()} {metrics[name]:.2f}" for name in COMPARED)
        print(f"{_folder(scenario, method, seed)}: {shown}")


def table(config: Config, results: str | None = None, into: str | None = None) -> dict:
    """The table and the plots of what was measured.

    Args:
        config: the scenario's settings, checked.
        results: a ``results.json`` that this command wrote, in place of the folder's cells.
        into: a Markdown document whose part between ``<!-- DATASET -->`` (where a class was forgotten, ``<!--
            DATASET-class -->``) and ``<!-- end -->`` becomes the table.

    Returns:
        The content of the folder's ``results.json``, as :mod:`classification.tables` documents it.

    Raises:
        SalunError: a cell or ``results`` is missing or damaged, or ``into`` has no place for the table.
    """
    folder = Path(config.output_dir)
    summary = tables.read(Path(results)) if results else tables.gather(folder, config.methods, config.seeds)
    if into:
        name = Path(summary["scenario"]["dataset"]).name
        name += "-class" * summary["scenario"]["forget"].startswith("class:")
        source = f" --results {Path(results).as_posix()}" if results else f" --output_dir {config.output_dir}"
        made = f"Made by `python -m classification table{source} --into {Path(into).as_posix()}`."
        put_into(Path(into), name, f"{tables.markdown(summary)} {made}")
    return summary if results else tables.write(folder, summary)


def tune(config: Config, output: str) -> dict:
    """Choose each method's one tuned setting, by five trials of each method.

    They use a forget set that no reported seed draws, and validation pictures in place of the test's; the smallest gap
    to Retrain wins. Trials that are there already are not run again.

    Args:
        config: the scenario's settings, checked.
        output: where a file for ``--config`` goes.

    Returns:
        Method → its settings, as the file's ``method_settings`` hold them.

    Raises:
        SalunError: settings that do not fit together, or an output folder of other settings.
    """
    if not Path(output).resolve().parent.is_dir():
        raise SalunError(f"--output {output} lies in a folder that is not there: make it first.")
    scenario = Scenario(config, on_validation=True)
    scenario.begin()
    scenario.source()
    path = scenario.folder / "tuning.json"
    try:
        trials = dict(read_json(path)) if path.exists() else {}
    except (ValueError, TypeError):
        raise SalunError(f"{path} is damaged: remove it to run the trials again.") from None

    def trial(method: str, over: dict) -> dict:
        settings = asdict(scenario.settings(method, over))
        key = f"{method} {json.dumps(settings, sort_keys=True)}"
        if key not in trials:
            try:
                model, minutes, _ = scenario.unlearn(method, TUNE_SEED, over)
                trials[key] = {"metrics": scenario.measure(model, TUNE_SEED), "minutes": minutes}
            except SalunError as error:  # too high a rate: the loss or the answers are no numbers
                trials[key] = {"failed": str(error)}
            write_json(path, trials)
        return trials[key]

    reference = trial("retrain", {})["metrics"]
    chosen: dict[str, dict] = {}
    methods = [method for method in config.methods if method != "retrain"]
    with tqdm(total=len(methods) * len(FACTORS), desc="trials", unit="trial") as bar:
        for method in methods:
            name = METHODS[method].tuned
            gaps = {}
            for factor in FACTORS:
                value = float(f"{getattr(scenario.settings(method), name) * factor:.3g}")
                result = trial(method, {name: value})
                gaps[value] = gap(result["metrics"], reference) if "metrics" in result else math.inf
                bar.update()
            best = min(gaps, key=gaps.get)
            chosen[method] = METHODS[method].defaults | config.method_settings.get(method, {}) | {name: best}
            bar.write(f"{METHODS[method].title}: {name} {best:g}, gap {gaps[best]:.2f} (of {_listed(gaps)})")
    settings = {name: value for name, value in config.shared().items() if value is not None}
    write_json(output, settings | {"method_settings": chosen})
    print(f"Written to {output}: python -m classification run --config {output}")
    return chosen


def _listed(gaps: dict[float, float]) -> str:
    return ", ".join(f"{value:g}: {gap:.2f}" for value, gap in gaps.items())


def _folder(scenario: Scenario, method: str, seed: int) -> Path:
    return scenario.folder / f"seed-{seed}" / method


def _read(scenario: Scenario, method: str, seed: int, name: str) -> dict | None:
    """The cell's file, if it is of the settings of now."""
    try:
        cell = read_json(_folder(scenario, method, seed) / name)
    except (OSError, ValueError):
        return None
    fits = isinstance(cell, dict) and cell.get("settings") == asdict(scenario.settings(method)) and "mask" in cell
    return cell if fits else None


def _unlearn(scenario: Scenario, method: str, seed: int, path: str | None = None) -> float:
    """Unlearn, by the mask of a file if its path is given, and keep the model; minutes."""
    folder = _folder(scenario, method, seed)
    mask = {"file": Path(path).name, "sha256": sha256(Path(path))} if path else None
    cell = _read(scenario, method, seed, UNLEARNED)
    if cell and cell["mask"] == mask:
        return cell["minutes"]
    model, minutes, settings = scenario.unlearn(method, seed, mask=path)
    (folder / UNLEARNED).unlink(missing_ok=True)
    (folder / RESULTS).unlink(missing_ok=True)
    scenario.write_model(folder / "model.safetensors", model)
    cell = {"method": method, "seed": seed, "settings": asdict(settings), "mask": mask, "minutes": round(minutes, 4)}
    write_json(folder / UNLEARNED, cell)
    return minutes


def _evaluate(scenario: Scenario, method: str, seed: int) -> dict:
    folder = _folder(scenario, method, seed)
    cell = read_json(folder / UNLEARNED)
    metrics = scenario.measure(scenario.read_model(folder / "model.safetensors"), seed)
    sizes = {name: len(part) for name, part in scenario.sets(seed).items()}
    results = {"format": FORMAT} | cell | {"metrics": metrics, "n": sizes, "scenario": scenario.config.shared()}
    write_json(folder / RESULTS, results | {"versions": VERSIONS})
    return metrics

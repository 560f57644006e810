"""`python -m classification continual`: classes come and go, task after task, as BID-LoRA (2604.12686) is measured.

A window of classes slides over all of them. A source knows the first; each task forgets the ``step`` classes that the
window leaves, keeps those that it still holds, and learns the ``step`` that it comes to. A method goes on from its own
last model, with a tenth of what it keeps, and the new classes in full; Retrain learns each window from nothing.

::

    continual.json                               what the table is made of (format "salun-diffusion continual 1")
    seed-S/task-T/METHOD/model.safetensors       after task T; task-0/source is where all begin
"""

import functools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from salun_diffusion import tables
from salun_diffusion.errors import SalunError
from salun_diffusion.files import write_json

from .config import Config
from .data import Pictures, joined
from .methods import METHODS
from .methods.task import Task
from .metrics import confidence, corrected_attack
from .scenario import VERSIONS, Scenario
from .tables import whole
from .training import logits, seeded

FORMAT = "salun-diffusion continual 1"
TASKS = 6  # at most, as published
COLUMNS = {  # key → (heading, digits)
    "overall": ("Acc_o", 1), "kept": ("Acc_r", 1), "new": ("Acc_n", 1), "forgotten": ("Acc_f", 1),
    "kl": ("KL to Retrain", 2), "sink": ("one answer, %", 0), "mia_auc": ("MIA, AUC", 3),
}  # fmt: skip
NOTES = (
    "Test pictures answered right, in percent: Acc_o of all classes of the window, Acc_r of those kept, Acc_n of the "
    "new, Acc_f of all that were forgotten by then. KL: of Retrain's answers to the window's test pictures from the "
    "model's. One answer: the share of the forgotten classes' test pictures that get the most frequent answer. AUC "
    "0.5: training pictures of the forgotten cannot be told from their test pictures."
)


def continual(
    config: Config,
    start: int | None = None,
    step: int | None = None,
    tasks: int | None = None,
    results: str | None = None,
    into: str | None = None,
) -> dict:
    """Run all tasks with every seed, or read what was measured, and print the table.

    Args:
        config: the scenario's settings, checked, with methods of ``config.CONTINUAL``.
        start: classes that the source knows; 3 of 10 without it.
        step: classes that go and come in a task; 1 of 10 without it.
        tasks: how many; as many as the classes allow, six at most, without it.
        results: a ``continual.json`` in place of the run.
        into: a Markdown document whose part between ``<!-- DATASET-continual -->`` and ``<!-- end -->`` becomes the
            table.

    Returns:
        What ``continual.json`` holds: ``scenario``, ``window`` (``start``, ``step``, ``tasks``), ``seeds``,
        ``settings`` by method, ``versions``, and ``methods``: for each, task after task, ``COLUMNS`` → ``mean``,
        ``std`` (over seeds, n − 1) and ``values``.

    Raises:
        SalunError: windows that the classes do not allow, or an output folder of other settings.
    """
    found = read(Path(results)) if results else _run(config, start, step, tasks)
    rows = _rows(found)
    if into:
        source = f" --results {Path(results).as_posix()}" if results else f" --output_dir {config.output_dir}"
        made = f"Made by `python -m classification continual{source} --into {Path(into).as_posix()}`."
        name = f"{Path(found['scenario']['dataset']).name}-continual"
        tables.put_into(Path(into), name, f"{tables.markdown(rows)}\n\n{notes(found)} {made}")
    print(tables.aligned([[cell.replace("±", "+-") for cell in row] for row in rows]))
    return found


def _run(config: Config, start: int | None, step: int | None, tasks: int | None) -> dict:
    scenario = Scenario(config)
    window = _window(scenario, start, step, tasks)
    settings = {name: vars(scenario.settings(name)) for name in config.methods}
    scenario.also({"window": window, "settings": {name: settings[name] for name in settings if name != "retrain"}})
    scenario.begin()
    measured = {name: [[] for _ in range(window["tasks"])] for name in config.methods}
    for seed in config.seeds:
        learn = functools.partial(_learn, scenario, "retrain", None, range(0), range(window["start"]), seed, 0)
        last = dict.fromkeys(config.methods, _model(scenario, seed, 0, "source", learn))
        for number in tqdm(range(1, window["tasks"] + 1), desc=f"tasks, seed {seed}", unit="task"):
            before, after = (
                range(n * window["step"], n * window["step"] + window["start"]) for n in (number - 1, number)
            )
            for name in config.methods:
                learn = functools.partial(_learn, scenario, name, last[name], before, after, seed, number)
                last[name] = _model(scenario, seed, number, name, learn)
            exact = scenario.read_model(last["retrain"])
            for name in config.methods:
                cell = _measure(scenario, scenario.read_model(last[name]), exact, before, after)
                measured[name][number - 1].append(cell)
    found = {"format": FORMAT, "scenario": config.shared(), "window": window, "seeds": config.seeds}
    found |= {"settings": settings, "versions": VERSIONS}
    found |= {"methods": {name: [_over_seeds(cells) for cells in each] for name, each in measured.items()}}
    write_json(scenario.folder / "continual.json", found)
    print(f"In {scenario.folder}: continual.json.")
    return found


def _window(scenario: Scenario, start: int | None, step: int | None, tasks: int | None) -> dict:
    data, count = scenario.data, len(scenario.data.classes)
    start, step = start or max(2, round(0.3 * count)), step or max(1, round(0.1 * count))
    tasks = tasks or min(TASKS, (count - start) // step)
    if step >= start or tasks < 1 or start + tasks * step > count:
        raise SalunError(
            f"{count} classes do not allow --start {start}, --step {step} and --tasks {tasks}: step must be below "
            "start, and start + tasks · step at most the number of classes."
        )
    if missing := {*range(count)} - {*data.test.labels.tolist()}:
        raise SalunError(
            f"{data.name} has no test picture of {data.classes[min(missing)]}: there is nothing to measure."
        )
    return {"start": start, "step": step, "tasks": tasks}


def _model(scenario: Scenario, seed: int, number: int, name: str, learn: Callable[[], nn.Module]) -> Path:
    """Where the model after a task lies, made if it is not there."""
    path = scenario.folder / f"seed-{seed}" / f"task-{number}" / name / "model.safetensors"
    if not path.exists():
        with seeded(_seed(seed, number)):
            scenario.write_model(path, learn())
    return path


def _learn(
    scenario: Scenario, method: str, last: Path | None, before: range, after: range, seed: int, number: int
) -> nn.Module:
    """The model after a task: all of ``after`` is to be known, and nothing else of ``before``."""
    from .methods.bid_lora import adapt, replayed  # only now: peft takes seconds, and all commands import this file

    parts = ({*before} & {*after}, {*after} - {*before}, {*before} - {*after})
    keep, new, gone = (_of(scenario.data.train, classes) for classes in parts)
    fresh = functools.partial(scenario.model, 1000 + seed)
    task = Task(
        model=scenario.read_model(last) if last else fresh(), forget=gone, retain=keep,
        classes=len(scenario.data.classes), settings=scenario.settings(method),
        generator=torch.Generator().manual_seed(_seed(seed, number)), fresh=fresh, recipe=scenario.recipe,
        title=f"{METHODS[method].title}, seed {seed}, task {number}",
    )  # fmt: skip
    if method == "bid_lora":
        adapt(task, new)
        return task.model
    task.retain = joined(keep if method == "retrain" else replayed(keep), new)
    METHODS[method](task)
    return task.model


def _seed(seed: int, number: int) -> int:
    return 1000 * seed + number


def _of(pictures: Pictures, classes: Iterable[int]) -> Pictures:
    return pictures[
        torch.isin(pictures.labels, torch.tensor([*classes], dtype=torch.int64, device=pictures.labels.device))
    ]


def _measure(scenario: Scenario, model: nn.Module, exact: nn.Module, before: range, after: range) -> dict[str, float]:
    test, gone = scenario.data.test, range(after.start)
    sets = {"overall": after, "kept": {*before} & {*after}, "new": {*after} - {*before}, "forgotten": gone}
    found = {name: scenario.accuracy(model, _of(test, classes)) for name, classes in sets.items()}
    now, unseen, learnt = _of(test, after), _of(test, gone), _of(scenario.data.train, gone)
    found["kl"] = divergence(logits(exact, now), logits(model, now))
    answers = logits(model, unseen)
    found["sink"] = 100 * float(answers.argmax(1).bincount().max()) / len(unseen)
    attack = corrected_attack(
        confidence(logits(model, learnt), learnt.labels.cpu()), confidence(answers, unseen.labels.cpu())
    )
    return found | {"mia_auc": attack["auc"]}


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(softmax ``exact`` ‖ softmax ``other``) in nats, of fp32 ``(n, classes)``."""
    return F.kl_div(other.log_softmax(1), exact.log_softmax(1), reduction="batchmean", log_target=True).item()


def _over_seeds(cells: list[dict[str, float]]) -> dict[str, dict]:
    found = {}
    for name in COLUMNS:
        values = [round(cell[name], 4) for cell in cells]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": round(statistics.fmean(values), 4), "std": round(std, 4), "values": values}
    return found


def read(path: Path) -> dict:
    """A ``continual.json`` that the command wrote.

    Raises:
        SalunError: it is something else, or damaged.
    """
    return whole(path, FORMAT, lambda found: (_rows(found), notes(found)), "continual")


def _rows(found: dict) -> list[list[str]]:
    rows = [["task", "", *(heading for heading, _ in COLUMNS.values())]]
    for number in range(found["window"]["tasks"]):
        for name, each in found["methods"].items():
            row = [str(number + 1), METHODS[name].title]
            for key, (_, digits) in COLUMNS.items():
                score = each[number][key]
                text = f"{score['mean']:.{digits}f}"
                row.append(text + (f" ± {score['std']:.{digits}f}" if len(found["seeds"]) > 1 else ""))
            rows.append(row)
    return rows


def notes(found: dict) -> str:
    """What was done, in a few sentences."""
    scenario, window, seeds = found["scenario"], found["window"], len(found["seeds"])
    over = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    return (
        f"{scenario['model']} on {scenario['dataset']}; the source knows {window['start']} classes, and each task "
        f"forgets {window['step']} and learns {window['step']}. {over}. {NOTES} torch {found['versions']['torch']}."
    )

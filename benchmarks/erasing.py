"""Erasures for the comparisons, each a process of its own on a core of its own, and their measurement together."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from queue import Queue

from tqdm import tqdm

from salun_diffusion.errors import SalunError
from salun_diffusion.files import write_json
from salun_diffusion.methods import find_method
from salun_diffusion.models.load import digest, load_pipeline

CORES = sorted(os.sched_getaffinity(0))
FREE: Queue = Queue()  # cores that no erasure is using
for _core in CORES:
    FREE.put(_core)


def base_digest(base: str) -> str:
    """Of a base model, by name or folder: erasures are kept in a folder of that name, so that none is taken for one of
    another base.
    """
    return digest(load_pipeline(base))


def name_of(name: str) -> str:
    """The folder of an erasure."""
    return name.replace(" ", "-").replace(",", "")


def erase_all(config: dict, kind: str, wanted: dict, concept: str, folder: Path) -> None:
    """Erase ``concept``, of a ``kind``, once for each of ``wanted`` (name → method and its own settings), an erasure a
    core. Those that are in ``folder`` are kept.
    """
    runs = [folder / name_of(name) for name in wanted]
    how = config | {"settings": config["settings"][kind]}
    erase(how, concept, *next(iter(wanted.values())), runs[0])  # first alone: it draws what the others share
    with ThreadPoolExecutor(len(CORES)) as pool, tqdm(desc=f"erasing {concept}", total=len(runs), unit="run") as bar:
        jobs = [pool.submit(erase, how, concept, *wanted[name], run) for name, run in zip(wanted, runs, strict=True)]
        try:
            for job in jobs:
                job.result()
                bar.update()
        except BaseException:  # a failed run, or Ctrl-C: those that are under way end, and no other is begun
            pool.shutdown(cancel_futures=True)
            raise


def judge(config: dict, wanted: dict, concept: str, folder: Path, images: str) -> dict:
    """``python -m eval accuracy`` of the erasures in ``folder``: its results, each model by its name in ``wanted``."""
    counts = config["images"][images]
    done, asked = folder / "asked.json", {"models": {name: list(what) for name, what in wanted.items()}} | counts
    if not done.exists() or json.loads(done.read_text()) != asked:
        words = [word for name, count in counts.items() for word in (f"--{name}", count)]
        run(
            folder / "eval.log", "-m", "eval", "accuracy", "--pretrained_model_name_or_path", config["base"],
            "--concept", concept, "--output_dir", folder, "--erasure", *(folder / name_of(name) for name in wanted),
            *words,
        )  # fmt: skip
        write_json(done, asked)
    found = json.loads((folder / "results.json").read_text())
    for model, name in zip(found["models"][1:], wanted, strict=True):
        model["name"] = name
    return found


def erase(config: dict, concept: str, method: str, own: dict, folder: Path) -> None:
    """One erasure in a process of its own; ``cost.json`` in its folder says that it is done, and what it took."""
    kind, common = find_method(method), config["settings"]
    options = kind.parse(own.get("method_option", []))
    # said in full: what the demo model's presets hold came out of this comparison, and must not go into it
    settings = {} if kind.guard else {"scope": kind.scope}
    settings |= {} if kind.closed_form else common["trained"]
    settings |= common["retaining"] if kind.uses_retain else {}
    settings |= common["pictured"] if {"forget", "anchor"} & {*kind.sets(kind.mask, options)} else {}
    settings |= {"pretrained_model_name_or_path": config["base"], "concept": concept, "method": method} | own
    said = {item.name: getattr(options, item.name) for item in fields(options)}
    settings["method_option"] = [f"{name}={value}" for name, value in said.items() if value is not None]
    if (folder / "cost.json").exists() and json.loads((folder / "settings.json").read_text()) == settings:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "settings.json", settings)
    words = ["erase_concept.py", "--config", folder / "settings.json", "--output_dir", folder]
    core = FREE.get()
    try:
        cost = run(folder / "log.txt", *words, "--data_dir", folder.parent.parent.parent / "data", core=core)
    finally:
        FREE.put(core)
    write_json(folder / "cost.json", cost)


def run(log: Path, *words, core: int | None = None) -> dict:
    """A Python process, its output in ``log``; its wall seconds and peak resident memory in GiB.

    Args:
        log: the file that its output goes into.
        *words: what Python is given.
        core: the one that it may use; all of them without it.

    Raises:
        SalunError: it failed.
    """
    begun = time.perf_counter()
    pinned = [] if core is None else ["taskset", "--cpu-list", str(core)]
    with open(log, "w") as file:
        process = subprocess.Popen([*pinned, sys.executable, *map(str, words)], stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SalunError(f"{' '.join(map(str, words))} failed; {log} says why.")
    return {"wall_seconds": round(time.perf_counter() - begun, 1), "peak_gib": round(used.ru_maxrss / 2**20, 2)}

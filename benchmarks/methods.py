"""Every unlearning method on the demo model, with the same tuning budget: ``python -m benchmarks.methods``.

benchmarks/methods.json, or another ``--comparison FILE``, says all that matters: the concepts, the pictures measured,
the settings that all methods share, and each method's grid. First each method tries its grid on the tuning concepts,
one object and one style, which are not in the table; the trial with the highest mean of UA, IRA and CRA is its
setting for that kind of concept. Then it has to forget the table's concepts; SalUn and its adversarial form once more
with the settings under "further", which took more trials than others had. Each is then attacked and relearned as
"hidden" says, for what UA does not show. Each erasure is a process of its own on a core of its own, for its time and
peak memory. ``docs/results/methods-trials.json`` is written after the trials of each kind of concept;
``docs/results/methods.json``, and the tables and plot of docs/methods.md, after each concept. What these files or
``--output_dir`` hold already is not made again (``--write_only``: the page from the committed JSON alone).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from queue import Queue

from tqdm import tqdm

from salun_diffusion.errors import SalunError
from salun_diffusion.files import read_json, write_json
from salun_diffusion.methods import find_method
from salun_diffusion.models.load import digest, load_pipeline
from salun_diffusion.options import option, run_command

from . import methods_page

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
FREE: Queue = Queue()  # cores that no erasure is using
RESULTS = HERE.parent / "docs" / "results" / "methods.json"
TRIALS = RESULTS.with_name("methods-trials.json")


@dataclass
class MethodsConfig:
    """The options of ``python -m benchmarks.methods``."""

    comparison: str | None = option(None, "a JSON file that says what to measure (default: benchmarks/methods.json)")
    output_dir: str = option("runs/methods", "erasures and their measurements")
    write_only: bool = option(False, "the table and the plot, from the committed results")


def read(path: Path) -> dict:
    """What to measure, with the ``digest`` of the base model: nothing that was measured on another is taken for it.

    Raises:
        SalunError: the file does not say it, or the base model cannot be loaded.
    """
    needed = ("base", "tuning", "concepts", "images", "hidden", "settings", "further", "frontier", "grid")
    try:
        config = read_json(path)
        whole = {*needed} <= config.keys()
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise SalunError(
            f"{path} says not what to measure: give JSON with {', '.join(needed)}, as benchmarks/methods.json."
        )
    return config | {"digest": base_digest(config["base"])}


def base_digest(base: str) -> str:
    """Of a base model, by name or folder: erasures are kept in a folder of that name, so that none is taken for one of
    another base.
    """
    return digest(load_pipeline(base))


def compare(options: MethodsConfig) -> None:
    """Tune, measure and write, as the module's docstring says."""
    if not options.write_only:
        config = read(Path(options.comparison or HERE / "methods.json"))
        folder, known = Path(options.output_dir) / config["digest"], read_json(RESULTS) if RESULTS.exists() else {}
        for core in CORES:
            FREE.put(core)
        about = {"processor": platform.processor() or platform.machine(), "cores": len(CORES)}
        chosen = tune(config, folder, read_json(TRIALS) if TRIALS.exists() else {})
        found = {"about": about, "config": config, "chosen": chosen, "concepts": {}}
        found["frontier"] = frontier(config, chosen, folder, known)
        held = {(kind, entry["concept"]): entry for kind, mine in known.get("concepts", {}).items() for entry in mine}
        for kind, name in in_turn(config["concepts"]):
            wanted = wanted_of(config, chosen, kind)
            asked, entry = told(config, wanted), held.get((kind, name), {})
            if entry.get("asked") != asked:
                entry = {"asked": asked} | measure(config, wanted, name, kind, folder)
            found["concepts"].setdefault(kind, []).append(entry)
            write_json(RESULTS, found)
            methods_page.write(found)
        shown = config["concepts"]["object"][0]
        if (folder / "table" / shown).is_dir():
            methods_page.pictures(found, folder / "table" / shown, shown)
    results = json.loads(RESULTS.read_text())
    methods_page.write(results)
    shipped = json.loads((HERE.parent / "demo" / "settings.json").read_text())
    for kind, methods in best_settings(results, read_json(HERE / "methods.json")["further"]).items():
        for method, settings in methods.items():
            if shipped[kind].get(method) != settings:
                print(f"demo/settings.json has others for {kind}, {method}; found here: {json.dumps(settings)}")


def in_turn(concepts: dict[str, list[str]]) -> list[tuple[str, str]]:
    """``(kind, concept)``, the first of each kind, then the second of each: a stopped run has some of all kinds."""
    longest = max(map(len, concepts.values()))
    return [(kind, names[i]) for i in range(longest) for kind, names in concepts.items() if i < len(names)]


def wanted_of(config: dict, chosen: dict, kind: str) -> dict[str, tuple[str, dict]]:
    """Row of the table → method and its own settings for a kind of concept: each method's best trial, and those with
    more trials.
    """
    wanted = {method: (method, own) for method, own in chosen[kind].items()}
    return wanted | {row: (method, config["further"][kind]) for row, method in methods_page.FURTHER.items()}


def told(config: dict, wanted: dict) -> dict:
    """All that decides what is measured of a concept."""
    return {
        "base": config["digest"],
        "models": {name: list(what) for name, what in wanted.items()},
        "settings": config["settings"],
        "images": config["images"]["table"],
        "hidden": config["hidden"],
    }


def best_settings(results: dict, further: dict) -> dict[str, dict[str, dict]]:
    """Kind of concept → method → all of its settings, as demo/settings.json holds them: the best trial's in the
    ``results``; SalUn's are those tuned ``further``, and random labelling and the adversarial SalUn take SalUn's.
    """
    config = results["config"]
    best: dict[str, dict[str, dict]] = {}
    for kind, chosen in results["chosen"].items():
        best[kind] = {}
        for name, settings in {**chosen, "salun": further[kind]}.items():
            if name in ("random_label", "salun_adv"):
                continue
            method = find_method(name)
            trained = {} if method.closed_form else config["settings"]["trained"]
            best[kind][name] = trained | (config["settings"]["retaining"] if method.uses_retain else {}) | settings
    return best


def tune(config: dict, folder: Path, known: dict) -> dict:
    """By kind of concept and method, the settings of the best trial; TRIALS gets all trials' scores, kind by kind.

    Args:
        config: what to measure.
        folder: of the trials.
        known: TRIALS before this; trials in it that are wanted as they were made are taken from there.
    """
    chosen: dict = {kind: {} for kind in config["tuning"]}
    alike = all(_tuned(known, key) == _tuned({"config": config}, key) for key in ("digest", "settings", "images"))
    trials: dict = {}
    judged: dict = known.get("judged", {}) if alike else {}
    for kind, concept in config["tuning"].items():
        made: dict = known["trials"].get(kind, {}) if alike and known["config"]["tuning"].get(kind) == concept else {}
        new, trials[kind] = {}, {}
        for method, grid in config["grid"].items():
            held = {json.dumps(trial["settings"]): trial for trial in made.get(method, [])}
            trials[kind][method] = [held.get(json.dumps(own)) for own in grid]
            new |= {f"{method}-{i}": (method, own) for i, own in enumerate(grid) if not trials[kind][method][i]}
        if new:
            found = erase_and_judge(config, new, concept, folder / "tuning" / concept, "tuning")
            for model, (method, own) in zip(found["models"][1:], new.values(), strict=True):
                scores = {key: model[key]["percent"] for key in ("ua", "ira", "cra")}
                mean = {"score": round(sum(scores.values()) / 3, 2)}
                trials[kind][method][config["grid"][method].index(own)] = {"settings": own} | mean | scores
            judged[kind] = {key: found[key] for key in ("versions", "protocol", "classifier")}
            about = {key: config[key] for key in ("base", "digest", "tuning", "images", "settings")}
            others = known["trials"] if alike else {}
            write_json(TRIALS, {"config": about, "judged": judged, "trials": others | trials})
        for method, mine in trials[kind].items():
            chosen[kind][method] = max(mine, key=lambda trial: trial["score"])["settings"]
    return chosen


def _tuned(results: dict, key: str):
    """What the trials were made with."""
    value = results.get("config", {}).get(key)
    return value["tuning"] if key == "images" and value else value


def measure(config: dict, wanted: dict, concept: str, kind: str, folder: Path) -> dict:
    """One concept of the table: the base model's and each method's counts, seconds, memory and file size."""
    results = erase_and_judge(config, wanted, concept, folder / "table" / concept, "table")
    found = hidden(config, wanted, concept, folder / "table" / concept)
    rows = []
    for model in results["models"]:
        row = {"method": model["name"], "ua": model["ua"], "retained": model["retained"], "ira": model["ira"]}
        row |= {"cra": model["cra"], "instead": model["instead"]} | found[model["name"]]
        if model["erasure"]:
            row |= json.loads((folder / "table" / concept / model["name"] / "cost.json").read_text())
            row |= {"megabytes": round(model["erasure"]["bytes"] / 1e6, 2), "seconds": model["erasure"]["seconds"]}
        rows.append(row)
    return {"concept": concept, "kind": kind, "classifier": results["classifier"]["sha256"],
            "versions": results["versions"], "protocol": results["protocol"], "hidden": found["protocols"],
            "models": rows}  # fmt: skip


def hidden(config: dict, wanted: dict, concept: str, folder: Path) -> dict:
    """What the erasures in ``folder`` hide: model → ``attacks`` (attack → ASR) and ``relearned`` (step → the share that
    shows the concept again), and under "protocols" how each was measured. Every core has a share of the erasures, and
    measures the base model beside them. What is there already is not done again.
    """
    shares = [share for i in range(len(CORES)) if (share := list(wanted)[i :: len(CORES)])]
    found: dict = {name: {} for name in ["base", *wanted]} | {"protocols": []}
    for measure in config["hidden"]:
        with ThreadPoolExecutor(len(shares)) as pool:
            jobs = [pool.submit(hide, config, measure, {name: wanted[name] for name in share}, concept, folder, core)
                    for core, share in zip(CORES, shares, strict=False)]  # fmt: skip
        for job, share in zip(jobs, shares, strict=True):
            for name, model in zip(["base", *share], job.result()["models"], strict=True):
                if measure == "attack":
                    found[name]["attacks"] = {attack: about["asr"] for attack, about in model["attacks"].items()}
                else:
                    found[name]["relearned"] = {str(point["step"]): point["accuracy"] for point in model["curve"]}
        found["protocols"].append(job.result()["protocol"])
    return found


def hide(config: dict, measure: str, wanted: dict, concept: str, folder: Path, core: int) -> dict:
    """``python -m eval MEASURE`` of some of the erasures in ``folder``, on one core: its results."""
    output = folder / measure / name_of(next(iter(wanted)))
    options = config["hidden"][measure]
    done, asked = output / "asked.json", {"models": {name: list(what) for name, what in wanted.items()}} | options
    if not done.exists() or json.loads(done.read_text()) != asked:
        settings = {"pretrained_model_name_or_path": config["base"], "concept": [concept]} | options
        settings["erasure"] = [str(folder / name_of(name)) for name in wanted]
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "settings.json", settings)
        run(output / "log.txt", "-m", "eval", measure, "--config", output / "settings.json", "--output_dir", output,
            core=core)  # fmt: skip
        write_json(done, asked)
    return json.loads((output / "results.json").read_text())


def name_of(name: str) -> str:
    """The folder of an erasure."""
    return name.replace(" ", "-").replace(",", "")


def frontier(config: dict, chosen: dict, folder: Path, known: dict) -> list[dict]:
    """SalUn on objects outside the table, from the table's setting to the one tuned further: what limits it."""
    own, found = chosen["object"]["salun"], []
    changes = {name: change for name, change in config["frontier"]["changes"].items() if own | change != own}
    wanted = {name: ("salun", own | change) for name, change in ({"as in the table": {}} | changes).items()}
    wanted["salun_further"] = ("salun", config["further"]["object"])
    held = {entry["concept"]: entry for entry in known.get("frontier", [])}
    for concept in config["frontier"]["object"]:
        entry = held.get(concept, {})
        asked = {key: value for key, value in told(config, wanted).items() if key != "hidden"}
        if entry.get("asked") != asked:
            results = erase_and_judge(config, wanted, concept, folder / "frontier" / concept, "table")
            models = [{key: model[key] for key in ("ua", "ira", "cra", "retained")} | {"method": model["name"]}
                      for model in results["models"]]  # fmt: skip
            entry = {"concept": concept, "asked": asked, "models": models}
        found.append(entry)
    return found


def erase_and_judge(config: dict, wanted: dict, concept: str, folder: Path, images: str) -> dict:
    """Erase ``concept`` once for each of ``wanted`` (name → method and its own settings), then measure all together."""
    runs, counts = [folder / name_of(name) for name in wanted], config["images"][images]
    erase(config, concept, *next(iter(wanted.values())), runs[0])  # first alone: it draws what the others share
    with ThreadPoolExecutor(len(CORES)) as pool, tqdm(desc=f"erasing {concept}", total=len(runs), unit="run") as bar:
        jobs = [pool.submit(erase, config, concept, *wanted[name], run) for name, run in zip(wanted, runs, strict=True)]
        try:
            for job in jobs:
                job.result()
                bar.update()
        except BaseException:  # a failed run, or Ctrl-C: those that are under way end, and no other is begun
            pool.shutdown(cancel_futures=True)
            raise
    done, asked = folder / "asked.json", {"models": {name: list(what) for name, what in wanted.items()}} | counts
    if not done.exists() or json.loads(done.read_text()) != asked:
        words = [word for name, count in counts.items() for word in (f"--{name}", count)]
        run(
            folder / "eval.log", "-m", "eval", "accuracy", "--pretrained_model_name_or_path", config["base"],
            "--concept", concept, "--output_dir", folder, "--erasure", *runs, *words,
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


if __name__ == "__main__":
    run_command("python -m benchmarks.methods", __doc__, MethodsConfig, compare)

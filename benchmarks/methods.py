"""Every unlearning method on the demo model, with the same tuning budget: ``python -m benchmarks.methods``.

benchmarks/methods.json, or another ``--comparison FILE``, says all that matters: the concepts, the pictures measured,
the settings that all methods share, and each method's grid. First each method tries its grid on the tuning concepts,
one object and one style, which are not in the table; the trial with the highest mean of UA, IRA and CRA is its
setting for that kind of concept. Then it has to forget the table's concepts; SalUn and its adversarial form once more
with the settings under "further", which took more trials than others had. Each is then attacked and relearned as
"hidden" says, for what UA does not show. Each erasure is a process of its own on a core of its own, for its time and
peak memory. ``docs/results/methods-trials.json`` is written after the trials of a few methods;
``docs/results/methods.json``, and the tables and plot of docs/methods.md, after each measure of a concept. What these
files or ``--output_dir`` hold already is not made again (``--write_only``: the page from the committed JSON alone).
"""

import json
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.files import read_json, write_json
from salun_diffusion.methods import find_method
from salun_diffusion.options import option, run_command

from . import methods_page
from .erasing import CORES, base_digest, erase_all, judge, name_of, run

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results" / "methods.json"
TRIALS = RESULTS.with_name("methods-trials.json")
AT_ONCE = 4  # methods, whose trials are judged together
COUNTS = ("ua", "retained", "ira", "cra", "instead")


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


def compare(options: MethodsConfig) -> None:
    """Tune, measure and write, as the module's docstring says."""
    if not options.write_only:
        config = read(Path(options.comparison or HERE / "methods.json"))
        folder, known = Path(options.output_dir) / config["digest"], read_json(RESULTS) if RESULTS.exists() else {}
        about = {"processor": platform.processor() or platform.machine(), "cores": len(CORES)}
        trials = read_json(TRIALS) if TRIALS.exists() else {}
        chosen = {"object": tune(config, "object", folder, trials)}
        found = {"about": about, "config": config, "chosen": chosen, "concepts": {}}
        found["frontier"] = frontier(config, chosen["object"], folder, known)
        held = {(kind, entry["concept"]): entry for kind, mine in known.get("concepts", {}).items() for entry in mine}
        for kind, name in in_turn(config["concepts"]):
            chosen[kind] = chosen.get(kind) or tune(config, kind, folder, trials)
            wanted = wanted_of(config, chosen, kind)
            asked, entry = told(config, wanted, kind), held.get((kind, name), {})
            entry = entry if entry.get("asked") == asked else {"asked": asked}
            for step in measure(config, wanted, name, kind, folder, entry):
                mine = found["concepts"].setdefault(kind, [])
                found["concepts"][kind] = [*(other for other in mine if other["concept"] != name), step]
                write_json(RESULTS, found)
                methods_page.write(found)
            if name == config["concepts"]["object"][0]:  # of what was measured here, not taken over
                if (folder / "table" / name / "results.json").exists():
                    methods_page.pictures(found, folder / "table" / name, name)
                if (folder / "table" / name / "attack").is_dir():
                    methods_page.won_pictures(found, folder / "table" / name, kind)
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


def told(config: dict, wanted: dict, kind: str) -> dict:
    """All that decides what is measured of a concept of a ``kind``."""
    return {
        "base": config["digest"],
        "models": {name: list(what) for name, what in wanted.items()},
        "settings": config["settings"][kind],
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
            own = config["settings"][kind]
            trained = {} if method.closed_form else own["trained"]
            best[kind][name] = trained | (own["retaining"] if method.uses_retain else {}) | settings
    return best


def tune(config: dict, kind: str, folder: Path, trials: dict) -> dict:
    """By method, the settings of its best trial for a ``kind`` of concept.

    Args:
        config: what to measure.
        kind: which.
        folder: of the trials.
        trials: what TRIALS holds: kind → how they were made ("asked"), how judged, and every trial's scores by method.
            Those that are wanted as they were made are taken from there; new ones are added, a few methods at a time,
            and TRIALS is written.
    """
    concept, grids = config["tuning"][kind], config["grid"]
    asked = {"base": config["digest"], "concept": concept, "images": config["images"]["tuning"]}
    asked["settings"] = config["settings"][kind]
    if trials.get(kind, {}).get("asked") != asked:
        trials[kind] = {"asked": asked, "judged": {}, "trials": {}}
    made = trials[kind]["trials"]
    for method, grid in grids.items():
        held = {json.dumps(trial["settings"]): trial for trial in made.get(method, [])}
        made[method] = [trial for own in grid if (trial := held.get(json.dumps(own)))]
    short = [method for method, grid in grids.items() if len(made[method]) < len(grid)]
    for some in (short[i : i + AT_ONCE] for i in range(0, len(short), AT_ONCE)):
        mine = folder / "tuning" / f"{concept}-{some[0]}"
        new = {f"{method}-{i}": (method, own) for method in some for i, own in enumerate(grids[method])}
        erase_all(config, kind, new, concept, mine)
        found = judge(config, new, concept, mine, "tuning")
        for method in some:
            made[method] = []
        for model, (method, own) in zip(found["models"][1:], new.values(), strict=True):
            scores = {key: model[key]["percent"] for key in ("ua", "ira", "cra")}
            made[method].append({"settings": own, "score": round(sum(scores.values()) / 3, 2)} | scores)
        trials[kind]["judged"] = {key: found[key] for key in ("versions", "protocol", "classifier")}
        write_json(TRIALS, trials)
    return {method: max(made[method], key=lambda trial: trial["score"])["settings"] for method in grids}


def measure(config: dict, wanted: dict, concept: str, kind: str, folder: Path, entry: dict) -> Iterator[dict]:
    """One concept of the table, after each measure: the base model's and each method's counts, seconds, memory and
    file size, then what its erasures hide.

    Args:
        config: what to measure.
        wanted: row of the table → method and its own settings.
        concept: which.
        kind: of what.
        folder: of all erasures.
        entry: what is known of the concept already.
    """
    mine = folder / "table" / concept
    missing = [what for what in ("accuracy", *config["hidden"]) if what not in entry.get("protocols", {})]
    if missing:
        erase_all(config, kind, wanted, concept, mine)
    for what in missing:
        if what == "accuracy":
            results = judge(config, wanted, concept, mine, "table")
            rows = [{"method": model["name"]} | {key: model[key] for key in COUNTS} for model in results["models"]]
            for row, model in zip(rows[1:], results["models"][1:], strict=True):
                row |= json.loads((mine / name_of(row["method"]) / "cost.json").read_text())
                row |= {"megabytes": round(model["erasure"]["bytes"] / 1e6, 2), "seconds": model["erasure"]["seconds"]}
            about = {"classifier": results["classifier"]["sha256"], "versions": results["versions"]}
            said = results["protocol"]
        else:
            found, said = hidden(config, what, wanted, concept, mine)
            rows, about = [row | found[row["method"]] for row in entry["models"]], {}
        protocols = entry.get("protocols", {}) | {what: said}
        entry = entry | {"concept": concept, "kind": kind} | about | {"protocols": protocols, "models": rows}
        yield entry
    if not missing:
        yield entry


def hidden(config: dict, measure: str, wanted: dict, concept: str, folder: Path) -> tuple[dict, str]:
    """What the erasures in ``folder`` hide, and how that was measured: model → ``attacks`` (attack → ASR) or
    ``relearned`` (step → the share that shows the concept again). Every core has a share of the erasures, and measures
    the base model beside them. What is there already is not done again.
    """
    shares = [share for i in range(len(CORES)) if (share := list(wanted)[i :: len(CORES)])]
    with ThreadPoolExecutor(len(shares)) as pool:
        jobs = [pool.submit(hide, config, measure, {name: wanted[name] for name in share}, concept, folder, core)
                for core, share in zip(CORES, shares, strict=False)]  # fmt: skip
    found: dict = {}
    for job, share in zip(jobs, shares, strict=True):
        for name, model in zip(["base", *share], job.result()["models"], strict=True):
            if measure == "attack":
                found[name] = {"attacks": {attack: about["asr"] for attack, about in model["attacks"].items()}}
            else:
                found[name] = {"relearned": {str(point["step"]): point["accuracy"] for point in model["curve"]}}
    return found, jobs[0].result()["protocol"]


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


def frontier(config: dict, chosen: dict, folder: Path, known: dict) -> list[dict]:
    """SalUn on objects outside the table, from the table's setting to the one tuned further: what limits it."""
    own, found = chosen["salun"], []
    changes = {name: change for name, change in config["frontier"]["changes"].items() if own | change != own}
    wanted = {name: ("salun", own | change) for name, change in ({"as in the table": {}} | changes).items()}
    wanted["salun_further"] = ("salun", config["further"]["object"])
    held = {entry["concept"]: entry for entry in known.get("frontier", [])}
    for concept in config["frontier"]["object"]:
        entry = held.get(concept, {})
        asked = {key: value for key, value in told(config, wanted, "object").items() if key != "hidden"}
        if entry.get("asked") != asked:
            erase_all(config, "object", wanted, concept, folder / "frontier" / concept)
            results = judge(config, wanted, concept, folder / "frontier" / concept, "table")
            models = [{key: model[key] for key in ("ua", "ira", "cra", "retained")} | {"method": model["name"]}
                      for model in results["models"]]  # fmt: skip
            entry = {"concept": concept, "asked": asked, "models": models}
        found.append(entry)
    return found


if __name__ == "__main__":
    run_command("python -m benchmarks.methods", __doc__, MethodsConfig, compare)

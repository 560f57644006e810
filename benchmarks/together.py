"""Several concepts forgotten at once, by each of a few methods, on the demo model: ``python -m benchmarks.together``.

The concepts are the first ones of a fixed list, 2, 5 and 10 of them, and each is to be drawn as another object that
none of them is. Trained methods have the demo model's own settings for one concept but for what ``settings`` gives them
more of; none was tuned for several. What ``--output_dir`` holds already is not made again.
``docs/results/together.json`` and the table of docs/methods.md are written after each count (``--write_only``: from the
committed JSON alone).
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.files import read_json, write_json
from salun_diffusion.options import option, run_command
from salun_diffusion.tables import markdown, put_into

from .erasing import base_digest, name_of, run
from .methods_page import DOCS, shown

RESULTS = DOCS / "results" / "together.json"
CONCEPTS = {  # the demo's objects, and what each is to be drawn as
    "airplane": "apple", "guitar": "house", "fish": "banana", "umbrella": "mushroom", "pizza": "strawberry",
    "camera": "bell", "owl": "penguin", "key": "crown", "sailboat": "snail", "cactus": "tree",
}  # fmt: skip
ROWS = {  # of the table → method and settings
    "SalUn": {"method": "salun"},
    "SalUn, no anchor pictures": {"method": "salun", "anchored": 0.0},
    "UCE": {"method": "uce"},
    "SPEED": {"method": "speed"},
    "FIA": {"method": "fia", "sensitive": 0.1, "first": 1.0},
}


@dataclass
class TogetherConfig:
    """The options of ``python -m benchmarks.together``."""

    counts: list[int] = option([2, 5, 10], f"how many of {', '.join(CONCEPTS)}", least=2, several=True)
    methods: list[str] = option(list(ROWS), "rows of the table", tuple(ROWS), several=True)
    num_forget_images: int = option(160, "pictures of the concepts that are measured, a model", least=1)
    num_retain_images: int = option(168, "pictures of all else", least=1)
    output_dir: str = option("runs/together", "erasures and their measurements")
    write_only: bool = option(False, "the table alone, from the committed results")


def measure(options: TogetherConfig) -> None:
    """Erase, measure and write, as the module's docstring says."""
    if not options.write_only:
        found = []
        for count in options.counts:
            found.append(results(options, count))
            write_json(RESULTS, found)
            put_into(DOCS / "methods.md", "together", table(found))
    put_into(DOCS / "methods.md", "together", table(read_json(RESULTS)))


def settings(name: str, count: int) -> dict:
    """A row's settings for ``count`` concepts: steps and pictures grow with them."""
    own = ROWS[name]
    trained = {"max_train_steps": 40 + 40 * count, "num_forget_images": 64 * count, "num_retain_images": 384}
    return own | trained if own["method"] == "salun" else own


def results(options: TogetherConfig, count: int) -> dict:
    """What docs/results/together.json holds of ``count`` concepts."""
    if count > len(CONCEPTS):
        raise SalunError(f"--counts has {count}: there are {len(CONCEPTS)} concepts to choose from.")
    base, chosen = base_digest("demo"), dict(list(CONCEPTS.items())[:count])
    folder = Path(options.output_dir) / base / str(count)
    named = [word for concept, anchor in chosen.items() for word in ("--concept", concept, "--anchor", anchor)]
    paths = {name: folder / name_of(name) for name in options.methods}
    for name, path in paths.items():
        if not (path / "config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            own = [word for key, value in settings(name, count).items() for word in (f"--{key}", value)]
            run(
                path.with_suffix(".log"), "erase_concept.py", "--pretrained_model_name_or_path", "demo", *named,
                "--output_dir", path, "--data_dir", folder / "data", *own,
            )  # fmt: skip
    counts = "--num_forget_images", options.num_forget_images, "--num_retain_images", options.num_retain_images
    run(
        folder / "eval.log", "-m", "eval", "accuracy", "--pretrained_model_name_or_path", "demo", *named,
        "--output_dir", folder, "--erasure", *paths.values(), *counts,
    )  # fmt: skip
    found, models = read_json(folder / "results.json"), []
    for name, model in zip(["Base model", *paths], found["models"], strict=True):
        row = {key: model[key] for key in ("ua", "ira", "cra", "instead")} | {"name": name}
        models.append(row | ({"bytes": model["erasure"]["bytes"]} if model["erasure"] else {}))
    return {"base": base, "concepts": chosen, "protocol": found["protocol"],
            "versions": found["versions"], "images": list(counts[1::2]),
            "settings": {name: settings(name, count) for name in paths}, "models": models}  # fmt: skip


def table(several: list[dict]) -> str:
    """The table of docs/methods.md, and under it how it was measured."""
    titles = ["", "UA ↑", "other objects ↑", "styles ↑", "drawn as an anchor ↑", "as nothing ↓", "file, MB"]
    rows = [["concepts", *titles]]
    for found in several:
        for model in found["models"]:
            shares = [model["ua"], model["ira"], model["cra"], model["instead"]["anchor"], model["instead"]["nothing"]]
            size = f"{model['bytes'] / 1e6:.2f}" if "bytes" in model else "–"
            rows.append([str(len(found["concepts"])), model["name"], *map(shown, shares), size])
    last = several[-1]
    (forget, retain), versions = last["images"], last["versions"]
    given = "; ".join(
        f"{name}: {', '.join(f'{key} {value}' for key, value in own.items() if key != 'method')}"
        for name, own in last["settings"].items()
        if len(own) > 1
    )
    count = len(last["concepts"])
    return (
        f"{markdown(rows)}\n\nThe first of {', '.join(last['concepts'])}; {forget} pictures of them and {retain} of "
        f"all else a model, Wilson 95% intervals, one seed. The demo model's settings, but for, with {count} "
        f"concepts, {given}. {last['protocol'].split(':')[0]}, base model {last['base']}, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}. Made by `python -m benchmarks.together`; every number is in "
        "`docs/results/together.json`."
    )


if __name__ == "__main__":
    run_command("python -m benchmarks.together", __doc__, TogetherConfig, measure)

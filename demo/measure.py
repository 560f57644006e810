"""Measure the demo: the judge on held-out scenes, then the shipped model by the judge; writes
demo/measured.json and the tables of demo/README.md.

    python -m demo.measure --work_dir runs/demo

The judge is tested on scenes rendered with layout seeds that no training saw (this needs the artwork in --work_dir, as
demo.train leaves it). The model is tested on every object × style × background: alone, several, and in pairs.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.options import option, run_command
from salun_diffusion.stats import proportion

from .scenes import BACKGROUNDS, NUMBERS, OBJECTS, STYLES, a

HERE = Path(__file__).parent


@dataclass
class MeasureConfig:
    """The options of ``python -m demo.measure``."""

    work_dir: str = option("runs/demo", "where demo.train left the artwork")
    model_dir: str | None = option(None, "the pipeline folder with its judge (default: demo/model)")
    limit: int | None = option(
        None, "only this many pictures, chosen at random: a quick look, nothing is recorded", least=1
    )


def prompts() -> list[tuple[str, dict[str, str]]]:
    """For every object × style × background: alone in two wordings, two or three of it, and beside another object."""
    rng = random.Random("measure")
    found = []
    for name, style, background in itertools.product(OBJECTS, STYLES, BACKGROUNDS):
        ground = f" on {a(background)} background"
        tail = f" in {style} style{ground}"
        looks = {"style": style, "background": background}
        one = {"left": name, "right": name, "count": "one"} | looks
        found.append((a(name) + tail, one))
        found.append((f"{a(style)} style picture of {a(name)}{ground}", one))
        count = rng.choice((2, 3))
        found.append((f"{NUMBERS[count]} {OBJECTS[name]}{tail}", one | {"count": NUMBERS[count]}))
        other = rng.choice([o for o in OBJECTS if o != name])
        words = rng.choice((f"{a(name)} to the left of {a(other)}", f"{a(other)} to the right of {a(name)}"))
        found.append((words + tail, {"left": name, "right": other, "count": "two"} | looks))
    return found


def things(answers: dict[str, str]) -> list[str]:
    """The two outermost objects, whichever side they are on."""
    return sorted((answers["left"], answers["right"]))


def tally(rows: list[tuple[dict, dict]]) -> dict:
    """Accuracy by question over (expected, found). The objects are right if both outermost ones are the ones asked
    for; left/right asks in addition that a pair's are on the right sides.
    """
    kinds = {
        "object": rows,
        "object, one": [(e, f) for e, f in rows if e["count"] == "one"],
        "object, two or three alike": [(e, f) for e, f in rows if e["count"] != "one" and e["left"] == e["right"]],
        "object, pair": [(e, f) for e, f in rows if e["left"] != e["right"]],
    }
    shares = {kind: proportion(things(e) == things(f) for e, f in part) for kind, part in kinds.items()}
    pairs = kinds["object, pair"]
    shares["left/right of a pair"] = proportion(e["left"] == f["left"] and e["right"] == f["right"] for e, f in pairs)
    for question in ("style", "background", "count"):
        shares[question] = proportion(e[question] == f[question] for e, f in rows)
    return {question: share for question, share in shares.items() if share}  # a quick look may hold no pair


def measure(config: MeasureConfig) -> None:
    """Print what was measured and, unless ``limit`` is set, record it.

    Raises:
        SalunError: the model cannot be loaded.
    """
    work, folder = Path(config.work_dir), Path(config.model_dir or HERE / "model")

    import diffusers
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from salun_diffusion.concepts.concept import Row
    from salun_diffusion.files import write_json
    from salun_diffusion.models import load as models
    from salun_diffusion.models.sampling import sample

    from . import judge as instrument
    from .scenes import Scene
    from .training import HELD_OUT_SEEDS
    from .vocabulary import DATA

    judge = AutoModelForImageClassification.from_pretrained(folder / "judge", use_safetensors=True).float().eval()
    processor = AutoImageProcessor.from_pretrained(folder / "judge")

    @torch.no_grad()
    def look(images: list) -> list[dict[str, str]]:
        """What the judge says of each picture (PIL, or uint8 CHW tensors)."""
        found = []
        for start in range(0, len(images), 64):
            inputs = processor(images=list(images[start : start + 64]), return_tensors="pt")
            groups = instrument.split(judge(**inputs).logits)
            best = {group: logits.argmax(1).tolist() for group, logits in groups.items()}
            count = len(inputs["pixel_values"])
            found += [{g: instrument.GROUPS[g][best[g][i]] for g in best} for i in range(count)]
        return found

    scenes = [Scene.sample(seed) for seed in HELD_OUT_SEEDS]
    held_out = load_file(work / "held-out.safetensors")["pictures"]
    seen = look(held_out)
    judged = tally([(scene.labels(), found) for scene, found in zip(scenes, seen, strict=True)])
    # scenes beyond the range that the judge's own smears were made of
    empty = look(instrument.smears(held_out, 1024, first=10**6))
    judged["nothing recognisable"] = proportion(
        found["left"] == "nothing" and found["right"] == "nothing" for found in empty
    )
    mistakes: dict[str, int] = {}
    for scene, found in zip(scenes, seen, strict=True):
        for side in ("left", "right"):
            if found[side] != scene.labels()[side]:
                pair = f"{scene.labels()[side]} → {found[side]}"
                mistakes[pair] = mistakes.get(pair, 0) + 1

    asked = prompts()
    if config.limit:
        asked = random.Random(0).sample(asked, config.limit)
    rows = [Row(prompt, None, expect, 2_000_000 + i) for i, (prompt, expect) in enumerate(asked)]
    pipe = models.load_pipeline(str(folder))
    options = {"num_inference_steps": DATA["num_inference_steps"], "guidance_scale": DATA["guidance_scale"]}
    drawn = look(sample(pipe, rows, batch_size=DATA["sample_batch_size"], progress="drawing", **options))
    model = tally([(row.expect, found) for row, found in zip(rows, drawn, strict=True)])
    by_object = {}
    for name in OBJECTS:
        asked_for = [found for row, found in zip(rows, drawn, strict=True) if name in things(row.expect)]
        if share := proportion(name in things(found) for found in asked_for):
            by_object[name] = share
    result = {
        "protocol": "every object × style × background alone in two wordings, two or three, a pair; seed 2000000 + row",
        "sampling": options | {"scheduler": type(pipe.scheduler).__name__},
        "model": models.digest(pipe),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        "judge on held-out scenes": judged,
        "judge's mistakes on held-out scenes": dict(sorted(mistakes.items(), key=lambda kv: -kv[1])[:10]),
        "model by the judge": model,
        "model by object": by_object,
        "model drew nothing recognisable": proportion(f["left"] == "nothing" or f["right"] == "nothing" for f in drawn),
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if not config.limit:
        write_json(HERE / "measured.json", result)
        write_readme(result)


def write_readme(result: dict) -> None:
    """Put the tables of ``result`` between the two markers of demo/README.md."""
    from salun_diffusion.tables import markdown, put_into

    judged, model = result["judge on held-out scenes"], result["model by the judge"]
    rows = [["question", "judge on held-out scenes", "shipped model, by the judge"]]
    for question in judged:
        cells = (
            f"{cell['percent']:.1f}% ({cell['low']:.1f}–{cell['high']:.1f}, n = {cell['n']})" if cell else "–"
            for cell in (judged[question], model.get(question))
        )
        rows.append([question, *cells])
    lines = [markdown(rows)]
    weakest = sorted(result["model by object"].items(), key=lambda kv: kv[1]["percent"])[:5]
    lines += ["", "Weakest objects: " + ", ".join(f"{name} {cell['percent']:.0f}%" for name, cell in weakest) + "."]
    nothing = result["model drew nothing recognisable"]
    lines += [f"The judge saw nothing recognisable in {nothing['percent']:.1f}% of {nothing['n']} drawn pictures."]
    mistakes = ", ".join(f"{pair} ({n})" for pair, n in result["judge's mistakes on held-out scenes"].items()) or "none"
    lines += [f"The judge's mistakes on {judged['object']['n']} held-out scenes (two answers each): {mistakes}."]
    put_into(HERE / "README.md", "measured by python -m demo.measure", "\n".join(lines))


if __name__ == "__main__":
    run_command("python -m demo.measure", __doc__, MeasureConfig, measure)

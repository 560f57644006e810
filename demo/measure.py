"""Measure the demo: the judge on held-out scenes, then the shipped model by the judge; writes
demo/measured.json and the tables of demo/README.md.

    python -m demo.measure --work_dir runs/demo

The judge is tested on scenes rendered with layout seeds that no training saw (this needs the artwork in --work_dir, as
demo.train leaves it). The model is tested on every object × style × background, and on counts and pairs.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from .scenes import BACKGROUNDS, NUMBERS, OBJECTS, STYLES, a

HERE = Path(__file__).parent
START, END = "<!-- measured by python -m demo.measure -->", "<!-- end -->"


def prompts() -> list[tuple[str, dict[str, str]]]:
    """Every object × style × background once, and as many again of two, three and pairs: (prompt, expectation)."""
    rng = random.Random("measure")
    found = []
    for name, style, background in itertools.product(OBJECTS, STYLES, BACKGROUNDS):
        tail = f" in {style} style on {a(background)} background"
        looks = {"style": style, "background": background}
        found.append((a(name) + tail, {"left": name, "right": name, "count": "one"} | looks))
        kind = rng.choice(("several", "pair"))
        if kind == "several":
            count = rng.choice((2, 3))
            expect = {"left": name, "right": name, "count": NUMBERS[count]}
            found.append((f"{NUMBERS[count]} {OBJECTS[name]}{tail}", expect | looks))
        else:
            other = rng.choice([o for o in OBJECTS if o != name])
            expect = {"left": name, "right": other, "count": "two"}
            words = rng.choice((f"{a(name)} to the left of {a(other)}", f"{a(other)} to the right of {a(name)}"))
            found.append((words + tail, expect | looks))
    return found


def wilson(right: int, total: int) -> dict:
    """Share in % with its 95% Wilson score interval."""
    from scipy.stats import binomtest

    low, high = binomtest(right, total).proportion_ci(0.95, method="wilson")
    share = {"percent": right / total, "low": low, "high": high}
    return {key: round(100 * value, 2) for key, value in share.items()} | {"n": total}


def tally(rows: list[tuple[dict, dict]]) -> dict:
    """Accuracy by question over (expected, found); an object is right if both outermost ones are."""
    kinds = {
        "object": [(e, f) for e, f in rows],
        "object, one": [(e, f) for e, f in rows if e["count"] == "one"],
        "object, two or three alike": [(e, f) for e, f in rows if e["count"] != "one" and e["left"] == e["right"]],
        "left/right pair": [(e, f) for e, f in rows if e["left"] != e["right"]],
    }
    table = {
        k: wilson(sum(e["left"] == f["left"] and e["right"] == f["right"] for e, f in v), len(v))
        for k, v in kinds.items()
    }
    for question in ("style", "background", "count"):
        table[question] = wilson(sum(e[question] == f[question] for e, f in rows), len(rows))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("runs/demo"),
        help="where demo.train left the artwork (default: %(default)s)",
    )
    parser.add_argument(
        "--model_dir",
        type=Path,
        default=HERE / "model",
        help="the pipeline folder with its judge (default: demo/model)",
    )
    parser.add_argument(
        "--limit", type=int, help="only this many pictures, evenly spread: a quick look, nothing is recorded"
    )
    args = parser.parse_args()

    import diffusers
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from salun_diffusion import models
    from salun_diffusion.concepts import Row
    from salun_diffusion.files import write_json
    from salun_diffusion.sampling import sample

    from . import judge as instrument
    from .scenes import Scene
    from .training import HELD_OUT_SEEDS
    from .vocabulary import SAMPLING

    judge = (
        AutoModelForImageClassification.from_pretrained(args.model_dir / "judge", use_safetensors=True).float().eval()
    )
    processor = AutoImageProcessor.from_pretrained(args.model_dir / "judge")

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
    held_out = load_file(args.work_dir / "held-out.safetensors")["pictures"]
    seen = look(held_out)
    judged = tally([(scene.labels(), found) for scene, found in zip(scenes, seen, strict=True)])
    # scenes beyond the range that the judge's own smears were made of
    empty = look(instrument.smears(held_out, 1024, first=10**6))
    judged["nothing recognisable"] = wilson(
        sum(found["left"] == "nothing" and found["right"] == "nothing" for found in empty), 1024
    )
    mistakes: dict[str, int] = {}
    for scene, found in zip(scenes, seen, strict=True):
        for side in ("left", "right"):
            if found[side] != scene.labels()[side]:
                pair = f"{scene.labels()[side]} → {found[side]}"
                mistakes[pair] = mistakes.get(pair, 0) + 1

    asked = prompts()
    if args.limit:
        asked = asked[:: max(1, len(asked) // args.limit)]
    rows = [Row(prompt, None, expect, 2_000_000 + i) for i, (prompt, expect) in enumerate(asked)]
    pipe = models.load_pipeline(str(args.model_dir))
    options = {"num_inference_steps": SAMPLING["num_inference_steps"], "guidance_scale": SAMPLING["guidance_scale"]}
    drawn = look(sample(pipe, rows, batch_size=32, progress="drawing", **options))
    model = tally([(row.expect, found) for row, found in zip(rows, drawn, strict=True)])
    by_object = {n: wilson(*_hits(rows, drawn, "left", n)) for n in OBJECTS}
    result = {
        "protocol": "every object × style × background alone, and as often two, three or a pair; seed 2000000 + row",
        "sampling": options | {"scheduler": type(pipe.scheduler).__name__},
        "model": models.digest(pipe),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        "judge on held-out scenes": judged,
        "judge's mistakes on held-out scenes": dict(sorted(mistakes.items(), key=lambda kv: -kv[1])[:10]),
        "model by the judge": model,
        "model by object (left)": by_object,
        "model drew nothing recognisable": wilson(
            sum(f["left"] == "nothing" or f["right"] == "nothing" for f in drawn), len(drawn)
        ),
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if not args.limit:
        write_json(HERE / "measured.json", result)
        write_readme(result)


def _hits(rows, drawn, question: str, name: str) -> tuple[int, int]:
    asked = [(row, found) for row, found in zip(rows, drawn, strict=True) if row.expect[question] == name]
    return sum(found[question] == name for _, found in asked), len(asked)


def write_readme(result: dict) -> None:
    """Put the tables of ``result`` between the two markers of demo/README.md."""
    judged, model = result["judge on held-out scenes"], result["model by the judge"]
    lines = ["| question | judge on held-out scenes | shipped model, by the judge |", "| --- | --- | --- |"]
    for question in judged:
        cells = (
            f"{cell['percent']:.1f}% ({cell['low']:.1f}–{cell['high']:.1f}, n = {cell['n']})" if cell else "–"
            for cell in (judged[question], model.get(question))
        )
        lines.append(f"| {question} | {' | '.join(cells)} |")
    weakest = sorted(result["model by object (left)"].items(), key=lambda kv: kv[1]["percent"])[:5]
    lines += ["", "Weakest objects: " + ", ".join(f"{name} {cell['percent']:.0f}%" for name, cell in weakest) + "."]
    nothing = result["model drew nothing recognisable"]
    lines += [f"The judge saw nothing recognisable in {nothing['percent']:.1f}% of {nothing['n']} drawn pictures."]
    mistakes = ", ".join(f"{pair} ({n})" for pair, n in result["judge's mistakes on held-out scenes"].items()) or "none"
    lines += [f"The judge's mistakes on {judged['object']['n']} held-out scenes (two answers each): {mistakes}."]
    path = HERE / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(START)
    path.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()

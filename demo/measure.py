"""Measure the demo: the judge on held-out scenes, then the shipped model by the judge; writes
demo/measured.json and the tables of demo/README.md.

    python -m demo.measure --work_dir runs/demo

The judge is tested on scenes rendered with layout seeds that no training saw (this needs the artwork in --work_dir, as
demo.train leaves it). The model is tested on every object × style × background: alone, several, in pairs beside and
above each other. How sharp it draws is said by the autoencoder's PSNR, and by the Fréchet distance, in the judge's
features, of its pictures for the captions of one half of the held-out scenes to the other half.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.options import option, run_command
from salun_diffusion.stats import proportion

from .scenes import BACKGROUNDS, NUMBERS, OBJECTS, STYLES, Scene, a, caption

HERE = Path(__file__).parent
SIDES = ("left", "right", "top", "bottom")


@dataclass
class MeasureConfig:
    """The options of ``python -m demo.measure``."""

    work_dir: str = option("runs/demo", "where demo.train left the artwork")
    model_dir: str | None = option(None, "the pipeline folder with its judge (default: demo/model)")
    limit: int | None = option(
        None, "only this many pictures, chosen at random: a quick look, nothing is recorded", least=1
    )


def prompts() -> list[tuple[str, dict[str, str]]]:
    """For every object × style × background: alone in two wordings, two or three of it, beside another object, and one
    above another.
    """
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
        for first, second, words in (
            ("left", "right", ("{} to the left of {}", "{1} to the right of {0}")),
            ("top", "bottom", ("{} above {}", "{1} below {0}")),
        ):
            pair = [name, rng.choice([o for o in OBJECTS if o != name])]
            rng.shuffle(pair)
            words = rng.choice(words).format(*map(a, pair))
            found.append((words + tail, {first: pair[0], second: pair[1], "count": "two"} | looks))
    return found


def things(expect: dict[str, str], answers: dict[str, str]) -> list[str]:
    """The outermost objects of ``answers`` in the places that ``expect`` names, whichever is where."""
    return sorted(answers[side] for side in SIDES if side in expect)


def tally(rows: list[tuple[dict, dict]]) -> dict:
    """Accuracy by question over (expected, found). The objects are right if the outermost ones are those asked for;
    left/right and above/below ask in addition that a pair's are where they belong.
    """
    pairs = [(e, f) for e, f in rows if len(set(things(e, e))) == 2]
    kinds = {
        "object": rows,
        "object, one": [(e, f) for e, f in rows if e["count"] == "one"],
        "object, two or three alike": [(e, f) for e, f in rows if e["count"] != "one" and len(set(things(e, e))) == 1],
        "object, pair": pairs,
    }
    shares = {kind: proportion(things(e, e) == things(e, f) for e, f in part) for kind, part in kinds.items()}
    for relation, side in (("left/right of a pair", "left"), ("above/below of a pair", "top")):
        shares[relation] = proportion(all(e[s] == f[s] for s in SIDES if s in e) for e, f in pairs if side in e)
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

    from . import autoencoder
    from . import judge as instrument
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
    judged["nothing recognisable"] = proportion(all(found[side] == "nothing" for side in SIDES) for found in empty)
    mistakes: dict[str, int] = {}
    for scene, found in zip(scenes, seen, strict=True):
        for side, answer in scene.labels().items():
            if found[side] != answer:
                told = f"{side}: {answer} → {found[side]}"
                mistakes[told] = mistakes.get(told, 0) + 1

    pipe = models.load_pipeline(str(folder))
    options = {"num_inference_steps": DATA["num_inference_steps"], "guidance_scale": DATA["guidance_scale"]}

    def draw(asked: list[tuple[str, dict]], seed: int, title: str) -> list:
        rows = [Row(prompt, None, expect, seed + i) for i, (prompt, expect) in enumerate(asked)]
        return sample(pipe, rows, batch_size=DATA["sample_batch_size"], progress=title, **options)

    asked = prompts()
    if config.limit:
        asked = random.Random(0).sample(asked, config.limit)
    drawn = look(draw(asked, 2_000_000, "drawing"))
    answers = [(expect, found) for (_, expect), found in zip(asked, drawn, strict=True)]
    model = tally(answers)
    by_object = {}
    for name in OBJECTS:
        asked_for = [(expect, found) for expect, found in answers if name in things(expect, expect)]
        if share := proportion(name in things(expect, found) for expect, found in asked_for):
            by_object[name] = share

    half = min(len(scenes) // 2, config.limit or len(scenes))
    captions = [(caption(scene, random.Random(scene.seed)), {}) for scene in scenes[:half]]
    copies = draw(captions, 3_000_000, "drawing what held-out scenes show")
    sharpness = {
        "autoencoder, dB": round(autoencoder.psnr(pipe.vae, held_out), 2),
        "Fréchet distance": distance(judge, processor, copies, held_out[half:]),
        "Fréchet distance of the two halves": distance(judge, processor, held_out[:half], held_out[half:]),
        "n": [half, len(held_out) - half],
    }
    result = {
        "protocol": "every object × style × background alone in two wordings, two or three, a pair beside each other "
        "and a pair one above the other: seed 2000000 + row; sharpness: captions of the first held-out scenes, seed "
        "3000000 + row, against the pictures of the others",
        "sampling": options | {"scheduler": type(pipe.scheduler).__name__},
        "model": models.digest(pipe),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        "judge on held-out scenes": judged,
        "judge's mistakes on held-out scenes": dict(sorted(mistakes.items(), key=lambda kv: -kv[1])[:10]),
        "model by the judge": model,
        "model by object": by_object,
        "model drew nothing recognisable": proportion("nothing" in things(expect, found) for expect, found in answers),
        "sharpness": sharpness,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if not config.limit:
        write_json(HERE / "measured.json", result)
        write_readme(result)


def distance(judge, processor, drawn: list, real: list) -> float:
    """The Fréchet distance between pictures (PIL, or uint8 CHW tensors) in the judge's last features, 256 numbers."""
    import torch
    from PIL import Image
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchvision.transforms.functional import pil_to_tensor

    class Features(torch.nn.Module):
        num_features = judge.config.hidden_sizes[-1]

        @torch.no_grad()
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
            return judge.resnet(pixels).pooler_output.flatten(1)

    metric = FrechetInceptionDistance(Features())
    for images, is_real in ((drawn, False), (real, True)):
        for start in range(0, len(images), 64):
            part = [pil_to_tensor(i) if isinstance(i, Image.Image) else i for i in images[start : start + 64]]
            metric.update(torch.stack(part), real=is_real)
    return round(metric.compute().item(), 2)


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
    sharp = result["sharpness"]
    lines += [
        f"Sharpness: the autoencoder brings held-out scenes back at {sharp['autoencoder, dB']:.1f} dB; drawn from the "
        f"captions of {sharp['n'][0]} of them, pictures are {sharp['Fréchet distance']:.1f} from the other "
        f"{sharp['n'][1]} in Fréchet distance (the judge's features), those scenes themselves "
        f"{sharp['Fréchet distance of the two halves']:.1f}."
    ]
    lines += [f"The judge's mistakes on {judged['object']['n']} held-out scenes (two answers each): {mistakes}."]
    put_into(HERE / "README.md", "measured by python -m demo.measure", "\n".join(lines))


if __name__ == "__main__":
    run_command("python -m demo.measure", __doc__, MeasureConfig, measure)

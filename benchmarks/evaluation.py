"""`python -m eval i2p` against what people write: a loop over one prompt at a time, one picture at a time."""

import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage
import torch
from diffusers import StableDiffusionPipeline
from nudenet import NudeDetector
from PIL import Image

from .config import BenchmarkConfig

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, STEPS, BATCH, PHOTOS = 240, 20, 8, 256
GUIDANCE = {7: 3729, 10: 210, 12: 114, 20: 99, 15: 97, 13: 78, 8: 65, 9: 59}  # I2P's most frequent, rows each


def i2p(config: BenchmarkConfig) -> dict:
    """Seconds of both for the same prompts on the demo model, loading left out on either side, and for photographs.

    Raises:
        AssertionError: pictures differ by more than rounding, or the boxes found in one picture differ at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = _prompts(work / "prompts.csv")
        counted_as = ("--protocol", "exposed-package")  # what the package's own detector sees
        _ours("i2p", "--pretrained_model_name_or_path", "demo", "--prompts", work / "prompts.csv", "--output_dir",
              work / "out", *counted_as, "--num_inference_steps", STEPS,
              "--batch_size", BATCH)  # fmt: skip
        model = json.loads((work / "out" / "results.json").read_text())["models"][0]
        lines = [json.loads(line) for line in (work / "out" / "samples.jsonl").read_text().splitlines()]
        ours = {"draw": model["generation"]["seconds"], "detect": model["detection"]["seconds"]}
        plain, alike = _plain(rows, lines, work, config.device)
        photos, photo_seconds = _photographs(work / "photos")
        _ours("nudity", work / "photos", "--output_dir", work / "counted")
        counted = json.loads((work / "counted" / "results.json").read_text())["models"][0]
    return {
        "prompts": PROMPTS, "how": f"64 px, {STEPS} steps, batch {BATCH}; {alike}; same boxes",
        "plain": plain, "ours": ours, "photos": photos, "photos_plain": photo_seconds,
        "photos_ours": counted["detection"]["seconds"],
    }  # fmt: skip


def _prompts(path: Path) -> list[dict]:
    """Prompts of the demo model's words, with guidance values as frequent as in I2P, written as a CSV file."""
    rng = random.Random(0)
    objects = json.loads((ROOT / "demo" / "model" / "concepts.json").read_text())["slots"]["object"]
    guidance = rng.choices(list(GUIDANCE), list(GUIDANCE.values()), k=PROMPTS)
    rows = [
        {"prompt": f"a picture of {name}", "evaluation_seed": seed, "evaluation_guidance": scale, "case_number": seed}
        for seed, (name, scale) in enumerate(zip(rng.choices(objects, k=PROMPTS), guidance, strict=True))
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _ours(*words) -> None:
    subprocess.run([sys.executable, "-m", "eval", *map(str, words)], check=True, cwd=ROOT, stdout=sys.stderr)


def _plain(rows: list[dict], lines: list[dict], work: Path, device: str) -> tuple[dict, str]:
    """Seconds of the loop, and how far its pictures are from ours, in words."""
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "demo" / "model", safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    (work / "plain").mkdir()
    begun = time.perf_counter()
    for row in rows:
        noise = torch.Generator("cpu").manual_seed(row["evaluation_seed"])
        picture = pipe(row["prompt"], num_inference_steps=STEPS, guidance_scale=row["evaluation_guidance"],
                       generator=noise).images[0]  # fmt: skip
        picture.save(work / "plain" / f"{row['case_number']}.png")
    drawn = time.perf_counter()
    detector = NudeDetector()
    for row in rows:
        detector.detect(str(work / "plain" / f"{row['case_number']}.png"))
    seconds = {"draw": round(drawn - begun, 2), "detect": round(time.perf_counter() - drawn, 2)}
    levels = []
    for row, line in zip(rows, lines, strict=True):
        theirs = np.asarray(Image.open(work / "plain" / f"{row['case_number']}.png")).astype(int)
        mine = work / "out" / line["picture"]
        levels.append(int(np.abs(np.asarray(Image.open(mine)).astype(int) - theirs).max()))
        found = detector.detect(str(mine))
        assert [box["box"] for box in found] == [box["box"] for box in line["detections"]], mine
    close = sum(level <= 2 for level in levels)
    assert close >= 0.99 * len(levels) and max(levels) <= 8, f"pictures differ by up to {max(levels)} of 255"
    return seconds, f"{close} pictures within 2 of 255, the largest difference {max(levels)}"


def _photographs(folder: Path) -> tuple[int, float]:
    """Fill ``folder`` with scikit-image's photographs, over and over; how many, and the seconds of the package's own
    detector on them, one at a time.
    """
    folder.mkdir()
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png")
    for number in range(PHOTOS):
        source = Path(skimage.__file__).parent / "data" / names[number % len(names)]
        (folder / f"{number:03d}{source.suffix}").write_bytes(source.read_bytes())
    detector = NudeDetector()
    paths = sorted(folder.iterdir())
    begun = time.perf_counter()
    for path in paths:
        detector.detect(str(path))
    return len(paths), round(time.perf_counter() - begun, 2)

"""`python -m eval accuracy` against a loop that draws one prompt at a time, at Stable Diffusion v1.4's shape."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from salun_diffusion import load_erasure

from .attack import ROOT, nudge
from .attack_memory import DEMO, random_pipeline
from .config import BenchmarkConfig

PICTURES = 2  # of the concept, and as many of others: one full batch, since what lacks to one is filled up
STEPS = 2  # of each picture: a tenth of what is usual, and what a step costs counts
GUIDANCE = 7.5


def accuracy(config: BenchmarkConfig) -> dict:
    """Pictures a second of both, base model and one erasure, loading left out on either side.

    Raises:
        AssertionError: a picture differs by more than rounding.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        random_pipeline(config, work / "model")
        nudge(work / "model", work / "nudged.safetensors")
        words = ["accuracy", "--pretrained_model_name_or_path", work / "model", "--concept", "airplane"]
        words += ["--erasure", work / "nudged.safetensors", "--classifier", DEMO / "judge"]
        words += ["--num_forget_images", PICTURES, "--num_retain_images", PICTURES, "--batch_size", 2 * PICTURES]
        words += ["--num_inference_steps", STEPS, "--guidance_scale", GUIDANCE, "--output_dir", work / "out"]
        subprocess.run([sys.executable, "-m", "eval", *map(str, words)], check=True, cwd=ROOT, stdout=sys.stderr)
        models = json.loads((work / "out" / "results.json").read_text())["models"]
        lines = [json.loads(line) for line in (work / "out" / "samples.jsonl").read_text().splitlines()]
        plain, levels = _plain(work, lines)
    made = sum(model["generation"]["images"] for model in models)
    assert made == len(lines) and max(levels) <= 8, f"{made} of {len(lines)}; they differ by up to {max(levels)} of 255"
    return {
        "how": f"{config.resolution} px, fp32, {STEPS} steps, batch {2 * PICTURES}, threads: "
        f"{torch.get_num_threads()}; pictures differ by at most {max(levels)} of 255",
        "plain": round(len(lines) / plain, 4),
        "ours": round(made / sum(model["generation"]["seconds"] for model in models), 4),
    }


def _plain(work: Path, lines: list[dict]) -> tuple[float, list[int]]:
    """Seconds of the loop over the same prompts, and how far each picture is from ours, of 255."""
    pipe = StableDiffusionPipeline.from_pretrained(work / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    seconds, levels = 0.0, []
    for name in dict.fromkeys(line["model"] for line in lines):
        if name != "base":
            load_erasure(pipe, work / "nudged.safetensors")
        for line in (line for line in lines if line["model"] == name):
            noise, begun = torch.Generator("cpu").manual_seed(line["seed"]), time.perf_counter()
            picture = pipe(line["prompt"], generator=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE).images[
                0
            ]
            seconds += time.perf_counter() - begun
            mine = np.asarray(Image.open(work / "out" / line["picture"])).astype(int)
            levels.append(int(np.abs(mine - np.asarray(picture).astype(int)).max()))
    return seconds, levels

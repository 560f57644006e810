"""An attack's steps, batched over prompts, against the same attack on one prompt at a time, as published code loops."""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.fingerprint import fingerprint
from salun_diffusion.models import load_model

from .config import BenchmarkConfig

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, STEPS = 8, 8


def attack(config: BenchmarkConfig) -> dict:
    """Seconds of one step of UnlearnDiffAtk on all prompts, which do not name the concept, with the demo model.

    Raises:
        AssertionError: the two find different texts for a prompt.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with (work / "prompts.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["prompt", "seed"], *(["a picture of", seed] for seed in range(PROMPTS))])
        nudge("demo", work / "erasure.safetensors")
        found = {at_once: _seconds(work, at_once) for at_once in (PROMPTS, 1)}
    (ours, texts), (plain, others) = found[PROMPTS], found[1]
    assert texts == others, f"{texts} {others}"
    return {
        "how": f"UnlearnDiffAtk, demo model, {PROMPTS} prompts together against one after the other, {STEPS} steps and "
        f"a picture, threads: {torch.get_num_threads()}; same texts found",
        "plain": round(plain / STEPS, 4), "ours": round(ours / STEPS, 4),
    }  # fmt: skip


def nudge(base: str | Path, path: Path) -> None:
    """An erasure of hardly anything: the command attacks the base model beside one."""
    named = list(load_model(str(base)).network.named_parameters())
    name, weight = next((name, weight) for name, weight in named if "attn2.to_k" in name)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    values = torch.full((weight.numel(),), 1e-3)
    Delta({name: mask}, {name: values}, fingerprint(named), {"concept": "airplane"}).save(path)


def _seconds(work: Path, at_once: int) -> tuple[float, list[str]]:
    """Seconds of all prompts, the faster of the two models, which cost the same, and the base's texts."""
    out, own = work / f"out-{at_once}", ["timesteps=1", f"iterations={STEPS}"]
    words = ["attack", "--attack", "unlearndiffatk", "--attack_option", *(f"unlearndiffatk.{text}" for text in own)]
    words += ["--pretrained_model_name_or_path", "demo", "--concept", "airplane", "--prompts", work / "prompts.csv"]
    words += ["--erasure", work / "erasure.safetensors", "--output_dir", out, "--prompts_at_once", at_once]
    subprocess.run([sys.executable, "-m", "eval", *map(str, words)], check=True, cwd=ROOT, stdout=sys.stderr)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["set"] == "unlearndiffatk"]
    models = [[line for line in lines if (line["model"] == "base") == base] for base in (True, False)]
    seconds = min(sum(line["seconds"] for line in model) for model in models)
    return seconds, [line["attack_prompt"] for line in models[0]]

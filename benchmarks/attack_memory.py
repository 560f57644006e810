"""UnlearnDiffAtk and TINA on a pipeline of Stable Diffusion v1.4's shape: they run and go on, and in what memory."""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .attack import ROOT, nudge
from .config import BenchmarkConfig
from .measurements import SCHEDULE, autoencoder, unet
from .memory import giga, replayed

DEMO = ROOT / "demo" / "model"
NAMES = ("unlearndiffatk", "tina")
STEPS = ["unlearndiffatk.timesteps=1", "unlearndiffatk.iterations=2", "tina.steps=2", "tina.iterations=1"]


def attack_memory(config: BenchmarkConfig) -> dict:
    """The peak memory of ``python -m eval attack`` with a few steps of both on one prompt, in fp32 with random weights,
    which is then asked to go on where one attack is missing; and by accounting what a prompt takes at 512 pixels.

    Raises:
        AssertionError: what was there is not kept, or what was missing comes out otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = random_pipeline(config, work / "model")
        nudge(work / "model", work / "nudged.safetensors")
        first = _attacked(work)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        shutil.rmtree(work / "out" / "pictures" / "nudged" / "tina")
        again = _attacked(work)
        kept = [line["set"] != "tina" or line["model"] == "base" for line in first]
        # what was kept, with the seconds that it took then
        assert [line for line, old in zip(first, kept, strict=True) if old] == [
            line for line, old in zip(again, kept, strict=True) if old
        ]
        assert [line | {"seconds": 0} for line in first] == [line | {"seconds": 0} for line in again]
    # the network's and the others' weights; rows over the vocabulary, their gradient and Adam's two moments
    parts = {"weights": 4 * sum(sizes.values()), "optimizer": 16 * 3 * 49408}
    parts["passes"] = 0 if config.tiny else replayed(torch.float32, 1, recompute=False)[1]
    return {
        "how": f"UnlearnDiffAtk and TINA, a few steps of one prompt at {config.resolution} px, fp32, weights and "
        "libraries included; then gone on with, TINA missing",
        "peak_gib": round(peak, 2),
        "accounting": {"an attack, one prompt at a time, fp32": giga(parts)},
    }  # fmt: skip


def random_pipeline(config: BenchmarkConfig, path: Path) -> dict[str, int]:
    """Write a pipeline of random weights to ``path``, with the demo's words and concepts; the weights of each part."""
    words = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=49408, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        hidden_size=768, intermediate_size=3072, num_hidden_layers=1 if config.tiny else 12, num_attention_heads=12,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=autoencoder(config), text_encoder=CLIPTextModel(text), tokenizer=words, unet=unet(config),
        scheduler=DDIMScheduler.from_config(SCHEDULE.config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(path)
    shutil.copy(DEMO / "concepts.json", path)
    return {
        name: sum(weight.numel() for weight in part.parameters())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }


def _attacked(work: Path) -> list[dict]:
    """The lines of both attacks, whatever of them is there already."""
    words = ["attack", "--attack", *NAMES, "--attack_option", *STEPS, "--num_prompts", "1"]
    words += ["--pretrained_model_name_or_path", work / "model", "--classifier", DEMO / "judge"]
    words += ["--concept", "airplane", "--erasure", work / "nudged.safetensors", "--output_dir", work / "out"]
    words += ["--num_inference_steps", "2"]
    subprocess.run([sys.executable, "-m", "eval", *map(str, words)], check=True, cwd=ROOT, stdout=sys.stderr)
    return [json.loads(line) for line in (work / "out" / "samples.jsonl").read_text().splitlines()]

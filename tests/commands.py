"""Run the repository's commands as a user would: in a subprocess, from the clone's root."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = "--max_train_steps 3 --num_forget_images 8 --num_retain_images 8 --num_inference_steps 4".split()
QUICK += ["--train_batch_size", "4"]


def run(*words, check=True, cwd=ROOT, **environment):
    """The finished process of ``words``; ``python`` and ``accelerate`` are this environment's own."""
    words = [str(word) for word in words]
    if words[0] == "python":
        words[0] = sys.executable
    if words[0] == "accelerate":
        words[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def erase(output, *more, concept="airplane", **options):
    """A short erasure of the demo model into ``output``; returns the process."""
    return run(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", concept,
        "--output_dir", output, "--data_dir", Path(output).parent / "data", *QUICK, *more, **options,
    )  # fmt: skip

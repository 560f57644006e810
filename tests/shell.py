"""Run the repository's commands as a user would: in a subprocess, from the clone's root."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "model"
QUICK = "--max_train_steps 3 --num_forget_images 8 --num_retain_images 8 --num_inference_steps 4".split()
QUICK += ["--train_batch_size", "4"]


def start(*words, cwd=ROOT, **environment):
    """The running process of ``words``; ``python``, ``accelerate`` and ``torchrun`` are this environment's own."""
    modules = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}
    words = [str(word) for word in words]
    if words[0] in modules:
        words[:1] = ["python", "-m", modules[words[0]]]
    if words[0] == "python":
        words[0] = sys.executable
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=cwd, env=os.environ | environment, **pipes)


def run(*words, check=True, cwd=ROOT, **environment):
    """The finished process of ``words``, as of ``subprocess.run``."""
    process = start(*words, cwd=cwd, **environment)
    out, err = process.communicate()
    if check and process.returncode:
        raise AssertionError(f"{' '.join(map(str, words))} failed with {process.returncode}:\n{out}\n{err}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def erase(output, *more, concept="airplane", **options):
    """A short erasure of the demo model into ``output``; returns the process."""
    return run(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", concept,
        "--output_dir", output, "--data_dir", Path(output).parent / "data", *QUICK, *more, **options,
    )  # fmt: skip

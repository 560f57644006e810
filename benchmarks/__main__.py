"""Speed and memory as ratios against the published recipe, measured in one run.

    python -m benchmarks                 # everything, on this machine
    python -m benchmarks --only mask delta
    python -m benchmarks --resolution 512 --batch_size 8 --dtype bf16 --device cuda

The networks have Stable Diffusion v1.4's own configuration and random weights, so that nothing is downloaded. Each
measurement runs in a process of its own, whose peak memory is the operating system's figure (or CUDA's). The results go
to benchmarks/results-DEVICE.json, and benchmarks/README.md is written anew from all such files.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MEASUREMENTS = ("reference_step", "our_step", "mask", "delta", "memory", "i2p")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=raw)
    add = found.add_argument
    add("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS, help="measure only these")
    add("--resolution", type=int, default=128, help="pixels a side of the training pictures (default: %(default)s)")
    add("--batch_size", type=int, default=2, help="pictures of each set a step (default: %(default)s)")
    add("--steps", type=int, default=4, help="steps; the median of all but the first counts (default: %(default)s)")
    add("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the U-Net (default: %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    add("--gradient_checkpointing", action="store_true", help="recompute activations, in both recipes")
    add("--scores", type=int, default=860_000_000, help="scores to select a mask from (default: %(default)s)")
    add("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)  # the child process's one task
    return found


def main() -> None:
    args = parser().parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
    if args.measure:
        from . import evaluation, measurements, memory

        work = next(getattr(m, args.measure) for m in (memory, evaluation, measurements) if hasattr(m, args.measure))
        print(json.dumps(work(args)))
        return
    import torch

    file = HERE / f"results-{args.device}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in args.only:
        print(f"{name} …", flush=True)
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--measure", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
        if done.returncode:
            killed = " by the system: is there enough memory?" if done.returncode == -9 else "."
            sys.exit(f"error: {name} ended with {done.returncode}{killed} The results before are kept.")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found[name]), flush=True)
        found[name]["measured"] = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "command": " ".join(["python -m benchmarks", *_options(args)]),
        }
        if name.endswith("step"):
            found[name]["settings"] = {
                k: getattr(args, k) for k in ("resolution", "batch_size", "dtype", "gradient_checkpointing")
            }
    found["about"] = {
        "processor": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    from .readme import write

    write()


def _options(args) -> list[str]:
    """What was given besides --only, since the file keeps what was measured before."""
    given = {name: value for name, value in vars(args).items() if value != parser().get_default(name)}
    return [f"--{name} {value}" for name, value in given.items() if name != "only"]


if __name__ == "__main__":
    main()

"""Speed and memory as ratios against the published recipe, measured in one run.

    python -m benchmarks                 # everything, on this machine
    python -m benchmarks --only mask delta
    python -m benchmarks --resolution 512 --batch_size 8 --dtype bf16 --device cuda

The networks have Stable Diffusion v1.4's own configuration and random weights, so that nothing is downloaded. Each
measurement runs in a process of its own, whose peak memory is the operating system's figure (or CUDA's). The results go
to benchmarks/results-DEVICE.json, and benchmarks/README.md is written anew from all such files. `make bench-gpu` runs
what is worth knowing of a CUDA card.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import run_command

from .config import BenchmarkConfig

HERE = Path(__file__).parent


def run(config: BenchmarkConfig) -> None:
    """Measure, add to results-DEVICE.json, and write README.md anew.

    Raises:
        SalunError: a measurement failed; the results before it are kept.
    """
    import torch

    file = HERE / f"results-{'-'.join(filter(None, (config.device, config.part)))}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in config.only:
        print(f"{name} …", flush=True)
        command = [sys.executable, "-m", "benchmarks.one", name, json.dumps(asdict(config))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
        if done.returncode:
            killed = " by the system: is there enough memory?" if done.returncode == -9 else "."
            raise SalunError(f"{name} ended with {done.returncode}{killed} The results before are kept.")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(results[name]), flush=True)
        if config.tiny:
            continue
        results[name]["measured"] = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "command": " ".join(["python -m benchmarks", *_words(config)]),
        }
        if name.endswith("step"):
            results[name]["settings"] = {
                k: getattr(config, k) for k in ("resolution", "batch_size", "dtype", "gradient_checkpointing")
            }
    if config.tiny:
        return
    results["about"] = {
        "processor": torch.cuda.get_device_name() if config.device == "cuda" else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
    }
    file.write_text(json.dumps(results, indent=1) + "\n")
    from .readme import write

    write()


def _words(config: BenchmarkConfig) -> list[str]:
    """What was given besides --only, since the file keeps what was measured before."""
    given = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in ("only", "part")}
    default = asdict(BenchmarkConfig())
    return [
        f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items() if value != default[name]
    ]


if __name__ == "__main__":
    run_command("python -m benchmarks", __doc__, BenchmarkConfig, run)

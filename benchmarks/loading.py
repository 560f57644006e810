"""Loading an erasure of Stable Diffusion's size, against `slow_loader` in the same process, and against the memory."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.fingerprint import fingerprint
from salun_diffusion.loader import load_erasure, set_erasure_scale, unload_erasure
from salun_diffusion.masks.scope import scoped_parameters

from .config import BenchmarkConfig
from .measurements import SCOPE, pipeline, timed, unet
from .slow_loader import SlowErasure

ROUNDS = 3


def delta(config: BenchmarkConfig) -> dict:
    """A delta of SD v1.4's size: its file, and the time to load it, take it off, and turn it off and on."""
    config.dtype = "fp32"
    network = unet(config)
    pipe, parameters = pipeline(network), scoped_parameters(network, SCOPE)
    total = sum(p.numel() for p in parameters.values())
    found = {"scoped_weights": total, "dense_fp16_mb": 2 * total / 1e6, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(f"{folder}/unet")
        # Every weight is read and copied into the network, as by a user: from_pretrained alone only maps the file.
        file = f"{folder}/unet/diffusion_pytorch_model.safetensors"
        found["dense_load_seconds"] = min(timed(config, lambda: network.load_state_dict(load_file(file)), 3))
        base = fingerprint(network.named_parameters())
        for density in (0.5, 0.1):
            paths = []
            for number in range(2):  # two, so that what is loaded next is never what was there before
                masks = {name: torch.rand(p.shape) < density for name, p in parameters.items()}
                values = {name: 1e-3 * torch.randn(int(m.sum())) for name, m in masks.items()}
                paths.append(f"{folder}/{number}-{density}.safetensors")
                Delta(masks, values, base, {"concept": str(number), "method": "salun"}).save(paths[-1], torch.float16)
                del masks, values
            found[f"file_mb_{density}"] = Path(paths[0]).stat().st_size / 1e6
            if density == 0.5:
                found |= _first(config.device, f"{folder}/unet", paths[0])
            found |= {f"{name}_{density}": seconds for name, seconds in _loads(pipe, paths).items()}
            if density == 0.5:
                found |= _switches(pipe, paths)
    weights = [p.detach() for p in parameters.values()]
    copies = [torch.empty_like(p) for p in weights]
    found["copy_seconds"] = min(timed(config, lambda: [c.copy_(p) for c, p in zip(copies, weights, strict=True)], 3))
    return found


def _loads(pipe, paths) -> dict:
    """Seconds of loading and taking off, the slow way and ours in turn; the later ones' least."""
    seconds: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        path, slow = paths[number % 2], []
        works = {
            "slow_load": lambda path=path, slow=slow: _slow(pipe, path, slow),
            "slow_unload": lambda slow=slow: slow.pop().unload(pipe.unet),
            "load": partial(load_erasure, pipe, path),
            "unload": partial(unload_erasure, pipe),
        }
        for name, work in works.items():
            for clock, took in _clocked(work).items():
                seconds.setdefault(name + clock, []).append(took)
    return {name: min(took[1:]) for name, took in seconds.items()}


def _switches(pipe, paths) -> dict:
    """Seconds of turning a loaded erasure off and on, and of going from one loaded erasure to another."""
    load_erasure(pipe, paths[0])
    set_erasure_scale(pipe, "0", 0)
    load_erasure(pipe, paths[1])
    found = {"off_seconds": [], "on_seconds": []}
    for _ in range(ROUNDS):
        for old, new in ("10", "01"):
            found["off_seconds"].append(_clocked(partial(set_erasure_scale, pipe, old, 0))["_seconds"])
            found["on_seconds"].append(_clocked(partial(set_erasure_scale, pipe, new, 1))["_seconds"])
    unload_erasure(pipe)
    return {name: min(took) for name, took in found.items()}


def _slow(pipe, path, made: list) -> None:
    made.append(SlowErasure(path))
    made[0].load(pipe.unet)


def _clocked(work) -> dict[str, float]:
    """Seconds by the clock, and of all processors together: where others use the machine too, these tell more."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"_seconds": time.perf_counter() - wall, "_cpu": time.process_time() - busy}


def _first(device: str, folder: str, path: str) -> dict:
    """The first load in a process of its own, onto a U-Net as `from_pretrained` leaves it: ours, and the slow way's."""
    found = {}
    for name in ("slow_", ""):
        command = [sys.executable, "-m", "benchmarks.loading", device, folder, path, name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent)
        for key, value in json.loads(done.stdout.splitlines()[-1]).items():
            found[f"first_{name}{key}"] = value
    return found


def main() -> None:
    """One first load: the device, the U-Net's folder, the erasure's file, and "slow_" or ""."""
    device, folder, path, how = sys.argv[1:]
    pipe = pipeline(UNet2DConditionModel.from_pretrained(folder).to(device))
    held = psutil.Process().memory_info().rss
    work = partial(load_erasure, pipe, path) if not how else partial(_slow, pipe, path, [])
    took = _clocked(work)
    print(json.dumps({f"load{clock}": seconds for clock, seconds in took.items()}
                     | {"load_extra_gb": (psutil.Process().memory_info().rss - held) / 1e9}))  # fmt: skip


if __name__ == "__main__":
    main()

"""What the trainings of the demo room share: scenes in memory, a resumable loop, checkpoints without pickles."""

import json
import math
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from salun_diffusion.process import emulates_bf16

from .scenes import SIZE, Scene, render

TRAIN_SEEDS = range(0, 65_536)
HELD_OUT_SEEDS = range(1_000_000, 1_004_096)


class _Renderer:
    """Picklable: workers get the artwork once, not with every scene."""

    def __init__(self, art: dict):
        self.art = art

    def __call__(self, seed: int) -> bytes:
        return render(Scene.sample(seed), self.art).tobytes()


def pictures(seeds: range, art: dict, cache: Path) -> torch.Tensor:
    """The scenes of ``seeds`` as uint8 ``(len(seeds), 3, 64, 64)``, memory-mapped from ``cache`` once rendered."""
    if not cache.exists():
        out = torch.empty(len(seeds), SIZE, SIZE, 3, dtype=torch.uint8)
        with get_context("fork").Pool(os.cpu_count()) as pool:
            rows = pool.imap(_Renderer(art), seeds, chunksize=256)
            for i, row in enumerate(tqdm(rows, total=len(seeds), desc=f"rendering {cache.stem}")):
                out[i] = torch.frombuffer(bytearray(row), dtype=torch.uint8).view(SIZE, SIZE, 3)
        write_tensors(cache, {"pictures": out.permute(0, 3, 1, 2).contiguous()}, {})
    return load_file(cache)["pictures"]


def to_model(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0…255 → float32 −1…1."""
    return pictures.float() / 127.5 - 1


def in_bf16(device: str, wanted: bool = True) -> torch.autocast:
    """Autocast to bf16 where ``wanted``, and where the device computes in it; fp32 elsewhere."""
    return torch.autocast(device, torch.bfloat16, enabled=wanted and not emulates_bf16(device))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write atomically: a killed run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, temporary, {k: json.dumps(v) for k, v in metadata.items()}
    )
    os.replace(temporary, path)


class Checkpoint:
    """Weights, Adam moments and the step count of one training, in one safetensors file."""

    def __init__(self, path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: dict | None = None):
        self.path, self.module, self.optimizer, self.ema = path, module, optimizer, ema

    def save(self, step: int) -> None:
        tensors = {f"w.{name}": value for name, value in self.module.state_dict().items()}
        names = [name for name, _ in self.module.named_parameters()]
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"o.{key}.{names[index]}": value for key, value in state.items()}
        tensors |= {f"e.{name}": value for name, value in (self.ema or {}).items()}
        write_tensors(self.path, {k: v.clone() for k, v in tensors.items()}, {"step": step})

    def load(self) -> int:
        """Restore in place and return the number of steps done (0 without a file)."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            step = json.loads(file.metadata()["step"])
        tensors = load_file(self.path)
        names = [name for name, _ in self.module.named_parameters()]
        self.module.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
        state = {
            i: {key: tensors[f"o.{key}.{n}"] for key in ("step", "exp_avg", "exp_avg_sq")} for i, n in enumerate(names)
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for name in self.ema or {}:
            self.ema[name].copy_(tensors[f"e.{name}"])
        return step


class Average:
    """Averaged (EMA) weights of a module: step n keeps (n + 1) / (n + 10) of what they were, ``most`` at most. As
    diffusers' ``EMAModel``, but for the first step, of which that keeps nothing; the shipped models were made so.

    Attributes:
        weights: by the parameters' names.
    """

    def __init__(self, module: torch.nn.Module, most: float):
        self.module, self.most = module, most
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the module's weights after ``step``, counted from 0."""
        now = [p.detach() for p in self.module.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - min(self.most, (step + 1) / (step + 10)))

    @torch.no_grad()
    def put_in(self) -> None:
        """Give the module the averages."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.weights[name])


def loop(
    name: str,
    steps: int,
    checkpoint: Checkpoint,
    learning_rate: Callable[[int], float],
    loss_of: Callable[[int], torch.Tensor],
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Adam steps up to ``steps``, resumed from ``checkpoint``; ``loss_of(step)`` draws its data from the step alone."""
    start = checkpoint.load()
    optimizer = checkpoint.optimizer
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=20)
    smooth, saved = None, time.time()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        torch.manual_seed(step)
        loss = loss_of(step)
        loss.backward()
        if step == 0:
            dead = [n for n, p in checkpoint.module.named_parameters() if p.grad is None or not p.grad.any()]
            if dead:
                raise RuntimeError(f"{len(dead)} parameters of the {name} get no gradient: {dead[:5]}")
        torch.nn.utils.clip_grad_norm_(checkpoint.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after(step)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.time() - saved > 120 or step == steps - 1:
            checkpoint.save(step + 1)
            saved = time.time()


def warm_cosine(peak: float, steps: int, warmup: int = 200, floor: float = 0.02) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to ``floor · peak``."""
    return lambda step: (
        peak * min((step + 1) / warmup, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )

"""One erasure's run: its folder, what its files say of it, and how a pipeline of the caller's is given back."""

import copy
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .concepts.concept import Concept
from .config import EraseConfig
from .erasures.fingerprint import Fingerprint
from .erasures.live import own_parameters
from .erasures.locate import ADAPTER_NAME, FILE_NAME
from .erasures.mask import describe, save_masks
from .errors import SalunError
from .files import listed, make_folder, write_json, writing
from .loader import list_erasures
from .methods import find_method
from .models.base import Model
from .models.load import component

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """A finished erasure.

    Attributes:
        path: the run folder; :func:`salun_diffusion.load_erasure` takes it.
        file: the masked delta, or the adapter, in it.
        config: every resolved setting.
        seconds: wall time of mask and training or solution; None for a run that was resumed.
    """

    path: Path
    file: Path
    config: EraseConfig
    seconds: float | None


FINISHED = (FILE_NAME, ADAPTER_NAME, "config.json")
MADE = ("mask.safetensors", "training.jsonl", "forget.png", "retain.png", "anchor.png", "validation")


class RunFolder:
    """What is known of a run before it starts, and the files that it leaves: mask.safetensors first, then
    erasure.safetensors and config.json, which is written last and marks a finished run. A finished run that was there
    before lies in ``previous/`` until then, so that the folder never holds files of two runs.
    """

    def __init__(self, config: EraseConfig, concepts: list[Concept], commit: str | None, base: Fingerprint):
        self.path, self.config, self.base = Path(config.output_dir), config, base
        self.file = self.path / (ADAPTER_NAME if config.adapter else FILE_NAME)
        self.about = {
            "concept": ", ".join(concept.name for concept in concepts),
            "method": config.method,
            "scope": config.scope,
            "base_model": config.pretrained_model_name_or_path,
            "base_revision": commit,
        } | ({"rank": config.rank} if config.adapter else {})
        method = find_method(config.method)
        if method.by_prompt(method.parse(config.method_option)):
            self.about["by_prompt"] = [name for concept in concepts for name in concept.names]

    def make_way(self, resumed: bool) -> bool:
        """Set a finished run's files aside, or delete what an unfinished one has left. A run that goes on keeps what is
        its own: the mask, the log and the pictures.

        Returns:
            Whether a finished run was set aside.
        """
        previous = self.path / "previous"
        finished = any((self.path / name).exists() for name in FINISHED)
        with writing(self.path):
            # one with a config.json is whole and gives way; without it, setting aside was interrupted: it goes on
            if finished and (previous / "config.json").exists():
                shutil.rmtree(previous)
            for name in FINISHED if resumed else (*MADE, *FINISHED):
                if finished and (self.path / name).exists():
                    make_folder(previous)
                    os.replace(self.path / name, previous / name)
                elif (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
                else:
                    (self.path / name).unlink(missing_ok=True)
        return finished

    def save_mask(self, mask: dict[str, torch.Tensor], write: bool) -> tuple[int, int]:
        """Note the mask's density and write its file (in one process of several).

        Returns:
            How many weights may change, of how many.
        """
        kept, total = (sum(counts) for counts in zip(*((row.kept, row.total) for row in describe(mask)), strict=True))
        self.about["density"] = self.config.density if self.config.mask == "saliency" else kept / total
        if write:
            save_masks(self.path / "mask.safetensors", mask, self.about)
        return kept, total

    def save(self, change, has_anchor: bool, seconds: float | None, threads: list[int]) -> None:
        """Write the erasure and config.json; ``threads`` are the processor's, in turn, of a run in parts."""
        import diffusers
        import transformers

        from . import __version__

        versions = {"salun_diffusion": __version__, "python": platform.python_version()} | {
            module.__name__: module.__version__ for module in (torch, diffusers, transformers)
        }
        about = self.about | {"anchor": ", ".join(self.config.anchor) if has_anchor else None}
        about |= {"settings": self.config.as_dict(), "versions": versions}
        change.save(self.file, self.base, about, DTYPES[self.config.save_dtype])
        about |= {"base_fingerprint": self.base.digest(), "seconds": seconds, "threads": threads}
        write_json(self.path / "config.json", about)
        shutil.rmtree(self.path / "previous", ignore_errors=True)


def check_is_base(model: Model, edited: str | None = None) -> None:
    """Pass if nothing is applied to the pipeline, whose network ``edited`` (None: the denoiser) is to be trained.

    Raises:
        SalunError: an adapter is, or an erasure: what is trained now would hold on top of that one alone.
    """
    if applied := list_erasures(model.pipe):
        names = ", ".join(f"'{erasure['name']}'" for erasure in applied)
        raise SalunError(f"The pipeline has the erasure {names} applied: call unload_erasure(pipe) first.")
    added = set()
    for module in (model.network, component(model.pipe, edited)):
        own = own_parameters(module)
        added |= {name.removeprefix("text_model.") for name, _ in module.named_parameters()} ^ own.keys()
    if added:
        raise SalunError(
            f"The pipeline is not the base model alone: {listed(added, 3)} was added since it was loaded. Take it off "
            "(unload_lora_weights(), unload_ip_adapter()), or load the base model anew, uncompiled."
        )


@contextmanager
def borrowed(model: Model) -> Iterator[None]:
    """Within it, the pipeline may be moved, trained and drawn with; after it, everything but the weights is as before:
    devices, train and eval mode, gradients and what requires them, checkpointing, scheduler, progress bars.
    The weights are :meth:`.training.change.MaskedChange.restore`'s.
    """
    pipe, scheduler = model.pipe, model.pipe.scheduler
    pipe.scheduler = copy.deepcopy(scheduler)  # drawing sets its timesteps
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    devices = [next((p.device for p in part.parameters()), None) for part in modules]
    inner = [module for part in modules for module in part.modules()]
    modes = [(module, module.training) for module in inner]
    checkpointing = [
        (module, module.gradient_checkpointing) for module in inner if hasattr(module, "gradient_checkpointing")
    ]
    parameters = [(p, p.requires_grad, p.grad) for part in modules for p in part.parameters()]
    bars = dict(getattr(pipe, "_progress_bar_config", {}))
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for part, device in zip(modules, devices, strict=True):
            if device is not None:
                part.to(device)
        for module, training in modes:
            module.training = training
        for module, on in checkpointing:
            if module.gradient_checkpointing != on:  # some classes of transformers have it, and not their instances
                module.gradient_checkpointing = on
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bars)

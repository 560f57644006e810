"""Latents on the disk: made shard by shard, each by one process; mapped into memory, not read into it."""

import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from tqdm import tqdm

from ..errors import SalunError
from ..files import key_of, make_folder, read_json, write_json
from ..process import progress
from ..tensors import raw_bytes, read_safetensors, write_safetensors

SHARD = 32  # pictures a file


class Latents:
    """Latents ``(n, channels, height, width)`` in fp32 that stay in their files: mapped into memory, read where indexed
    (by a slice, or a tensor of indices).
    """

    def __init__(self, shards: list[Path]):
        for shard in shards:  # before any is mapped: in turns, the freed memory would be left in pieces
            _sound(shard)
        self.where = []
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                latents = file.get_tensor("latents")
            self.where += [(latents, row) for row in range(len(latents))]

    def __len__(self) -> int:
        return len(self.where)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *self.where[0][0].shape[1:]])

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        found = (self.where[i] for i in torch.arange(len(self))[index].tolist())
        return torch.stack([latents[row] for latents, row in found])


def cached(
    data_dir: str,
    kind: str,
    settings: dict,
    items: Iterable,
    count: int,
    latents: Callable[[list, tqdm], torch.Tensor],
    accelerator: Accelerator,
    title: str,
) -> tuple[list[Path], list[str]]:
    """The files with the latents of ``items``, and the items' prompts, from a folder of ``data_dir`` that is named by
    the hash of ``settings``. What is missing is made, and the folder's manifest written last.

    Args:
        data_dir: where the folder lies.
        settings: all that determines the latents, as JSON holds it.
        count: of the items, at most.
        accelerator: whose processes share the work.
        kind: "forget" or "retain", for names.
        items: things with a ``prompt``, ``count`` at most.
        latents: makes those of a list of items, ``(len(list), channels, height, width)``, and advances the bar.
        title: what to write before the progress bar.

    Raises:
        SalunError: NaN or Inf was made, or the disk refuses a file.
    """
    settings = json.loads(json.dumps({"format": "salun-latents 2"} | settings))
    folder = Path(data_dir) / f"{kind}-{key_of(settings)}"
    manifest = folder / "manifest.json"
    if (prompts := _prompts(manifest)) is not None:
        shards = [_shard(folder, start) for start in range(0, len(prompts), SHARD)]
        if all(shard.exists() for shard in shards):
            return shards, prompts
    make_folder(folder)
    shards, prompts, items = [], [], iter(items)
    with progress(title, count, "image", accelerator.is_main_process) as bar:
        while part := list(islice(items, SHARD)):
            shard = _shard(folder, len(prompts))
            if len(shards) % accelerator.num_processes == accelerator.process_index and not shard.exists():
                made = latents(part, bar).float().cpu()
                if not made.isfinite().all():
                    raise SalunError(f"The base model made NaN or Inf for the {kind} set: load it in fp32 or bf16.")
                write_safetensors(
                    shard, {"latents": made}, {"format": "salun-latents", "sha256": _checksum({"latents": made})}
                )
            else:
                bar.update(len(part))
            shards.append(shard)
            prompts += [item.prompt for item in part]
        bar.total = len(prompts)  # a folder may hold fewer than were allowed
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(manifest, {"settings": settings, "prompts": prompts, "prompts_sha256": key_of(prompts, 64)})
    return shards, prompts


def cached_tensors(
    data_dir: str, kind: str, settings: dict, make: Callable[[], dict[str, torch.Tensor]], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """The tensors that ``make`` gives, from one file of ``data_dir`` that is named by the hash of ``settings``; made by
    all processes together where the file is missing.

    Raises:
        SalunError: a damaged file, or a disk that refuses it.
    """
    path = Path(data_dir) / f"{kind}-{key_of(settings)}.safetensors"
    if not path.exists():
        tensors = make()
        if accelerator.is_main_process:
            make_folder(path.parent)
            write_safetensors(path, tensors, {"format": f"salun-{kind}", "sha256": _checksum(tensors)})
        accelerator.wait_for_everyone()
    return _sound(path)


def _sound(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a cached file, which are those that were written. Files of before checksums have none to compare.

    Raises:
        SalunError: they are not.
    """
    try:
        tensors, metadata = read_safetensors(path)
        if metadata.get("sha256", "") not in ("", _checksum(tensors)):
            raise SalunError(f"{path} is not as it was written: its checksum differs.")
    except SalunError as error:
        fault = str(error).rsplit("; ", 1)[0].rstrip(".")
        raise SalunError(f"{fault}; it is only a cache, so delete that file: it is made again.") from error
    return tensors


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def _prompts(manifest: Path) -> list[str] | None:
    """The prompts of a finished folder, or None: what lacks a whole manifest is looked through and finished anew.

    Raises:
        SalunError: other prompts than were written.
    """
    try:
        told = read_json(manifest)
        prompts = told["prompts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        return None
    if told.get("prompts_sha256", key_of(prompts, 64)) != key_of(prompts, 64):
        raise SalunError(
            f"{manifest} is not as it was written: its prompts differ from their checksum; it is only a cache, so "
            "delete that folder: it is made again."
        )
    return prompts


def _shard(folder: Path, start: int) -> Path:
    return folder / f"latents-{start:05d}.safetensors"

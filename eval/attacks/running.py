"""Run one attack on one model: prompts in batches, each batch kept in files, so that a stopped run goes on.

Below ``pictures/MODEL/ATTACK`` a prompt has a picture, a ``.json`` of what its line of ``samples.jsonl`` adds, and a
``.safetensors`` where the attack found embeddings or noise; what is learned once for the model is ``learned`` with the
same two endings. The ``.json`` is written last and holds the key of all that went into it, and so does the picture.

The batches are the same whatever is there already: rounding depends on a batch's size, so one of which any file is
missing is attacked again as a whole. Processes share the batches.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from salun_diffusion.files import key_of, make_folder, read_json, replacing, write_json
from salun_diffusion.process import place

from ..drawing.pictures import key_in
from ..drawing.pictures import save as save_picture
from .target import Case, Learned, Outcome, Target

Judged = Callable[[Sequence[Case], list[Image.Image]], list[dict]]  # pictures → ``predicted``, and ``black`` if it is


def run_attack(
    module: ModuleType,
    target: Target,
    cases: Sequence[Case],
    options: Any,
    folder: Path,
    settings: dict,
    batch_size: int,
    judged: Judged,
    title: str,
) -> tuple[dict[str, dict], dict | None]:
    """Attack ``cases``, or take what ``folder`` holds of them.

    Args:
        module: the attack.
        target: the model.
        cases: the prompts.
        options: of the module's ``Options``.
        folder: where its files go.
        settings: all that the outcome depends on besides the cases and options, as data.
        batch_size: prompts at once.
        judged: what the judge says of pictures.
        title: of the bar.

    Returns:
        The name of each case → ``key``, ``predicted``, ``steps``, ``forward``, ``backward``, ``drawn``, ``seconds``,
        ``attack_prompt`` and ``tensors`` (a file's name) or null, and the attack's further numbers; and what was
        learned before (``steps``, ``forward``, ``backward``, ``seconds``), or None.
    """
    make_folder(folder)
    state = place()
    settings = settings | {"attack": module.ABOUT.protocol, "options": asdict(options)}
    with state.main_process_first():  # the others find it
        learned, told = _learned(module, target, options, folder, key_of(settings, 32))
    batches = [cases[start : start + batch_size] for start in range(0, len(cases), batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    with tqdm(total=sum(map(len, mine)), desc=title, unit="prompt", disable=not state.is_main_process) as bar:
        for batch in mine:
            keys = _keys(settings, batch)
            if not all(_whole(folder, case.name, key) for case, key in zip(batch, keys, strict=True)):
                begun = time.perf_counter()
                outcomes = module.attack(target, batch, options, learned)
                seconds = (time.perf_counter() - begun) / len(batch)
                answers = judged(batch, [outcome.picture for outcome in outcomes])
                for case, key, outcome, answer in zip(batch, keys, outcomes, answers, strict=True):
                    _write(folder, case.name, key, outcome, answer | {"seconds": round(seconds, 3)})
            bar.update(len(batch))
    gather_object([len(mine)])  # waits for every process
    return {case.name: read_json(folder / f"{case.name}.json") for case in cases}, told


def _keys(settings: dict, batch: Sequence[Case]) -> list[str]:
    whole = [[case.name, case.prompt, case.row.seed, case.guidance_scale] for case in batch]
    return [key_of([settings, whole, case.name], 32) for case in batch]


def _learned(
    module: ModuleType, target: Target, options: Any, folder: Path, key: str
) -> tuple[Learned, dict[str, float] | None]:
    if not hasattr(module, "learn"):
        return Learned(), None
    path = folder / "learned.json"
    if _key_of_json(path) != key:
        begun = time.perf_counter()
        found = module.learn(target, options)
        numbers = {"steps": found.steps, "forward": found.forward, "backward": found.backward}
        _write_tensors(folder / "learned.safetensors", found.tensors)
        write_json(path, {"key": key} | numbers | {"seconds": round(time.perf_counter() - begun, 2)})
    told = read_json(path)
    del told["key"]
    numbers = {name: told[name] for name in ("steps", "forward", "backward")}
    return Learned(_read_tensors(folder / "learned.safetensors"), **numbers), told


def _whole(folder: Path, name: str, key: str) -> bool:
    return _key_of_json(folder / f"{name}.json") == key == key_in(folder / f"{name}.png")


def _key_of_json(path: Path) -> str | None:
    try:
        found = read_json(path)
        tensors = found.get("tensors")
        return found["key"] if not tensors or (path.parent / tensors).is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(folder: Path, name: str, key: str, outcome: Outcome, answer: dict) -> None:
    save_picture(outcome.picture, folder / f"{name}.png", key)
    if outcome.tensors:
        _write_tensors(folder / f"{name}.safetensors", outcome.tensors)
    line = {
        "key": key, "steps": outcome.steps, "forward": outcome.forward, "backward": outcome.backward,
        "drawn": outcome.drawn, "attack_prompt": outcome.text,
        "tensors": f"{name}.safetensors" if outcome.tensors else None,
    }  # fmt: skip
    write_json(folder / f"{name}.json", json.loads(json.dumps(line | outcome.about | answer)))


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replacing(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}

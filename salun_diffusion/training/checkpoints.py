"""Checkpoints of a training: whole or absent, checked before they are used, and only for the settings that made them.

``checkpoint-STEP/`` holds ``state.safetensors`` (what the optimizer trains, its moments, and what the method keeps),
``mask.safetensors`` (where single weights are trained),
``training.jsonl`` (the log up to that step) and ``manifest.json``, which is written last and has the size and SHA-256
of the others. The folder is made under another name, synced to the disk and renamed: one that has its name is complete,
unless the disk has damaged it since.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..erasures.mask import load_masks, save_masks
from ..errors import SalunError
from ..files import read_json, replacing, sha256, sync_folder, write_json
from ..tensors import read_safetensors, write_safetensors

FORMAT = "salun-checkpoint 1"
MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """What a checkpoint folder holds: ``step`` steps are done, ``log`` has their lines."""

    path: Path
    step: int
    tensors: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]
    log: str
    state: dict
    passed_over: str = ""  # newer ones that are damaged, and how

    def whole_mask(self, shaped: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mask of all that ``shaped`` names: the checkpoint has those alone of which some weight may change."""
        return {name: self.masks.get(name, torch.zeros(of.shape, dtype=torch.bool)) for name, of in shaped.items()}

    def ranks(self) -> dict[str, int]:
        """Those of an adapter's layers, by name."""
        start, end = "value.", ".lora_A.weight"
        return {name.removeprefix(start).removesuffix(end): len(value) for name, value in self.tensors.items()
                if name.startswith(start) and name.endswith(end)}  # fmt: skip

    def told(self, steps: int) -> str:
        """What a user should know who goes on from here to ``steps``."""
        text = f"Passed over what is damaged: {self.passed_over}.\n" if self.passed_over else ""
        text += f"Going on from {self.path}, after step {self.step} of {steps}."
        *before, now = threads_of(self)
        if before:
            text += (
                f"\nIt was trained with {before[-1]} processor threads, and this run has {now}: on a CPU, the last "
                f"digits will not be those of a run in one piece. With OMP_NUM_THREADS={before[-1]} they are."
            )
        return text


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        settings: what must be the same for a run to go on; a JSON mapping.
        limit: how many to keep, the newest ones; None keeps all.
    """

    def __init__(self, folder: Path, settings: dict, limit: int | None):
        self.folder, self.settings, self.limit = folder, json.loads(json.dumps(settings)), limit

    def all(self) -> list[Path]:
        """The checkpoint folders, the newest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: -int(path.name.split("-")[1]))

    def start_anew(self) -> None:
        """Make way for a run from the beginning: a finished run's checkpoints are deleted.

        Raises:
            SalunError: the folder holds those of an unfinished run.
        """
        for path in self.all():
            if not _made_before(path / MANIFEST, self.folder / "config.json"):
                raise SalunError(
                    f"{path} belongs to an unfinished run: go on with --resume_from_checkpoint latest, or delete "
                    f"{self.folder} or give another --output_dir to start anew."
                )
        for path in self.all():
            _delete(path)

    def save(self, step: int, tensors: dict, masks: dict, about: dict, log: Path, state: dict) -> Path:
        """Write ``checkpoint-STEP``, then delete the oldest ones beyond the limit.

        Raises:
            SalunError: the disk refuses it; earlier checkpoints are untouched.
        """
        final, making = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.partial"
        shutil.rmtree(making, ignore_errors=True)
        try:
            making.mkdir(parents=True)
            write_safetensors(making / "state.safetensors", tensors, {"format": FORMAT})
            if masks:  # an adapter has none
                save_masks(making / "mask.safetensors", masks, about)
            with replacing(making / "training.jsonl") as copy:
                copy.write(log.read_bytes())
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in making.iterdir()}
            manifest = {"format": FORMAT, "step": step, "settings": self.settings, "state": state, "files": files}
            write_json(making / MANIFEST, manifest)  # syncs the folder too
            if final.exists():  # a damaged one of the same step, or one of the run that this one repeats
                shutil.rmtree(final)
            os.rename(making, final)
            sync_folder(self.folder)
        except (OSError, SalunError) as error:
            shutil.rmtree(making, ignore_errors=True)
            kept = self.newest_valid()
            raise SalunError(
                f"{final} could not be saved ({error}). "
                + (f"{kept} is intact: make room, then go on with --resume_from_checkpoint latest." if kept else "")
            ) from None
        for old in self.all()[self.limit :] if self.limit else []:
            _delete(old)
        return final

    def newest_valid(self) -> Path | None:
        """The newest checkpoint whose files are all there and unchanged."""
        return next((path for path in self.all() if _fault(path) is None), None)

    def load(self, which: str) -> Checkpoint | None:
        """The checkpoint ``which``: a folder, the name of one in the run folder (``"checkpoint-10"``), or ``"latest"``,
        the newest valid one (None if there is none at all).

        A run may go on for more steps than were asked for at first, where no step depended on their number.

        Raises:
            SalunError: no such checkpoint, a damaged one, only damaged ones, or one of other settings, which are
                listed.
        """
        faults: dict[Path, str] = {}
        if which == "latest":
            found = self.all()
            path = next((path for path in found if not faults.setdefault(path, _fault(path) or "")), None)
            passed_over = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items() if fault)
            if path is None and found:
                raise SalunError(
                    f"No checkpoint in {self.folder} can be resumed from ({passed_over}): put an undamaged copy there, "
                    f"or delete {'it' if len(found) == 1 else 'them'} and start anew without --resume_from_checkpoint."
                )
            if path is None:
                return None
        else:
            path, passed_over = Path(which), ""
            if not path.is_dir() and path.name == which:
                path = self.folder / which
            if fault := _fault(path):
                raise SalunError(f"{path} cannot be resumed from: {fault}. Use --resume_from_checkpoint latest.")
        manifest = read_json(path / MANIFEST)
        old, new = manifest["settings"], self.settings
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if old.get("lr_scheduler") == "constant" and new.get("max_train_steps", 0) >= manifest["step"]:
            changed = [name for name in changed if name != "max_train_steps"]
        if changed:
            listed = "; ".join(f"{name} is {new.get(name)!r}, was {old.get(name)!r}" for name in changed)
            raise SalunError(
                f"{path} is of a run with other settings ({listed}): use the same ones, or another --output_dir to "
                "start anew."
            )
        tensors, _ = read_safetensors(path / "state.safetensors")
        masks = load_masks(path / "mask.safetensors")[0] if "mask.safetensors" in manifest["files"] else {}
        log = (path / "training.jsonl").read_text()
        return Checkpoint(path, manifest["step"], tensors, masks, log, manifest["state"], passed_over)


def threads_of(resumed: Checkpoint | None) -> list[int]:
    """With how many processor threads the parts of a run are computed, in turn: sums in another order end on other last
    digits.
    """
    before = resumed.state.get("threads", []) if resumed else []
    return before if before[-1:] == [torch.get_num_threads()] else [*before, torch.get_num_threads()]


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        manifest = read_json(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"its manifest is not of the form '{FORMAT}'"
        if not (isinstance(manifest["settings"], dict) and isinstance(manifest["step"], int) and manifest["state"]):
            return f"its {MANIFEST} lacks settings, step or state"
        for name, entry in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes where {entry['bytes']} belong"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


def _made_before(path: Path, other: Path) -> bool:
    return other.exists() and (not path.exists() or path.stat().st_mtime_ns <= other.stat().st_mtime_ns)


def _delete(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # from here on it is no checkpoint, however far the deletion gets
    shutil.rmtree(path)

"""What every command of this room writes and reads: ``results.json`` and ``samples.jsonl``, a line for each picture.

``results.json`` always holds ``format`` ("salun-diffusion COMMAND N"), ``protocol`` (what the numbers mean, in words to
quote), ``settings``, ``versions`` (of python and the libraries that took part), ``n`` (pictures of each model), and
``models``: the base model and the erasures, each with ``name``, ``role`` ("base", "erasure", "control", "pictures"),
``source``, ``digest`` (of the pipeline as measured: the base's, or a hash over it and over the full digests of what is
applied) and ``erasure`` (as ``list_erasures`` tells of it, ``seconds`` that
its mask and training took, where its run folder tells, and ``bytes`` of its file; null for the base). What a command
adds is described in its own file. A proportion is ``{"count", "n", "percent", "low", "high"}``, the last two its Wilson
95% interval.

A line of ``samples.jsonl`` holds at least ``model``, ``prompt``, ``seed``, ``picture`` (the file, relative to the
folder) and ``key`` (the hash of all that made the picture, which its file carries too).
"""

import json
import platform
from pathlib import Path, PureWindowsPath

import diffusers
import torch
import transformers
from PIL import Image

from salun_diffusion.errors import SalunError
from salun_diffusion.files import listed, make_folder, read_json, replacing, write_json

RESULTS, SAMPLES = "results.json", "samples.jsonl"
KEY = "salun-key"  # under which a picture's file carries the hash of all that made it
FORMAT = "salun-diffusion "
MODEL = ("name", "role", "source", "digest", "erasure")  # what is known of every model
BESIDE = {".txt", ".json", ".jsonl", ".csv", ".md", ".html"}  # what lies beside pictures and needs no word
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
}


def under(settings: dict) -> str:
    """What a protocol adds where all models wore a LoRA."""
    if not (lora := settings.get("lora")):
        return ""
    name = Path(lora["source"]).name
    return f"; every model under the LoRA {name} (sha256 {lora['sha256'][:12]}) at scale {lora['scale']:g}"


def begin(folder: Path, format: str) -> None:
    """Make ``folder`` ready for new results: old ones of the same command go, so that none lie beside new pictures.

    Raises:
        SalunError: the folder holds another command's results.
    """
    path = folder / RESULTS
    if path.exists():
        try:
            found = read_json(path)["format"]
        except (ValueError, KeyError, TypeError):
            found = "unknown"
        if found != format:
            raise SalunError(f"{folder} holds results of the form '{found}': give another --output_dir.")
    make_folder(folder)
    for name in (RESULTS, SAMPLES):
        (folder / name).unlink(missing_ok=True)


def write(folder: Path, results: dict, samples: list[dict]) -> None:
    """Write both files; ``results.json`` last: where it stands, everything that it counts does."""
    with replacing(folder / SAMPLES) as file:
        file.write("".join(json.dumps(row) + "\n" for row in samples).encode())
    write_json(folder / RESULTS, results)


def read(path: Path) -> dict:
    """A ``results.json`` of any command, given as the file or as its folder.

    Raises:
        SalunError: there is none, or it is damaged or something else.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise SalunError(f"There is no {file}: give a folder that a command of `python -m eval` wrote results into.")
    try:
        found = read_json(file)
        whole = all({*MODEL} <= {*model} and isinstance(model["name"], str) for model in found["models"])
        if found["format"].startswith(FORMAT) and found["models"] and whole and isinstance(found["n"], int):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise SalunError(
        f"{file} is damaged, or holds no results of `python -m eval`: run the command that wrote it again."
    )


def read_samples(folder: Path, results: dict) -> dict[str, list[dict]]:
    """The lines of ``folder``'s ``samples.jsonl`` by model, in the order of the prompts.

    Raises:
        SalunError: the file is missing or damaged, or does not hold as many lines for every model as ``results``
            counted, or not the same prompts and seeds (unless ``results`` has ``own_prompts``: a measure may draw
            other prompts for each model).
    """
    path, lines = folder / SAMPLES, []
    if not path.is_file():
        raise SalunError(f"{path} is missing: the command that wrote {RESULTS} beside it writes it too; run it again.")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
            _, shown = lines[-1]["model"], lines[-1]["picture"]
            inside = _inside(folder, shown)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SalunError(f"{path}, line {number}, is damaged: run the command that wrote it again.") from None
        if not inside:
            raise SalunError(f"{path}, line {number}, names a picture outside its folder ({shown}): nothing was read.")
    samples = {model["name"]: [] for model in results["models"]}
    for line in lines:
        samples.setdefault(line["model"], []).append(line)
    compared = ("set",) if results.get("own_prompts") else ("set", "prompt", "seed")
    rows = [[[line.get(key) for key in compared] for line in part] for part in samples.values()]
    if len(rows) != len(results["models"]) or any(row != rows[0] or len(row) != results["n"] for row in rows):
        raise SalunError(f"{path} and {RESULTS} beside it are of different runs: run the command again.")
    return samples


def _inside(folder: Path, shown: str) -> bool:
    """Whether ``shown`` is a path below ``folder``, links followed: a stranger's folder may name any file of ours."""
    parts = PureWindowsPath(shown)  # which knows both kinds of separators
    plain = not (parts.drive or parts.root or ".." in parts.parts)
    return plain and (folder / shown).resolve().is_relative_to(folder.resolve())


def read_sets(where: Path) -> tuple[list[dict], dict[str, list[dict]]]:
    """The models of a results folder and the samples of each; of a plain folder of pictures, one model of that name.

    Raises:
        SalunError: no such folder, no pictures in it, or damaged results.
    """
    if (where / RESULTS).exists():
        found = read(where)
        return found["models"], read_samples(where, found)
    model = {"name": where.name, "role": "pictures", "source": str(where), "digest": None, "erasure": None}
    lines = [{"model": where.name, "picture": str(path.relative_to(where))} for path in in_folder(where)]
    return [model], {where.name: lines}


def in_folder(folder: Path) -> list[Path]:
    """The picture files of a folder and its subfolders, in the order of their names.

    Raises:
        SalunError: no such folder, no picture in it, or some that cannot be measured: all of them are named.
    """
    if not folder.is_dir():
        raise SalunError(f"There is no folder {folder}: give the folder that holds the pictures.")
    # every kind that Pillow reads: one that was passed over would count as harmless
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    paths = [path for path in files if path.suffix.lower() in Image.registered_extensions()]
    if others := [path.name for path in files if path.suffix.lower() not in BESIDE | {*Image.registered_extensions()}]:
        print(f"{folder}: {listed(others)} are no pictures that can be read, and are left out.")
    if not paths:
        raise SalunError(f"{folder} holds no pictures (.png, .jpg, .webp, .gif, .tiff …): give a folder with some.")
    if faulty := [f"{path} {fault}" for path in paths if (fault := _fault(path))]:
        raise SalunError(
            f"{len(faulty)} of the {len(paths)} pictures in {folder} cannot be measured, so none was: "
            f"{listed(faulty)}. Replace them, or remove them."
        )
    return paths


def _fault(path: Path) -> str | None:
    """Why a picture's file cannot be measured: it cannot be opened, or it has several frames of which only the first
    would be seen.
    """
    try:
        with Image.open(path) as opened:
            frames = getattr(opened, "n_frames", 1)
            opened.load()
    except Exception:  # Pillow's plugins raise whatever their format's fault looks like
        return "cannot be read as a picture"
    return f"has {frames} frames" if frames > 1 else None


def picture(folder: Path, sample: dict) -> Image.Image:
    """The RGB picture of a line of ``samples.jsonl``.

    Raises:
        SalunError: it is missing, unreadable, wholly black (unless its line says so), or not the one that was measured
            (its key is another).
    """
    path = folder / sample["picture"]
    try:
        with Image.open(path) as opened:
            found, key = opened.convert("RGB"), opened.info.get(KEY)
    except (OSError, SyntaxError, ValueError):
        raise SalunError(
            f"The picture {path} is missing or cannot be read, so nothing was measured: draw it again, or remove it "
            "with its prompt."
        ) from None
    if found.getbbox() is None and not sample.get("black"):
        raise SalunError(f"The picture {path} is wholly black, so nothing was measured: draw it again.")
    if key != sample.get("key", key):
        raise SalunError(f"The picture {path} is not the one that was measured: run the command that drew it again.")
    return found

"""I2P: inappropriate prompts, each drawn from its own seed, guidance and size, and the nudity that NudeNet finds.

``results.json`` (``format`` "salun-diffusion i2p 1"; what all have in common is in :mod:`eval.results`) adds
``detector`` (``file``, ``sha256``, ``nudenet`` version), ``prompts`` (``source``, ``sha256`` of the file,
``selection``, ``truncated``: the names of those longer than the text encoder reads), ``protocols`` (name → ``labels``,
``threshold``, ``source``), and for each model ``counts`` (protocol → ``images``, ``boxes``, ``by_label``) and
``generation``. A line of ``samples.jsonl``: ``model``, ``case``, ``prompt``, ``seed``, ``guidance_scale``, ``picture``,
``detections``.
"""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState

from salun_diffusion import load_erasure, unload_erasure
from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256
from salun_diffusion.models import load_pipeline, resolve
from salun_diffusion.session import spread_threads

from . import prompts
from .generation import draw
from .nudity import Detector, count
from .protocols import PROTOCOLS
from .results import VERSIONS, aligned, as_drawn, begin, introduce, write

FORMAT = "salun-diffusion i2p 1"
DEFAULT = ("exposed", "strict")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def i2p(
    pretrained_model_name_or_path: str,
    output_dir: Path,
    *,
    erasure: list[str] = (),
    revision: str | None = None,
    prompts_file: Path | None = None,
    selection: prompts.Selection = prompts.ALL,
    protocol: str | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    detector: str | None = None,
    resolution: int = 320,
) -> dict:
    """Draw the prompts with the base model and each erasure, count, write ``output_dir``'s files, return the results.

    Raises:
        SalunError: an unusable base, erasure, prompt file or detector; a picture that is not finite, wholly black or
            unreadable (named, and no results are written).
    """
    diffusers.utils.logging.set_verbosity_error()  # it warns of each cut prompt, which is reported once below
    for library in (diffusers, transformers):  # their bars are about loading; ours estimates the work itself
        library.utils.logging.disable_progress_bar()
    commit = resolve(pretrained_model_name_or_path, revision)[1]
    rows = prompts.select(prompts.read(prompts_file) if prompts_file else prompts.from_hub(), selection)
    wanted = prompts.requests(rows, guidance_scale, size)
    finder = Detector(detector, resolution)
    state = PartialState()
    spread_threads(state)
    pipe = load_pipeline(pretrained_model_name_or_path, commit, dtype).to(state.device)
    models = introduce(pipe, pretrained_model_name_or_path, list(erasure))
    long = prompts.truncated(pipe.tokenizer, wanted)
    if state.is_main_process:
        begin(output_dir, FORMAT)
        if long:
            print(f"{len(long)} of {len(wanted)} prompts are longer than the text encoder reads; their ends are cut.")
    chosen = {name: PROTOCOLS[name] for name in ([protocol] if protocol else DEFAULT)}
    samples = []
    for model in models:
        if model["erasure"]:
            load_erasure(pipe, model["source"])
        folder = output_dir / "pictures" / model["name"]
        drawn = draw(pipe, wanted, folder, num_inference_steps, batch_size, model["name"])
        unload_erasure(pipe)
        model["generation"] = {"images": drawn.count, "seconds": round(drawn.seconds, 2)}
        if not state.is_main_process:
            continue
        detections = finder.detect(drawn.paths, batch_size, f"{model['name']}: looking")
        model["counts"] = {name: count(detections, protocol) for name, protocol in chosen.items()}
        for request, path, boxes in zip(wanted, drawn.paths, detections, strict=True):
            samples.append(
                {"model": model["name"], "case": request.name, "prompt": request.prompt, "seed": request.seed}
                | {"guidance_scale": request.guidance_scale, "picture": str(path.relative_to(output_dir))}
                | {"detections": boxes}
            )
    results = _common(chosen, finder) | {
        "n": len(wanted),
        "base": {"source": pretrained_model_name_or_path, "revision": commit},
        "prompts": {
            "source": str(prompts_file or prompts.I2P),
            "sha256": sha256(prompts_file) if prompts_file else None,
            "selection": asdict(selection),
            "truncated": long,
        },
        "settings": as_drawn(pipe)
        | {
            "num_inference_steps": num_inference_steps,
            "size": list(size) if size else "each row's own",
            "guidance_scale": f"each row's own, or {guidance_scale:g}",
            "batch_size": batch_size,
        },
        "models": models,
    }
    if state.is_main_process:
        write(output_dir, results, samples)
        print(table(results))
    return results


def nudity(folder: Path, output_dir: Path, *, protocol: str | None = None, expected: int | None = None,
           batch_size: int = 8, detector: str | None = None, resolution: int = 320) -> dict:  # fmt: skip
    """Count in the pictures of ``folder`` that exist already; the results are as :func:`i2p`'s, with one model.

    Raises:
        SalunError: no such folder, none or another number of pictures in it than ``expected``, or an unreadable one.
    """
    if not folder.is_dir():
        raise SalunError(f"There is no folder {folder}: give the folder that holds the pictures.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths or expected is not None and len(paths) != expected:
        raise SalunError(
            f"{folder} holds {len(paths)} pictures"
            + (f" where {expected} belong." if expected else "; give one with some.")
        )
    finder = Detector(detector, resolution)
    begin(output_dir, FORMAT)
    chosen = {name: PROTOCOLS[name] for name in ([protocol] if protocol else DEFAULT)}
    detections = finder.detect(paths, batch_size, "looking")
    model = {"name": folder.name, "role": "pictures", "source": str(folder), "digest": None, "erasure": None}
    model["counts"] = {name: count(detections, protocol) for name, protocol in chosen.items()}
    results = _common(chosen, finder) | {"n": len(paths), "models": [model]}
    samples = [
        {"model": folder.name, "picture": str(path), "detections": boxes}
        for path, boxes in zip(paths, detections, strict=True)
    ]
    write(output_dir, results, samples)
    print(table(results))
    return results


def table(results: dict) -> str:
    """Counts as aligned text: for each model and protocol, images with any box that counts, and boxes."""
    lines = [["", "protocol", "images with nudity", "boxes"]]
    for model in results["models"]:
        for name, counts in model["counts"].items():
            found = counts["images"]
            share = (
                f"{found['count']} of {found['n']}, {found['percent']:.1f}% ({found['low']:.1f}-{found['high']:.1f})"
            )
            lines.append([model["name"], name, share, str(counts["boxes"])])
    return aligned(lines)


def _common(chosen: dict, finder: Detector) -> dict:
    """What the results of both commands hold."""
    parts = [f"{name}: {len(p.labels)} labels above {p.threshold} ({p.source})" for name, p in chosen.items()]
    return {
        "format": FORMAT,
        "protocol": f"i2p/1: NudeNet v3 boxes; {'; '.join(parts)}; Wilson 95% intervals; no safety checker",
        "protocols": {name: asdict(protocol) for name, protocol in chosen.items()},
        "detector": {
            "file": finder.path.name,
            "sha256": finder.sha256,
            "resolution": finder.resolution,
            "nudenet": importlib.metadata.version("nudenet"),
        },
        "versions": VERSIONS,
    }

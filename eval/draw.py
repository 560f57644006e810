"""Draw the prompts of a file with the base model and with each erasure; what is then measured is another command's.

``results.json`` (``format`` "salun-diffusion draw 1"; what all have in common is in :mod:`eval.results`) adds ``base``
(``source``, ``revision``), ``prompts`` (``source``, ``sha256`` of the file, ``selection``, ``truncated``: the names of
those longer than the text encoder reads), and for each model ``generation``. A line of ``samples.jsonl``: ``model``,
``case``, ``prompt``, ``seed``, ``guidance_scale``, ``picture``, ``key``.
"""

from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState

from salun_diffusion.files import sha256
from salun_diffusion.models.load import load_pipeline, resolve
from salun_diffusion.process import spread_threads

from . import prompts, results
from .generation import draw as draw_into

FORMAT = "salun-diffusion draw 1"
PROTOCOL = "draw/1: each row's own seed, guidance and size; the same starting noise for every model; no safety checker"


def draw(**options) -> dict:
    """Draw, write ``output_dir``'s files, return the results. The options are those of :func:`draw_prompts`."""
    found, samples, state = draw_prompts(format=FORMAT, **options)
    found = {"format": FORMAT, "protocol": PROTOCOL} | found
    if state.is_main_process:
        results.write(options["output_dir"], found, samples)
        print(f"{found['n']} pictures of each of {len(found['models'])} models are in {options['output_dir']}.")
    return found


def draw_prompts(
    pretrained_model_name_or_path: str,
    output_dir: Path,
    *,
    format: str,
    erasure: list[str] = (),
    scale: list[float] | None = None,
    revision: str | None = None,
    prompts_file: Path | None = None,
    selection: prompts.Selection = prompts.ALL,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict, list[dict], PartialState]:
    """Draw the prompts with the base model and each erasure, below ``output_dir``/pictures.

    Returns:
        The results and the samples, as described above, and the process's place among the others.

    Raises:
        SalunError: an unusable base, erasure or prompt file; a picture that is not finite or wholly black (named).
    """
    diffusers.utils.logging.set_verbosity_error()  # it warns of each cut prompt, which is reported once below
    for library in (diffusers, transformers):  # their bars are about loading; ours estimates the work itself
        library.utils.logging.disable_progress_bar()
    commit = resolve(pretrained_model_name_or_path, revision)[1]
    rows = prompts.select(prompts.read(prompts_file) if prompts_file else prompts.from_hub(), selection)
    wanted = prompts.requests(rows, guidance_scale, size)
    state = PartialState()
    spread_threads(state)
    pipe = load_pipeline(pretrained_model_name_or_path, commit, dtype).to(state.device)
    models = results.introduce(pipe, pretrained_model_name_or_path, list(erasure), scale)
    long = prompts.truncated(pipe.tokenizer, wanted)
    if state.is_main_process:
        results.begin(output_dir, format)
        if long:
            print(f"{len(long)} of {len(wanted)} prompts are longer than the text encoder reads; their ends are cut.")
    samples = []
    for model in models:
        folder = output_dir / "pictures" / model["name"]
        with results.applied(pipe, model):
            drawn = draw_into(pipe, wanted, folder, num_inference_steps, batch_size, model["name"])
        model["generation"] = drawn.told()
        samples += [
            {"model": model["name"], "case": request.name, "prompt": request.prompt, "seed": request.seed}
            | {"guidance_scale": request.guidance_scale, "picture": str(path.relative_to(output_dir)), "key": key}
            for request, path, key in zip(wanted, drawn.paths, drawn.keys, strict=True)
        ]
    found = {
        "n": len(wanted),
        "base": {"source": pretrained_model_name_or_path, "revision": commit},
        "prompts": {
            "source": str(prompts_file or prompts.I2P),
            "sha256": sha256(prompts_file) if prompts_file else None,
            "selection": asdict(selection),
            "truncated": long,
        },
        "settings": results.as_drawn(pipe)
        | {
            "num_inference_steps": num_inference_steps,
            "size": list(size) if size else "each row's own",
            "guidance_scale": f"each row's own, or {guidance_scale:g}",
            "batch_size": batch_size,
        },
        "versions": results.VERSIONS,
        "models": models,
    }
    return found, samples, state

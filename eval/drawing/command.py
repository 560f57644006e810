"""Draw the prompts of a file with the base model and with each erasure; what is then measured is another command's.

``results.json`` (``format`` "salun-diffusion draw 1"; what all have in common is in :mod:`eval.results`) adds ``base``
(``source``, ``revision``), ``prompts`` (``source``, ``sha256`` of the file, ``selection``, ``truncated``: the names of
those longer than the text encoder reads), and for each model ``generation``. A line of ``samples.jsonl``: ``model``,
``case``, ``prompt``, ``seed``, ``guidance_scale``, ``picture``, ``key``.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..options import Prompts

NAME = "draw"
SUMMARY = "draw the prompts of a file, for fid and clip-score"
DESCRIPTION = """\
Draw the prompts of a file, COCO captions for example, with the base model and with each erasure, every row from its own
seed, guidance and size. A stopped run goes on with the same command. What is drawn can then be measured by clip-score,
fid and nudity."""
FORMAT = "salun-diffusion draw 1"
PROTOCOL = "draw/1: each row's own seed, guidance and size; the same starting noise for every model; no safety checker"


@dataclass
class Options(Prompts):
    """Those of :class:`Prompts` alone."""


def run(options: Options) -> dict:
    """Draw, write ``output_dir``'s files, return the results."""
    from .. import results

    found, samples, state = draw_prompts(options, FORMAT)
    found = {"format": FORMAT, "protocol": PROTOCOL + results.under(found["settings"])} | found
    if state.is_main_process:
        results.write(options.output_dir, found, samples)
        print(f"{found['n']} pictures of each of {len(found['models'])} models are in {options.output_dir}.")
    return found


def draw_prompts(options: Prompts, format: str) -> tuple[dict, list[dict], Any]:
    """Draw the prompts with the base model and each erasure, below ``output_dir``/pictures.

    Returns:
        The results and the samples, as described above, and the process's place among the others (a PartialState).

    Raises:
        SalunError: an unusable base, erasure or prompt file; a picture that is not finite or wholly black (named).
    """
    import diffusers
    import transformers

    from salun_diffusion.files import sha256
    from salun_diffusion.models import load_model
    from salun_diffusion.models.load import resolve
    from salun_diffusion.process import place, spread_threads
    from salun_diffusion.run import DTYPES

    from .. import results, subjects
    from . import prompts
    from .pictures import draw as draw_into

    base, output_dir, size = options.pretrained_model_name_or_path, options.output_dir, options.size()
    selection = prompts.Selection(options.category, options.min_nudity_percentage, *options.range())
    diffusers.utils.logging.set_verbosity_error()  # it warns of each cut prompt, which is reported once below
    for library in (diffusers, transformers):  # their bars are about loading; ours estimates the work itself
        library.utils.logging.disable_progress_bar()
    commit = resolve(base, options.revision)[1]
    rows = prompts.select(prompts.read(options.prompts) if options.prompts else prompts.from_hub(), selection)
    wanted = prompts.requests(rows, options.guidance_scale, size, options.seed)
    state = place()
    spread_threads(state)
    base_model = load_model(base, commit, DTYPES[options.dtype], options.variant)
    pipe = base_model.pipe.to(state.device)
    lora = subjects.wear(base_model, options.lora, options.lora_scale)
    models = subjects.introduce(base_model, base, list(options.erasure), options.scale)
    long = prompts.truncated(pipe.tokenizer, wanted) if "cross-attention" in base_model.capabilities else []
    if state.is_main_process:
        results.begin(output_dir, format)
        if long:
            print(f"{len(long)} of {len(wanted)} prompts are longer than the text encoder reads; their ends are cut.")
    samples = []
    for model in models:
        folder = output_dir / "pictures" / model["name"]
        with subjects.applied(pipe, model):
            drawn = draw_into(
                base_model, wanted, folder, options.num_inference_steps, options.batch_size, model["name"]
            )
        model["generation"] = drawn.told()
        samples += [
            {"model": model["name"], "case": request.name, "prompt": request.prompt, "seed": request.seed}
            | {"guidance_scale": request.guidance_scale, "picture": str(path.relative_to(output_dir)), "key": key}
            for request, path, key in zip(wanted, drawn.paths, drawn.keys, strict=True)
        ]
    found = {
        "n": len(wanted),
        "base": {"source": base, "revision": commit},
        "prompts": {
            "source": str(options.prompts or prompts.I2P),
            "sha256": sha256(options.prompts) if options.prompts else None,
            "selection": asdict(selection),
            "truncated": long,
        },
        "settings": subjects.as_drawn(base_model)
        | {
            "num_inference_steps": options.num_inference_steps,
            "size": list(size) if size else "each row's own",
            "guidance_scale": f"each row's own, or {options.guidance_scale:g}",
            "batch_size": options.batch_size,
        }
        | ({} if options.seed is None else {"seed": f"each row's own, or {options.seed} plus its place"})
        | lora,
        "versions": results.VERSIONS,
        "models": models,
    }
    return found, samples, state

"""Make a text-to-image model forget a concept, and save the change as a masked delta.

    accelerate launch erase_concept.py --concept nudity
    accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept airplane

The run folder gets erasure.safetensors (load it with salun_diffusion.load_erasure), mask.safetensors, config.json,
training.jsonl and pictures of what it was trained on. The same seed gives the same bits on the same machine.
"""

import hashlib
import os
import platform
import sys
import time
from pathlib import Path

from salun_diffusion.config import EraseConfig, parse
from salun_diffusion.errors import SalunError


def main(config: EraseConfig) -> None:
    # The heavy imports come after parsing, so that --help and a wrong option answer at once.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
    import diffusers
    import torch
    import transformers
    from accelerate.utils import set_seed

    from salun_diffusion import __version__
    from salun_diffusion.concepts.concept import find_concepts, shared_rows
    from salun_diffusion.data.sets import contact_sheet, image_set
    from salun_diffusion.data.sources import Source
    from salun_diffusion.erasures import mask as masks
    from salun_diffusion.erasures.delta import Delta
    from salun_diffusion.erasures.fingerprint import fingerprint
    from salun_diffusion.files import write_json
    from salun_diffusion.masks import saliency, scope
    from salun_diffusion.methods import find_method
    from salun_diffusion.models.load import denoiser, load_pipeline, move_others, resolve
    from salun_diffusion.models.sampling import sample
    from salun_diffusion.process import accelerator_for
    from salun_diffusion.training.change import MaskedDeltas
    from salun_diffusion.training.checkpoints import Checkpoints
    from salun_diffusion.training.trainer import Trainer

    # What to forget, in which model.
    where, commit = resolve(config.pretrained_model_name_or_path, config.revision)
    concepts = find_concepts(config.concept, Path(where) if commit is None else None, config.anchor)
    names = ", ".join(concept.name for concept in concepts)
    config.fill(concepts[0].settings, names)
    config.anchor = [concept.anchor for concept in concepts]
    method = find_method(config.method)
    sources = {
        "forget": [Source(text) for text in config.forget_data or []],
        "retain": [Source(config.retain_data)] if config.retain_data else [],
    }
    reused = masks.load_masks(config.mask)[0] if config.mask not in ("saliency", "none") else None
    accelerator = accelerator_for(config)
    say, dtypes = accelerator.print, {"no": torch.float32, "fp32": torch.float32}
    dtypes |= {"fp16": torch.float16, "bf16": torch.bfloat16}
    least = len(concepts) * accelerator.num_processes
    for setting, count in (("forget", config.num_forget_images), ("retain", config.num_retain_images)):
        if count is not None and count < least:
            raise SalunError(
                f"--num_{setting}_images {count} are too few (concepts: {len(concepts)}, processes: "
                f"{accelerator.num_processes}): give at least {least}."
            )
    for concept in concepts:
        model = config.pretrained_model_name_or_path
        aim = f": to be drawn as '{concept.anchor}'" if method.anchored else ""
        say(f"Erasing '{concept.value}' from {model} by {config.method}{aim}.")
    set_seed(config.seed)
    pipe = load_pipeline(
        config.pretrained_model_name_or_path, commit, dtypes[config.mixed_precision], config.variant
    ).to(accelerator.device)
    network = denoiser(pipe)
    base = fingerprint(network.named_parameters())
    parameters = scope.scoped_parameters(network, config.scope)
    if reused is not None:
        scope.check_reused(reused, parameters, config.mask)
    output = Path(config.output_dir)
    same = config.as_dict(resumable=True) | {
        "base": base.digest(),
        "processes": accelerator.num_processes,
        "prompts": hashlib.sha256(repr(concepts).encode()).hexdigest()[:16],
        "pictures": {kind: [source.key for source in found] for kind, found in sources.items()},
    }
    checkpoints = Checkpoints(output, same, config.checkpoints_total_limit)
    resumed = checkpoints.load(config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if resumed:
        say(f"Going on from {resumed.path}, after step {resumed.step} of {config.max_train_steps}.")
    else:
        checkpoints.start_anew()
    output.mkdir(parents=True, exist_ok=True)
    if config.report_to:
        accelerator.init_trackers("salun-diffusion", {name: str(value) for name, value in config.as_dict().items()})

    # The forget set and the retain set.
    sets = {}
    for kind in method.sets(config.mask):
        found = sources.get(kind, [])
        sets[kind] = image_set(pipe, concepts, kind, found, config, accelerator)
        if kind == "name":
            say(f"To forget from: {', '.join(sets[kind].prompts[i] for i in sets[kind].prompt_index)}; no pictures.")
            continue
        said = f", from {', '.join(source.text for source in found)}" if found else ", drawn by the base model"
        say(f"The {kind} set: {len(sets[kind])} pictures{said}.")
        if accelerator.is_main_process:
            contact_sheet(pipe, sets[kind].latents[:32], output / f"{kind}.png")

    # The weights that carry the concept.
    begun = time.perf_counter()
    if not method.closed_form:
        trainer = Trainer(accelerator, pipe, sets, config)
        move_others(pipe, "cpu")
    if resumed:
        mask = resumed.masks
    elif reused is not None:
        mask = reused
    elif config.mask == "none":
        mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    else:
        concept_rows = torch.arange(len(sets["forget"])).split(sets["forget"].shares)
        scores = (trainer.saliency(parameters, rows) for rows in concept_rows)
        mask = masks.union([saliency.select(score, config.density, config.threshold) for score in scores])
    kept, total = (sum(counts) for counts in zip(*((row.kept, row.total) for row in masks.describe(mask)), strict=True))
    about = {
        "concept": names,
        "method": config.method,
        "scope": config.scope,
        "density": config.density if config.mask == "saliency" else kept / total,
        "base_model": config.pretrained_model_name_or_path,
        "base_revision": commit,
    }
    if accelerator.is_main_process:
        masks.save_masks(output / "mask.safetensors", mask, about)
    say(f"{kept:,} of the {total:,} weights in scope may change ({kept / total:.1%}).")

    # Train those, keep the rest.
    def validate(step: int) -> None:
        if accelerator.is_main_process:
            move_others(pipe, accelerator.device)
            parts = [shared_rows(concepts, kind, 4, config.seed, "validation") for kind in ("forget", "retain")]
            shown = [row for part in parts for mine in part for row in mine]
            how = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
            drawn = sample(pipe, shown, batch_size=config.sample_batch_size, output_type="latent", **how)
            contact_sheet(pipe, torch.stack(drawn), output / "validation" / f"step-{step:05d}.png", columns=4)
            move_others(pipe, "cpu")
        accelerator.wait_for_everyone()

    deltas = MaskedDeltas(parameters, mask, config.learning_rate or 0.0)
    if method.closed_form:
        deltas.set(method(config).solve(pipe, parameters, concepts))
    else:
        trainer.train(deltas, output / "training.jsonl", checkpoints, resumed, validate)
        trainer.method.close()
    seconds = None if resumed else round(time.perf_counter() - begun, 1)  # of a run in parts, nobody knows
    deltas.snap(dtypes[config.save_dtype])
    deltas.close()
    accelerator.end_training()

    # Save what changed.
    if not accelerator.is_main_process:
        return
    versions = {"salun_diffusion": __version__, "python": platform.python_version()} | {
        module.__name__: module.__version__ for module in (torch, diffusers, transformers)
    }
    about |= {"anchor": ", ".join(config.anchor) if method.anchored else None}
    about |= {"settings": config.as_dict(), "versions": versions}
    values = {name: value.detach().cpu() for name, value in deltas.values.items()}
    kept = {name: mask[name] for name in values}
    Delta(kept, values, base, about).save(output / "erasure.safetensors", dtypes[config.save_dtype])
    write_json(output / "config.json", about | {"base_fingerprint": base.digest(), "seconds": seconds})
    say(f'Saved {output / "erasure.safetensors"}: load it with salun_diffusion.load_erasure(pipe, "{output}").')


if __name__ == "__main__":
    try:
        main(parse(None, __doc__))
    except SalunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        done = str(stop) or "Stopped; the pictures drawn so far are kept."
        print(f"{done} To go on: the same command with --resume_from_checkpoint latest.", file=sys.stderr)
        sys.exit(130)

"""The algorithm, top to bottom: what to forget, in which model; pictures of it and of the rest; the weights that carry
it; train or solve those; save what changed.
"""

import copy
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from .choosing import mask_of, ranks_of
from .concepts.concept import Concept, shared_rows
from .concepts.finding import find_concepts
from .config import EraseConfig
from .data.sets import ImageSet, contact_sheet, image_set
from .data.sources import Source
from .erasures.fingerprint import fingerprint
from .erasures.live import own_parameters
from .erasures.mask import load_masks
from .errors import SalunError
from .files import locked
from .filling import fill, one_preset, table
from .hub import push, remote
from .methods import find_method
from .models.base import Model
from .preparing import base_model, check_counts, check_fit, checkpoints_of, in_scope, resolved
from .process import Callback, accelerator_for, emulates_bf16, reporting_to
from .run import DTYPES, Run, RunFolder
from .training.adapter import AdapterChange
from .training.batches import Batches
from .training.change import MaskedChange
from .training.checkpoints import threads_of
from .training.trainer import Trainer

ENCODING = {"embeddings", "words", "identities"}  # what methods need that encode while they train
ONE_AT_A_TIME = threading.Lock()  # threads of one process would share accelerate's state and the processor's cores


def erase(base, concept: str | list[str] | None = None, *, callback: Callback | None = None, **options) -> Run:
    """Make a base model forget ``concept`` and save the change as a masked delta, or as a low-rank adapter (SalUn,
    ICLR 2024, or any other method of ``METHODS``).

    Args:
        base: a diffusers folder, a hub id, "demo", or a loaded pipeline, which comes back as it was: load the result
            onto it with :func:`salun_diffusion.load_erasure`. Or a whole :class:`EraseConfig`, and nothing more.
        concept: a preset, a word of the base model's concepts.json, any words, or a JSON file of prompts; several in a
            list.
        callback: called as ``callback(stage, done, total)`` with every progress bar's advance.
        options: those of ``erase_concept.py`` by name, and those of the method.

    Returns:
        The run: its folder, file, resolved settings and seconds.

    Raises:
        SalunError: an option that is unknown, out of range or of no use here; a base model, concept or data set that
            cannot be used; a loss that is not finite. Nothing is half-written, and a pipeline that was passed in is as
            before.
        KeyboardInterrupt: Ctrl-C or SIGTERM (:class:`salun_diffusion.process.Stopped` if a checkpoint was saved).
    """
    pipe = None
    if isinstance(base, EraseConfig):
        if concept is not None or options:
            raise SalunError("erase(config) takes no concept or options beside the config: put them into it.")
        config = copy.copy(base)  # what is filled in is this run's: the caller's may serve again
    else:
        if not isinstance(base, str | Path):
            pipe, base = base, getattr(base, "name_or_path", None) or type(base).__name__
            if unused := [name for name in ("revision", "variant") if options.get(name) is not None]:
                raise SalunError(f"{unused[0]} means nothing to a pipeline that is loaded already: leave it out.")
        config = EraseConfig.from_call(str(base), concept, options)
    with ONE_AT_A_TIME, reporting_to(callback):
        return _erase(config, pipe)


def _erase(config: EraseConfig, pipe) -> Run:
    # What to forget, in which model, by which method.
    known, commit = resolved(config, pipe)
    concepts = find_concepts(config.concept, known, config.anchor, config.concept_type)
    preset = one_preset(config, {concept.value: concept.settings for concept in concepts})
    fill(config, preset, ", ".join(concept.name for concept in concepts))
    config.anchor = [concept.anchor for concept in concepts]
    method = find_method(config.method)
    sources = {
        "forget": [Source(text) for text in config.forget_data or []],
        "retain": [Source(config.retain_data)] if config.retain_data else [],
    }
    given_mask = load_masks(config.mask)[0] if config.mask not in ("saliency", "none", None) else None
    with accelerator_for(config.mixed_precision, config.output_dir, config.report_to) as accelerator:
        say, is_main = accelerator.print, accelerator.is_main_process
        check_counts(config, concepts, accelerator.num_processes)
        say("\n".join(_told(config, concept, method) for concept in concepts))
        say(table(config))
        if config.mixed_precision == "bf16" and emulates_bf16(accelerator.device):
            say("This processor has no instructions for bf16 and emulates it: without --mixed_precision it is faster.")
        hub_id = _repository(config) if is_main and config.push_to_hub else None
        with base_model(config, pipe, commit) as model, ExitStack() as undo:
            check_fit(config, method, model)
            model.edit(method.component)
            run = RunFolder(config, concepts, commit, fingerprint(own_parameters(model.edited).items()))
            if method.guard:
                return _guard(run, config, method, concepts, model, accelerator, hub_id)
            parameters = in_scope(config, method, model, given_mask, accelerator)
            undo.enter_context(locked(run.path, wanted=is_main))
            checkpoints, resumed = checkpoints_of(config, run, concepts, sources, accelerator)
            if config.report_to:
                accelerator.init_trackers("salun-diffusion", {k: str(v) for k, v in config.as_dict().items()})

            # The forget set and the retain set.
            sets = _sets(model, method, concepts, sources, config, accelerator)
            if is_main:
                if run.make_way(resumed is not None):
                    say(f"The run that was finished here is kept in {run.path / 'previous'} until this one is too.")
                for kind in sets.keys() - {"name"}:
                    contact_sheet(model, sets[kind].latents[:32], run.path / f"{kind}.png")
            accelerator.wait_for_everyone()
            if config.offload:  # from here on the network stays where it is trained
                model.pipe.remove_all_hooks()

            # The weights that carry the concept.
            begun = time.perf_counter()
            trainer, solution, scores = None, {}, iter(())
            if method.closed_form:
                solution = _solved(method, model, sets, parameters, concepts, config, accelerator)
                if method.sparse:
                    given_mask = {name: solution[name] != p.detach().cpu().float() for name, p in parameters.items()}
            else:
                trainer = Trainer(accelerator, model, sets, config)
                undo.callback(trainer.method.close)
                model.move_others("cpu")
                if pipe is None and not config.validation_steps and not ENCODING & {*method.needs}:
                    model.drop_encoders()  # every prompt of the sets is encoded by now
                if "forget" in sets:
                    by_concept = torch.arange(len(sets["forget"])).split(sets["forget"].shares)
                    scores = (trainer.saliency(parameters, rows) for rows in by_concept)
            if config.adapter:
                ranks, text = ranks_of(config, model.network, parameters, scores, resumed)
                say(text)
                change = AdapterChange(model.pipe, model.network, ranks, config.seed)
            else:
                mask = mask_of(config, parameters, scores, given_mask, resumed)
                kept, total = run.save_mask(mask, write=is_main)
                say(f"{kept:,} of the {total:,} weights in scope may change ({kept / total:.1%}).")
                change = MaskedChange(parameters, mask, component=method.component)

            # Train or solve those, keep the rest.
            if pipe is not None:
                undo.callback(change.restore)
            undo.callback(change.close)
            if trainer:
                validate = _validation(model, concepts, config, run.path, accelerator)
                trainer.train(change, run.path / "training.jsonl", checkpoints, resumed, validate)
            else:
                change.set(solution)
            seconds = None if resumed else round(time.perf_counter() - begun, 1)  # of a run in parts, nobody knows
            change.snap(DTYPES[config.save_dtype])
            accelerator.end_training()

            # Save what changed.
            if is_main:
                _save(run, change, config, seconds, threads_of(resumed), hub_id, say)
            return Run(run.path, run.file, config, seconds)


def _told(config: EraseConfig, concept: Concept, method: type) -> str:
    """What is about to be done, for people."""
    also = f" (also as {', '.join(concept.synonyms)})" if concept.synonyms else ""
    instead = f"'{concept.anchor}'" if concept.anchor else "the empty prompt"
    aim = f": to be drawn as {instead}" if method.has_anchor else ""
    return f"Erasing '{concept.value}'{also} from {config.pretrained_model_name_or_path} by {config.method}{aim}."


def _guard(run: RunFolder, config: EraseConfig, method, concepts, model: Model, accelerator, hub_id) -> Run:
    """A guard against the concepts, saved as any erasure: no weight changes, and nothing is drawn."""
    guard = method(method.parse(config.method_option), concepts)
    if method.guard.learned:
        model.pipe.to(accelerator.device)
    guard.learn(model.pipe, config.seed)
    accelerator.print(f"No weight changes. {method.title} guards against: {', '.join(guard.phrases)}.")
    with locked(run.path, wanted=accelerator.is_main_process):
        if accelerator.is_main_process:
            run.make_way(resumed=False)
            _save(run, guard, config, 0.0, [], hub_id, accelerator.print)
    return Run(run.path, run.file, config, 0.0)


def _sets(model: Model, method, concepts, sources, config: EraseConfig, accelerator) -> dict[str, ImageSet]:
    """The image sets that the method asks for."""
    sets = {}
    for kind in method.sets(config.mask, method.parse(config.method_option)):
        given = sources.get(kind, [])
        sets[kind] = image_set(model, concepts, kind, given, config, accelerator)
        if kind == "name":
            names = ", ".join(sets[kind].prompts[i] for i in sets[kind].prompt_index)
            accelerator.print(f"To forget from: {names}; no pictures.")
            continue
        made = f", from {', '.join(source.text for source in given)}" if given else ", drawn by the base model"
        accelerator.print(f"The {kind} set: {len(sets[kind])} pictures{made}.")
    return sets


def _solved(method, model: Model, sets, parameters, concepts, config: EraseConfig, accelerator) -> dict:
    """The new weights by a closed form: from each concept's pairs of prompts, its own and its anchor's, and from the
    prompts that are kept.
    """
    model.network.eval()
    model.autocast = accelerator.autocast
    batches = Batches.of(accelerator, model, sets, config)
    forget = shared_rows(concepts, "forget", config.num_forget_images, config.seed, "training")
    retain = shared_rows(concepts, "retain", config.num_retain_images or 0, config.seed, "training")
    pairs = [list(dict.fromkeys((row.prompt, row.anchor_prompt) for row in rows)) for rows in forget]
    kept = list(dict.fromkeys(row.prompt for rows in retain for row in rows))
    return method(model, method.parse(config.method_option), batches).solve(parameters, pairs, kept)


def _validation(model: Model, concepts: list[Concept], config: EraseConfig, folder: Path, accelerator):
    """A function that draws a few prompts after a number of steps into ``validation/``."""

    def validate(step: int) -> None:
        if accelerator.is_main_process:
            model.move_others(accelerator.device)
            parts = [shared_rows(concepts, kind, 4, config.seed, "validation") for kind in ("forget", "retain")]
            rows = [row for part in parts for share in part for row in share]
            drawn = model.draw(
                rows, batch_size=config.sample_batch_size, output_type="latent",
                num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            )  # fmt: skip
            contact_sheet(model, torch.stack(drawn), folder / "validation" / f"step-{step:05d}.png", columns=4)
            model.move_others("cpu")
        accelerator.wait_for_everyone()

    return validate


def _repository(config: EraseConfig) -> str:
    """The repository on the hub, made before the long work, so that a wrong id or token is known by then."""
    repo_id = remote.check_id(config.hub_model_id or Path(config.output_dir).name)
    return remote.make_repository(repo_id, remote.check_token(config.hub_token), config.hub_private_repo)


def _save(run: RunFolder, change, config: EraseConfig, seconds: float | None, threads: list[int], hub_id, say) -> None:
    run.save(change, find_method(config.method).has_anchor, seconds, threads)
    say(f'Saved {run.file}: load it with salun_diffusion.load_erasure(pipe, "{run.path}").')
    if hub_id:
        _push(run.path, hub_id, config, say)


def _push(folder: Path, hub_id: str, config: EraseConfig, say) -> None:
    try:
        say(f"Uploaded to {push(folder, hub_id, hub_token=config.hub_token).url}.")
    except SalunError as error:
        raise SalunError(
            f"{error} The run itself is finished, in {folder}; upload it by "
            f"`python -m salun_diffusion push {folder} --hub_model_id {hub_id}`."
        ) from None

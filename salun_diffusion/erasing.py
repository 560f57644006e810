"""The algorithm, top to bottom: what to forget, in which model; pictures of it and of the rest; the weights that carry
it; train or solve those; save what changed.
"""

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from .concepts.concept import Concept, find_concepts, shared_rows
from .concepts.templates import Vocabulary
from .config import EraseConfig
from .data.sets import ImageSet, contact_sheet, image_set
from .data.sources import Source
from .erasures.fingerprint import fingerprint
from .erasures.live import own_parameters
from .erasures.lora import check_adaptable
from .erasures.mask import load_masks, union
from .errors import SalunError
from .files import key_of, locked, sha256
from .filling import fill, one_preset, table
from .hub import push, remote
from .masks.ranks import adaptable_layers, salient_ranks, uniform_ranks
from .masks.saliency import select
from .masks.scope import check_reused, scoped_parameters
from .methods import find_method
from .models import load_model, model_of
from .models.base import Model
from .models.load import described_in, resolve
from .models.quantized import check_not_quantized, quantize_frozen
from .process import Callback, accelerator_for, reporting_to
from .run import DTYPES, Run, RunFolder, borrowed, check_is_base
from .training.adapter import AdapterChange
from .training.batches import Batches
from .training.change import MaskedChange
from .training.checkpoints import Checkpoints, threads_of
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
    known, commit = _resolved(config, pipe)
    concepts = find_concepts(config.concept, known, config.anchor, config.concept_type)
    preset = one_preset(config, {concept.value: concept.settings for concept in concepts})
    fill(config, preset, ", ".join(concept.name for concept in concepts))
    config.anchor = [concept.anchor for concept in concepts]
    method = find_method(config.method)
    sources = {
        "forget": [Source(text) for text in config.forget_data or []],
        "retain": [Source(config.retain_data)] if config.retain_data else [],
    }
    reused = load_masks(config.mask)[0] if config.mask not in ("saliency", "none", None) else None
    with accelerator_for(config.mixed_precision, config.output_dir, config.report_to) as accelerator:
        say, is_main = accelerator.print, accelerator.is_main_process
        _check_counts(config, concepts, accelerator.num_processes)
        for concept in concepts:
            instead = f"'{concept.anchor}'" if concept.anchor else "the empty prompt"
            aim = f": to be drawn as {instead}" if method.has_anchor else ""
            also = f" (also as {', '.join(concept.synonyms)})" if concept.synonyms else ""
            say(f"Erasing '{concept.value}'{also} from {config.pretrained_model_name_or_path} by {config.method}{aim}.")
        say(table(config))
        hub_id = _repository(config) if is_main and config.push_to_hub else None
        with _model(config, pipe, commit) as model, ExitStack() as undo:
            method.check_fit(model, method.parse(config.method_option), f"--method {config.method}")
            if method.guard:
                method.guard.check_fit(model.pipe, f"--method {config.method}")
            if config.offload:
                model.need(["text"], "--offload")
            _check_guided(model, config)
            model.edit(method.component)
            run = RunFolder(config, concepts, commit, fingerprint(own_parameters(model.edited).items()))
            if method.by_prompt(method.parse(config.method_option)):
                run.about["by_prompt"] = [name for concept in concepts for name in concept.names]
            if method.guard:
                made = method(method.parse(config.method_option), concepts)
                if method.guard.learned:
                    model.pipe.to(accelerator.device)
                made.learn(model.pipe, config.seed)
                say(f"No weight changes. {method.title} guards against: {', '.join(made.phrases)}.")
                with locked(run.path, wanted=is_main):
                    if is_main:
                        run.make_way(resumed=False)
                        _save(run, made, config, 0.0, [], hub_id, say)
                return Run(run.path, run.file, config, 0.0)
            if config.quantize_frozen:  # before the network goes to a device that might not hold all of it otherwise
                count = quantize_frozen(model.network, scoped_parameters(model.edited, config.scope, model.scopes))
                say(f"{count:,} weights outside the scope are int8 from here on.")
            if config.offload:
                model.pipe.enable_model_cpu_offload(device=accelerator.device)
            else:
                model.pipe.to(accelerator.device)
            parameters = scoped_parameters(model.edited, config.scope, model.scopes)
            method.check_scope(parameters)
            if config.adapter:  # what cannot be adapted is refused before pictures are drawn
                check_adaptable(model.pipe, f"--adapter {config.adapter}")
                layers = adaptable_layers(model.network, parameters)
            if reused is not None:
                check_reused(reused, parameters, config.mask)
            undo.enter_context(locked(run.path, wanted=is_main))
            checkpoints = Checkpoints(run.path, _same(config, run, concepts, sources, accelerator.num_processes),
                                      config.checkpoints_total_limit)  # fmt: skip
            resumed = checkpoints.load(config.resume_from_checkpoint) if config.resume_from_checkpoint else None
            if resumed:
                say(resumed.told(config.max_train_steps))
            else:
                if config.resume_from_checkpoint:
                    say(f"{run.path} holds no checkpoint: starting anew.")
                checkpoints.start_anew()
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

            # The weights that carry the concept.
            begun = time.perf_counter()
            trainer, solved = None, {}
            if config.offload:  # from here on the network stays where it is trained
                model.pipe.remove_all_hooks()
            if method.closed_form:
                solved = _solved(method, model, sets, parameters, concepts, config, accelerator)
            else:
                trainer = Trainer(accelerator, model, sets, config)
                undo.callback(trainer.method.close)
                model.move_others("cpu")
                if pipe is None and not config.validation_steps and not ENCODING & {*method.needs}:
                    model.drop_encoders()  # every prompt of the sets is encoded by now
            by_concept = torch.arange(len(sets["forget"])).split(sets["forget"].shares) if "forget" in sets else ()
            scores = (trainer.saliency(parameters, rows) for rows in by_concept)  # none is made before it is asked for
            if config.adapter:
                if resumed:
                    ranks = resumed.ranks()
                elif config.mask == "none":
                    ranks = uniform_ranks(layers, config.rank)
                else:
                    ranks = salient_ranks(layers, scores, config.rank)
                say(_adapted(parameters, layers, ranks))
                change = AdapterChange(model.pipe, model.network, ranks, config.seed)
            else:
                if resumed:
                    mask = resumed.whole_mask(parameters if reused is None else reused)
                elif reused is not None:
                    mask = reused
                elif solved and method.sparse:
                    mask = {name: solved[name] != p.detach().cpu().float() for name, p in parameters.items()}
                elif config.mask == "none":
                    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
                else:
                    mask = union([select(score, config.density, config.threshold) for score in scores])
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
                change.set(solved)
            seconds = None if resumed else round(time.perf_counter() - begun, 1)  # of a run in parts, nobody knows
            change.snap(DTYPES[config.save_dtype])
            accelerator.end_training()

            # Save what changed.
            if is_main:
                _save(run, change, config, seconds, threads_of(resumed), hub_id, say)
            return Run(run.path, run.file, config, seconds)


def _resolved(config: EraseConfig, pipe) -> tuple[Path | Vocabulary | None, str | None]:
    """Where the base model says which concepts it knows, its local folder or its own vocabulary, if it does; and its
    commit on the hub, if it comes from there.
    """
    if pipe is not None:
        folder, own = Path(config.pretrained_model_name_or_path), model_of(pipe).vocabulary
        # the classes as this very pipeline calls them: DiT's forgets some names, of two classes with one
        return folder if folder.is_dir() and (own is None or (folder / "concepts.json").exists()) else own, None
    where, commit = resolve(config.pretrained_model_name_or_path, config.revision)
    return described_in(where, commit), commit


@contextmanager
def _model(config: EraseConfig, pipe, commit: str | None) -> Iterator[Model]:
    """The base model: loaded, or the caller's pipeline, given back as it was."""
    if pipe is None:
        name, dtype = config.pretrained_model_name_or_path, DTYPES[config.mixed_precision]
        yield load_model(name, commit, dtype, config.variant)
        return
    for name in ("quantize_frozen", "offload"):
        if getattr(config, name):
            raise SalunError(
                f"--{name} would change a pipeline that is to come back as it was: give the model's folder or its hub "
                "id."
            )
    model = model_of(pipe)
    check_is_base(model, find_method(config.method).component)
    own = dict(model.network.named_parameters())
    check_not_quantized(own, "load it unquantized, or give erase() its folder or hub id and quantize_frozen=True")
    if model.dtype != DTYPES[config.mixed_precision]:
        raise SalunError(
            f"The pipeline's weights are {str(model.dtype).removeprefix('torch.')} and mixed_precision is "
            f"'{config.mixed_precision}': load it in float32, or give the precision that it has."
        )
    with borrowed(model):
        yield model


def _check_guided(model: Model, config: EraseConfig) -> None:
    """Pass if the model can be guided, where the run would guide it."""
    for name, most in (("guidance_scale", 1), ("saliency_guidance", 1), ("condition_dropout", 0)):
        value = getattr(config, name)
        if name not in config.unused and value is not None and value > most:
            model.check_guided(f"--{name} {value:g}")


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


def _check_counts(config: EraseConfig, concepts: list[Concept], processes: int) -> None:
    names = max(len(concept.names) for concept in concepts)  # each is to be in a prompt
    for setting, count in (("forget", config.num_forget_images), ("retain", config.num_retain_images)):
        least = len(concepts) * processes * (names if setting == "forget" else 1)
        if count is not None and count < least:
            several = f", names of a concept: {names}" if names > 1 else ""
            raise SalunError(
                f"--num_{setting}_images {count} are too few (concepts: {len(concepts)}, processes: {processes}"
                f"{several}): give at least {least}."
            )


def _same(config: EraseConfig, run: RunFolder, concepts: list[Concept], sources: dict, processes: int) -> dict:
    """What a run must share with the checkpoint that it goes on from."""
    file, phased = config.mask not in ("saliency", "none"), find_method(config.method).phased
    return (
        config.as_dict(resumable=True)
        | ({"mask_digest": sha256(config.mask)} if file else {})
        | ({"the number of steps, on which their phases depend,": config.max_train_steps} if phased else {})
        | {
            "base": run.base.digest(),
            "processes": processes,
            "prompts": key_of([concept.as_data() for concept in concepts]),
            "pictures": {kind: [source.key for source in parts] for kind, parts in sources.items()},
        }
    )


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


def _adapted(parameters: dict, layers: dict, ranks: dict[str, int]) -> str:
    """What the adapter is put onto, and what it leaves out, for people."""
    least, most = min(ranks.values()), max(ranks.values())
    rank = f"of rank {most}" if least == most else f"of rank {least} to {most}"
    count = sum(rank * (len(layers[name]) + layers[name].flatten(1).shape[1]) for name, rank in ranks.items())
    text = f"An adapter {rank} on {len(ranks)} of the {len(layers)} layers in scope: {count:,} weights to train."
    rest = len(parameters) - len(layers)
    return text + (f" It cannot hold the {rest} biases and norms in scope." if rest else "")


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

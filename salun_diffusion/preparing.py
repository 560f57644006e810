"""Before an erasure's first picture: the base model, whether it and the settings go together, what may change in it,
and the checkpoint to go on from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from .concepts.concept import Concept
from .concepts.templates import Vocabulary
from .config import EraseConfig
from .data.sources import Source
from .erasures.lora import check_adaptable
from .errors import SalunError
from .files import key_of, sha256
from .masks.ranks import adaptable_layers
from .masks.scope import check_reused, scoped_parameters
from .methods import find_method
from .models import load_model, model_of
from .models.base import Model
from .models.load import described_in, resolve
from .models.quantized import check_not_quantized, quantize_frozen
from .run import DTYPES, RunFolder, borrowed, check_is_base
from .training.checkpoints import Checkpoint, Checkpoints


def resolved(config: EraseConfig, pipe) -> tuple[Path | Vocabulary | None, str | None]:
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
def base_model(config: EraseConfig, pipe, commit: str | None) -> Iterator[Model]:
    """The base model: loaded, or the caller's pipeline, given back as it was.

    Raises:
        SalunError: it cannot be loaded, or the caller's pipeline is not plainly the base model in the run's precision.
    """
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


def check_counts(config: EraseConfig, concepts: list[Concept], processes: int) -> None:
    """Pass if each concept and process gets a picture of each set.

    Raises:
        SalunError: there would be too few.
    """
    names = max(len(concept.names) for concept in concepts)  # each is to be in a prompt
    for setting, count in (("forget", config.num_forget_images), ("retain", config.num_retain_images)):
        least = len(concepts) * processes * (names if setting == "forget" else 1)
        if count is not None and count < least:
            several = f", names of a concept: {names}" if names > 1 else ""
            raise SalunError(
                f"--num_{setting}_images {count} are too few (concepts: {len(concepts)}, processes: {processes}"
                f"{several}): give at least {least}."
            )


def check_fit(config: EraseConfig, method: type, model: Model) -> None:
    """Pass if the model has what the method and the settings need.

    Raises:
        SalunError: it has not.
    """
    method.check_fit(model, method.parse(config.method_option), f"--method {config.method}")
    if method.guard:
        method.guard.check_fit(model.pipe, f"--method {config.method}")
    if config.offload:
        model.need(["text"], "--offload")
    for name, most in (("guidance_scale", 1), ("saliency_guidance", 1), ("condition_dropout", 0)):
        value = getattr(config, name)
        if name not in config.unused and value is not None and value > most:
            model.check_guided(f"--{name} {value:g}")


def in_scope(
    config: EraseConfig, method: type, model: Model, reused: dict[str, torch.Tensor] | None, accelerator: Accelerator
) -> dict[str, torch.nn.Parameter]:
    """Put the model where it is trained, with what is frozen in int8 if that is asked for; its weights that the scope
    names, by name, which alone need gradients from here on.

    Raises:
        SalunError: weights that the method, the adapter or the mask file does not fit; before any picture is drawn.
    """
    if config.quantize_frozen:  # before the network goes to a device that might not hold all of it otherwise
        count = quantize_frozen(model.network, scoped_parameters(model.edited, config.scope, model.scopes))
        accelerator.print(f"{count:,} weights outside the scope are int8 from here on.")
    if config.offload:
        model.pipe.enable_model_cpu_offload(device=accelerator.device)
    else:
        model.pipe.to(accelerator.device)
    parameters = scoped_parameters(model.edited, config.scope, model.scopes)
    method.check_scope(parameters)
    if config.adapter:
        check_adaptable(model.pipe, f"--adapter {config.adapter}")
        adaptable_layers(model.network, parameters)
    if reused is not None:
        check_reused(reused, parameters, config.mask)
    return parameters


def checkpoints_of(
    config: EraseConfig,
    run: RunFolder,
    concepts: list[Concept],
    sources: dict[str, list[Source]],
    accelerator: Accelerator,
) -> tuple[Checkpoints, Checkpoint | None]:
    """The run folder's checkpoints, and the one to go on from: what it must share with the run is all that decides the
    result.

    Raises:
        SalunError: the checkpoint is another run's, or cannot be read.
    """
    given_mask, phased = config.mask not in ("saliency", "none"), find_method(config.method).phased
    same = config.as_dict(resumable=True)
    same |= {"mask_digest": sha256(config.mask)} if given_mask else {}
    same |= {"the number of steps, on which their phases depend,": config.max_train_steps} if phased else {}
    same |= {
        "base": run.base.digest(),
        "processes": accelerator.num_processes,
        "prompts": key_of([concept.as_data() for concept in concepts]),
        "pictures": {kind: [source.key for source in parts] for kind, parts in sources.items()},
    }
    checkpoints = Checkpoints(run.path, same, config.checkpoints_total_limit)
    resumed = checkpoints.load(config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if resumed:
        accelerator.print(resumed.told(config.max_train_steps))
        return checkpoints, resumed
    if config.resume_from_checkpoint:
        accelerator.print(f"{run.path} holds no checkpoint: starting anew.")
    checkpoints.start_anew()
    return checkpoints, None

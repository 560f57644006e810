"""A base model must be complete and finite: the libraries that load it fill a missing weight with made-up numbers."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SalunError
from ..files import listed
from ..tensors import check_layout

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def complete_modules(
    where: str, commit: str | None, index: dict, dtypes: dict, variant: str | None, options: dict
) -> dict[str, "torch.nn.Module"]:
    """The networks of a pipeline, every weight of them read from its files: ``DiffusionPipeline.from_pretrained`` takes
    them as they are, where its own loading says of missing weights nothing that a program could read.

    Args:
        where: a diffusers folder, or a hub id.
        commit: of a hub id.
        index: what its model_index.json says.
        dtypes: by the network's name, and ``default``.
        variant: of the weight files.
        options: what ``from_pretrained`` is given besides: parts named there are left out here.

    Raises:
        SalunError: a weight file is damaged, or one lacks a weight or has it in another shape.
    """
    import diffusers
    import transformers

    folder = Path(where)
    if not folder.is_dir():
        try:
            found = diffusers.DiffusionPipeline.download(
                where, revision=commit, variant=variant, use_safetensors=True, **options
            )
        except (OSError, ValueError):
            return {}  # from_pretrained meets the same, and its caller says it
        folder = Path(found)
    modules, libraries = {}, {"diffusers": diffusers, "transformers": transformers}
    for name, entry in index.items():
        if name in options or not isinstance(entry, list) or entry[0] not in libraries:
            continue
        kind = getattr(libraries[entry[0]], entry[1], None)
        if not hasattr(kind, "named_parameters"):  # a tokenizer or a scheduler
            continue
        for file in sorted((folder / name).glob("*.safetensors")):
            check_layout(file)
        own_variant = variant if variant and any((folder / name).glob(f"*.{variant}.*")) else None
        reported = (
            {"ignore_mismatched_sizes": True} if entry[0] == "transformers" else {}
        )  # diffusers names them itself
        try:
            with _quiet():
                modules[name], loaded = kind.from_pretrained(
                    folder / name,
                    torch_dtype=dtypes.get(name, dtypes["default"]),
                    variant=own_variant,
                    use_safetensors=True,
                    output_loading_info=True,
                    **reported,
                )
        except OSError:
            continue  # no weights: from_pretrained says the same, and its caller what to do
        except Exception as error:  # each library has kinds of its own for what does not fit
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".:")
            raise SalunError(f"The {name} of {where} could not be loaded: {reason}; fetch it again.") from error
        if missing := loaded["missing_keys"]:
            raise SalunError(f"{where} is not whole: its {name} lacks {listed(missing)}; fetch it again.")
        if mismatched := [key for key, *_ in loaded["mismatched_keys"]]:
            raise SalunError(
                f"{where} is damaged: in its {name}, {listed(mismatched)} has another shape than its config.json says; "
                "fetch it again."
            )
    return modules


@contextmanager
def _quiet():
    """The two libraries' warnings of what does not fit are left out: it is raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(logging, logging.get_verbosity()) for logging in (diffusers_logging, transformers_logging)]
    try:
        for logging, _ in before:
            logging.set_verbosity(logging.CRITICAL)
        yield
    finally:
        for logging, verbosity in before:
            logging.set_verbosity(verbosity)


def check_weights(name: str, pipe: "DiffusionPipeline") -> None:
    """Pass if every network of ``pipe`` has a finite number for each of its weights.

    Raises:
        SalunError: one has not; the message begins with ``name``.
    """
    import torch

    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        weights = module.state_dict()
        if lacking := [key for key, weight in weights.items() if weight.is_meta]:
            raise SalunError(f"{name} is not whole: its {part} lacks {listed(lacking)}; fetch it again.")
        broken = [
            key
            for key, weight in weights.items()
            if weight.is_floating_point() and weight.numel() and not torch.stack(weight.aminmax()).isfinite().all()
        ]
        if broken:
            raise SalunError(
                f"{name} holds NaN or Inf in its {part}: {listed(broken)}; fetch a sound copy, or load it in fp32."
            )

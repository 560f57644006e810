"""Erasures on a live pipeline: load, unload (bit for bit), list, and fuse for good.

Works on the pipeline's denoiser, `pipe.unet` or `pipe.transformer`. With several erasures at once a weight is
original + the sum of scale * delta, computed in float32 on the CPU and rounded to the parameter's dtype. The originals
of the changed weights, and of no others, are kept on the CPU, and unloading puts them back.
"""

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .erasures.delta import DTYPES, Delta, is_finite, merge
from .erasures.fingerprint import check_have_values, fingerprint, matches
from .errors import SalunError
from .files import listed
from .models.load import denoiser

logger = logging.getLogger(__name__)

FILE_NAME = "erasure.safetensors"
STATE = "_salun_erasures"  # the attribute of the denoiser that holds what is applied to it


@dataclass(frozen=True)
class _Erasure:
    name: str
    scale: float
    delta: Delta
    digest: str
    source: str
    revision: str | None
    originals: dict[str, torch.Tensor]  # parameter name -> the base model's weights at the delta's places


def load_erasure(pipe, source, *, scale: float = 1.0, name=None, revision=None, check_base: bool = True) -> str:
    """Applies an erasure to the pipeline's denoiser, in place, and returns its name.

    source:     a masked-delta file, a run folder that holds `erasure.safetensors`, or a hub id "owner/name"
    scale:      a finite number: 1 applies the erasure as trained, 0.5 half of it
    name:       what to call it in `unload_erasure` and `list_erasures`; by default the concept that it erases
    revision:   branch, tag or commit, for a hub id; the commit that it stood for is kept in `list_erasures`
    check_base: False applies it to a model with another fingerprint too, as long as names and shapes fit

    Weights may be float32, float16 or bfloat16, on any device but meta; they keep dtype and device.
    Raises SalunError, with the pipeline untouched, for: a scale that is not finite; a source that is not there or is
    no sound masked-delta file; parameters that the denoiser lacks or that have other shapes; another base model; a
    delta that is applied already; a name in use; weights that would overflow.
    """
    module, scale = denoiser(pipe), _finite(scale)
    path, commit = _locate(source, revision)
    delta = Delta.load(path)
    digest, applied = delta.digest(), _applied(module)
    name = name or delta.metadata.get("concept") or Path(path).stem
    for erasure in applied:
        if erasure.digest == digest:
            raise SalunError(
                f"{path} is already applied, as {erasure.name!r}; unload that first to apply it at another scale."
            )
        if erasure.name == name:
            raise SalunError(f"The name {name!r} is taken by {erasure.source}; pass another name=...")
    _check_fit(path, delta, module, check_base)
    erasure = _Erasure(name, scale, delta, digest, str(source), commit, {})
    _change(module, (*applied, erasure), delta.masks)
    return name


def unload_erasure(pipe, name: str | None = None) -> None:
    """Takes off the erasure called `name`, or all of them (None); without any it does nothing.

    Weights that no other erasure changes get back their original bits; the others are computed anew.
    Raises SalunError for a name that is not applied, and for weights that are on the meta device by now.
    """
    module = denoiser(pipe)
    applied = _applied(module)
    leaving = [erasure for erasure in applied if name is None or erasure.name == name]
    if not leaving:
        if name is None:
            return
        names = listed(erasure.name for erasure in applied) or "none"
        raise SalunError(f"No erasure called {name!r} is applied; applied now: {names}.")
    staying = tuple(erasure for erasure in applied if name is not None and erasure.name != name)
    _change(module, staying, {parameter for erasure in leaving for parameter in erasure.delta.masks})


def fuse_erasure(pipe) -> None:
    """Makes the applied erasures a part of the model: the originals are forgotten, nothing can be unloaded any more.

    Raises SalunError if none is applied.
    """
    module = denoiser(pipe)
    if not _applied(module):
        raise SalunError("There is no erasure to fuse; load one first.")
    delattr(module, STATE)


def list_erasures(pipe) -> list[dict]:
    """The applied erasures in the order of loading, each a dict: name, scale, concept, method, density (None where
    the file does not say), weights (how many it changes), source, revision (the hub commit or None), digest."""
    return [
        {
            "name": erasure.name,
            "scale": erasure.scale,
            **{key: erasure.delta.metadata.get(key) for key in ("concept", "method", "density")},
            "weights": sum(value.numel() for value in erasure.delta.values.values()),
            "source": erasure.source,
            "revision": erasure.revision,
            "digest": erasure.digest,
        }
        for erasure in _applied(denoiser(pipe))
    ]


def _applied(module) -> tuple[_Erasure, ...]:
    return getattr(module, STATE, ())


def _finite(scale) -> float:
    try:
        number = float(scale)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SalunError(f"scale must be a finite number, not {scale!r}; 1 applies the erasure as trained.")
    return number


def _locate(source, revision) -> tuple[Path, str | None]:
    """The file that `source` means, and the commit if it came from the hub."""
    text, path = str(source), Path(source).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
        if not path.exists():
            raise SalunError(f"{path.parent} holds no {FILE_NAME}; give a finished run's folder, or a file.")
    if path.exists():
        if revision is not None:
            raise SalunError(f"revision={revision!r} is for hub ids, but {path} is a local file; leave it out.")
        return path, None
    # owner/name is a hub id, unless it starts as a path of ours or another suffix or folder shows that a file is meant
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and not text.endswith(".safetensors")
    if not hub_id or text.startswith("runs/") or path.parent.is_dir():
        raise SalunError(f"{path} does not exist; give a file, a run folder with {FILE_NAME}, or a hub id owner/name.")
    return _download(text, revision)


def _download(hub_id: str, revision) -> tuple[Path, str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    logger.warning("%s is no local file or folder: asking the hub for it.", hub_id)
    try:
        path = Path(hf_hub_download(hub_id, FILE_NAME, revision=revision))
    except (OSError, EntryNotFoundError, HFValidationError) as error:  # OSError: no network, no such id, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SalunError(
            f"{hub_id} is no local file or folder, and {FILE_NAME} could not be fetched from the hub under that id "
            f"({reason.rstrip('.')}); give a local path, or check the id and the connection."
        ) from error
    return path, path.parent.name  # the hub's cache keeps each file in a folder named by its commit


def _check_fit(path, delta: Delta, module, check_base: bool) -> None:
    """Raises SalunError if the delta does not belong on this module."""
    parameters = dict(module.named_parameters())
    base = f" (base model {delta.metadata['base_model']})" if delta.metadata.get("base_model") else ""
    unknown = set(delta.masks) - set(parameters)
    if unknown:
        raise SalunError(
            f"{path} changes {len(unknown)} of {len(delta.masks)} parameters that this pipeline's denoiser does not "
            f"have: {listed(unknown)}; load the model that it was made for{base}."
        )
    for name, mask in delta.masks.items():
        if mask.shape != parameters[name].shape:
            raise SalunError(
                f"{path} was made for another base model: {name} has shape {tuple(mask.shape)} there and "
                f"{tuple(parameters[name].shape)} here; load the model that it was made for{base}."
            )
    quantized = [name for name in delta.masks if parameters[name].dtype not in DTYPES]
    if quantized:
        raise SalunError(
            f"{path} can be applied to float32, float16 and bfloat16 weights only, which these are not: "
            f"{listed(quantized)}; load the model unquantized."
        )
    check_have_values(parameters)
    if check_base:
        here = fingerprint(_base_parameters(module))
        if not matches(delta.fingerprint, here):
            raise SalunError(
                f"{path} was made for another base model{base}: fingerprint {delta.fingerprint.digest()} there and "
                f"{here.digest()} here; load that model, or pass check_base=False to apply it to this one all the same."
            )


def _change(module, erasures: tuple[_Erasure, ...], touched) -> None:
    """Makes `erasures` the applied ones, where only the parameters `touched` differ; on a failure nothing changes."""
    before = _applied(module)
    parameters = dict(module.named_parameters())
    gone = set(touched) - set(parameters)
    if gone:
        raise SalunError(f"The denoiser no longer has {listed(gone)}; undo what was added to it since, then try again.")
    check_have_values({name: parameters[name] for name in touched})
    known = max(before, erasures, key=len)  # loading adds to `before` and unloading takes away: all those of both
    try:
        _write(parameters, touched, known, erasures)
    except BaseException:  # an overflow, a device out of memory, Ctrl-C: never leave it half applied
        _write(parameters, touched, known, before)
        raise
    if erasures:
        setattr(module, STATE, erasures)
    else:
        delattr(module, STATE)


@torch.no_grad()
def _write(parameters, names, known, wanted) -> None:
    """Takes the erasures `known` off the parameters `names`, and puts `wanted` on."""
    for name in names:
        weight, terms = parameters[name], []
        flat = weight.cpu().contiguous().view(-1)  # no copy, but the weight itself, if it is row-major on the CPU
        _restore(flat, name, known)
        for erasure in wanted:
            if name in erasure.delta.masks:
                places = erasure.delta.places(name)
                erasure.originals.setdefault(name, flat.index_select(0, places))
                terms.append((places, erasure.delta.values[name], erasure.scale))
        merge(flat, terms)
        if terms and not is_finite(flat):
            raise SalunError(f"{name} would hold NaN or Inf in {weight.dtype}; choose a smaller scale.")
        if flat.data_ptr() != weight.data_ptr():
            weight.copy_(flat.view(weight.shape))


def _restore(flat, name, erasures) -> None:
    """Makes `flat`, the parameter `name` with `erasures` on, the base model's again."""
    for erasure in erasures:
        if name in erasure.originals:
            flat.index_copy_(0, erasure.delta.places(name), erasure.originals[name].to(flat.dtype))


def _base_parameters(module):
    """The parameters as the base model has them, under what is applied; they are made one at a time."""
    for name, weight in module.named_parameters():
        touching = [erasure for erasure in _applied(module) if name in erasure.originals]
        if touching:
            flat = weight.detach().flatten().to("cpu", copy=True)
            _restore(flat, name, touching)
            weight = flat.view(weight.shape)
        yield name, weight

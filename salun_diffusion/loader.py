"""Erasures on a live pipeline, of any kind: load, unload (without a trace), list, and fuse for good."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .erasures import load
from .erasures.base import Applied
from .errors import SalunError
from .files import key_of, listed
from .models.base import Model
from .models.load import denoiser, digest

logger = logging.getLogger(__name__)

FILE_NAME = "erasure.safetensors"
STATE = "_salun_erasures"  # the attribute of the denoiser that holds what is applied to it


def load_erasure(pipe, source, *, scale: float = 1.0, name=None, revision=None, check_base: bool = True) -> str:
    """Apply an erasure to the pipeline, in place.

    The denoiser's weights may be float32, float16 or bfloat16, on any device but meta; they keep dtype and device.

    Args:
        pipe: the diffusers pipeline.
        source: an erasure's file, a run folder that holds ``erasure.safetensors``, or a hub id "owner/name".
        scale: a finite number: 1 applies the erasure as trained, 0.5 half of it.
        name: what to call it in :func:`unload_erasure` and :func:`list_erasures`; by default the concept that it
            erases.
        revision: branch, tag or commit, for a hub id; :func:`list_erasures` tells the commit that it stood for.
        check_base: False applies it to a model with another fingerprint too, as long as names and shapes fit.

    Returns:
        The erasure's name.

    Raises:
        SalunError: a scale that is not finite; a source that is not there or is no sound erasure; parameters that the
            denoiser lacks or that have other shapes; another base model; an erasure that is applied already; a name in
            use; weights that would overflow. The pipeline is untouched.
    """
    denoiser(pipe)  # anything else has no weights to erase from, whatever the source is
    scale = _finite(scale)
    path, commit = _locate(source, revision)
    erasure = load(path)
    digest, applied = erasure.digest(), _applied(pipe)
    name = name or erasure.metadata.get("concept") or Path(path).stem
    for one in applied:
        if one.digest == digest:
            raise SalunError(
                f"{path} is already applied, as {one.name!r}; unload that first to apply it at another scale."
            )
        if one.name == name:
            raise SalunError(f"The name {name!r} is taken by {one.source}; pass another name=...")
    alike = tuple(one for one in applied if type(one.erasure) is type(erasure))
    erasure.check_fit(pipe, path, check_base, alike)
    _change(pipe, (*applied, Applied(name, scale, erasure, digest, str(source), commit)))
    return name


def unload_erasure(pipe, name: str | None = None) -> None:
    """Take off the erasure called ``name``, or all of them (None); without any it does nothing.

    Weights that no other erasure changes get back their original bits; the others are computed anew.

    Raises:
        SalunError: a name that is not applied, or weights that are on the meta device by now.
    """
    applied = _applied(pipe)
    leaving = [one for one in applied if name is None or one.name == name]
    if not leaving:
        if name is None:
            return
        names = listed(one.name for one in applied) or "none"
        raise SalunError(f"No erasure called {name!r} is applied; applied now: {names}.")
    _change(pipe, tuple(one for one in applied if one not in leaving))


def fuse_erasure(pipe) -> None:
    """Make the applied erasures a part of the model: the originals are forgotten, nothing can be unloaded any more.

    Raises:
        SalunError: none is applied.
    """
    if not _applied(pipe):
        raise SalunError("There is no erasure to fuse; load one first.")
    delattr(denoiser(pipe), STATE)


def list_erasures(pipe) -> list[dict]:
    """The applied erasures in the order of loading, each a dict: name, scale, concept, method, density (None where
    the file does not say), weights (how many it changes), source, revision (the hub commit or None), digest.
    """
    return [
        {
            "name": one.name,
            "scale": one.scale,
            **{key: one.erasure.metadata.get(key) for key in ("concept", "method", "density")},
            **one.erasure.describe(),
            "source": one.source,
            "revision": one.revision,
            "digest": one.digest,
        }
        for one in _applied(pipe)
    ]


def idle_erasures(pipe) -> list[str]:
    """The names of applied erasures that do nothing at all: whose every change is lost in rounding, or is zero."""
    return [one.name for one in _applied(pipe) if not one.erasure.acts(one)]


@contextmanager
def without_erasures(pipe) -> Iterator[None]:
    """Within it, nothing is applied; after it, all is as before."""
    before = _applied(pipe)
    if before:
        _change(pipe, ())
    try:
        yield
    finally:
        if before:
            _change(pipe, before)


def identity(model: Model) -> str:
    """Twelve hex digits for a model as it is now: the base's :func:`digest` with nothing applied; with erasures, a hash
    over that and over the full digest and the scale of each.
    """
    if not hasattr(model, "base_digest"):  # each tensor of the base is read once
        with without_erasures(model.pipe):
            model.base_digest = digest(model.pipe)
    applied = [[one.digest, one.scale] for one in _applied(model.pipe)]
    return key_of([model.base_digest, applied], 12) if applied else model.base_digest


def _applied(pipe) -> tuple[Applied, ...]:
    return getattr(denoiser(pipe), STATE, ())


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
    try:
        text, path = str(source), Path(source).expanduser()
        path.exists()
    except (TypeError, ValueError, RuntimeError, OSError) as error:  # no path, NUL in it, no such user, too long
        raise SalunError(
            f"{source!r:.100} can be no path ({error!s:.100}): give a file, a run folder or a hub id."
        ) from None
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


def _change(pipe, after: tuple[Applied, ...]) -> None:
    """Makes `after` the applied erasures, kind by kind; on a failure nothing changes."""
    before, done = _applied(pipe), []
    try:
        for kind in dict.fromkeys(type(one.erasure) for one in (*before, *after)):
            parts = [tuple(one for one in part if type(one.erasure) is kind) for part in (before, after)]
            if parts[0] != parts[1]:
                kind.change(pipe, *parts)
                done.append((kind, *parts))
    except BaseException:
        for kind, old, new in done:
            kind.change(pipe, new, old)
        raise
    if after:
        setattr(denoiser(pipe), STATE, after)
    else:
        delattr(denoiser(pipe), STATE)

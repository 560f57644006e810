"""Erasures on a live pipeline, of any kind: load, unload (without a trace), list, and fuse for good."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusers.configuration_utils import FrozenDict

from .erasures import load
from .erasures.base import Applied
from .erasures.locate import locate
from .errors import SalunError
from .files import key_of, listed
from .models.base import Model
from .models.load import DENOISERS, WORN, components, denoiser, digest

MARK = "_erased_by"  # the key of a network's config, saved with it, that tells what its weights were erased by
LOCK = threading.RLock()  # a web server's threads share a pipeline: of what is applied, and of the weights, one a time


def load_erasure(pipe, source, *, scale: float = 1.0, name=None, revision=None, check_base: bool = True) -> str:
    """Apply an erasure to the pipeline, in place.

    It changes the denoiser, or the text encoder where its file names that. Those weights may be float32, float16 or
    bfloat16, on any device but meta; they keep dtype and device.

    Args:
        pipe: the diffusers pipeline.
        source: an erasure's file, a run folder that holds ``erasure.safetensors`` or, as an adapter,
            ``pytorch_lora_weights.safetensors``, or a hub id "owner/name".
        scale: a finite number: 1 applies the erasure as trained, 0.5 half of it.
        name: what to call it in :func:`unload_erasure` and :func:`list_erasures`; by default the concept that it
            erases.
        revision: branch, tag or commit, for a hub id; :func:`list_erasures` tells the commit that it stood for.
        check_base: False applies it to a model with another fingerprint too, as long as names and shapes fit.

    Returns:
        The erasure's name.

    Raises:
        SalunError: a scale that is not finite; a source that is not there or is no sound erasure; a component or
            parameters that the pipeline lacks, or that have other shapes; another base model; an erasure that is
            applied already; a name in use; weights that would overflow. The pipeline is untouched.
    """
    denoiser(pipe)  # anything else has no weights to erase from, whatever the source is
    scale = _finite(scale)
    path, commit = locate(source, revision)
    erasure = load(path)
    name = name or erasure.metadata.get("concept") or Path(path).stem
    new = Applied(name, scale, erasure, str(source), commit)
    with LOCK:
        applied = _applied(pipe)
        for one in applied:
            if erasure.is_same(one.erasure):
                raise SalunError(
                    f"{path} is already applied, as {one.name!r}; unload that first to apply it at another scale, "
                    "or call set_erasure_scale()."
                )
            if one.name == name:
                raise SalunError(f"The name {name!r} is taken by {one.source}; pass another name=...")
        for mark in _marks(pipe):
            if not _is_of(mark, applied) and mark["digest"] == new.digest:
                raise SalunError(
                    f"{path} was made for another base model: this one is already erased by it, as {mark['name']!r}, "
                    "fused or saved with its weights; load the base model itself to apply it at another scale."
                )
        erasure.check_fit(pipe, path, check_base, _on(pipe, erasure.network(pipe), applied))
        _change(pipe, (*applied, new))
    return name


def set_erasure_scale(pipe, name: str, scale: float) -> None:
    """Apply the erasure called ``name`` at another scale, with the same weights as if it had been loaded at that.

    Raises:
        SalunError: a scale that is not finite, a name that is not applied, and as :func:`unload_erasure` and
            :func:`load_erasure`. The pipeline is untouched.
    """
    scale = _finite(scale)
    with LOCK:
        chosen = _named(pipe, name)
        _change(pipe, tuple(replace(one, scale=scale) if one is chosen else one for one in _applied(pipe)))


def unload_erasure(pipe, name: str | None = None) -> None:
    """Take off the erasure called ``name``, or all of them (None); without any it does nothing.

    Weights that no other erasure changes get back their original bits; the others are computed anew.

    Raises:
        SalunError: a name that is not applied; weights that are on the meta device or on disk by now, that something
            else has written over, or that are not drawn with. The pipeline is untouched.
    """
    with LOCK:
        leaving = _applied(pipe) if name is None else (_named(pipe, name),)
        if leaving:
            _change(pipe, tuple(one for one in _applied(pipe) if one not in leaving))


def fuse_erasure(pipe) -> None:
    """Make the applied erasures a part of the model: the originals are forgotten, nothing can be unloaded any more.

    Raises:
        SalunError: none is applied, one is a guard or is scaled by prompt, or what one wrote is no longer there, or
            not drawn with.
    """
    with LOCK:
        if not _applied(pipe):
            raise SalunError("There is no erasure to fuse; load one first.")
        lost = [one["name"] for one in list_erasures(pipe) if one["intact"] is False]
        if lost:
            raise SalunError(
                f"Something else has written over what the erasures {listed(lost)} wrote, or the pipeline draws with "
                "other weights: undo that first (unfuse_qkv_projections()), or load the pipeline anew."
            )
        applied = _applied(pipe)
        for one in applied:
            if one.erasure.unfusable:
                raise SalunError(
                    f"The erasure {one.name!r} {one.erasure.unfusable}, so it cannot be fused: unload it first."
                )
        for (kind, _), part in _grouped(pipe, applied).items():
            kind.fuse(pipe, tuple(part))
        for module in components(pipe):
            if hasattr(module, WORN):
                delattr(module, WORN)
                _mark(module, [dict(mark.items()) for mark in _marks_of(module)])  # what they held is let go


def list_erasures(pipe) -> list[dict]:
    """The applied erasures, each a dict: name, scale, concept, method, density (None where the file does not say),
    component (the network of the pipeline that it changes), weights (how many of it), source, revision (the hub commit
    or None), digest, intact. Those of the denoiser come first, then the text encoder's, in the order of loading.

    ``intact`` is False where its weights are no longer there as it wrote them, or not drawn with, because of something
    else that was done to the pipeline since, and None where they cannot be seen (on the meta device).
    """
    with LOCK:
        applied = _applied(pipe)
        grouped = _grouped(pipe, applied)
        return [
            {
                "name": one.name,
                "scale": one.scale,
                **{key: one.erasure.metadata.get(key) for key in ("concept", "method", "density")},
                "component": one.erasure.component or _name_of(pipe),
                **one.erasure.describe(),
                "source": one.source,
                "revision": one.revision,
                "digest": one.digest,
                "intact": one.erasure.intact(pipe, one, tuple(next(p for p in grouped.values() if one in p))),
            }
            for one in applied
        ]


def idle_erasures(pipe) -> list[str]:
    """The names of applied erasures that do nothing at all: whose every change is lost in rounding, or is zero."""
    return [one.name for one in _applied(pipe) if not one.erasure.acts(one)]


@contextmanager
def without_erasures(pipe) -> Iterator[None]:
    """Within it, nothing is applied, and other threads wait to apply any; after it, all is as before."""
    with LOCK:
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
    return tuple(one for module in components(pipe) for one in getattr(module, WORN, ()))


def _on(pipe, module, erasures: tuple[Applied, ...]) -> tuple[Applied, ...]:
    """Those of ``erasures`` that go onto the network ``module``."""
    return tuple(one for one in erasures if one.erasure.network(pipe) is module)


def _grouped(pipe, erasures: tuple[Applied, ...]) -> dict[tuple, list[Applied]]:
    """By kind and network."""
    groups: dict[tuple, list[Applied]] = {}
    for one in erasures:
        groups.setdefault((type(one.erasure), one.erasure.network(pipe)), []).append(one)
    return groups


def _name_of(pipe) -> str:
    """What the pipeline calls its denoiser."""
    return next(name for name in DENOISERS if getattr(pipe, name, None) is not None)


def _marks(pipe) -> list[dict]:
    """What the networks' configs say that their weights were erased by: what is applied, fused, or was saved with
    them.
    """
    return [mark for module in components(pipe) for mark in _marks_of(module)]


def _marks_of(module) -> list[dict]:
    config = getattr(module, "config", {})
    return list((config.get(MARK) if hasattr(config, "get") else getattr(config, MARK, None)) or [])


def _named(pipe, name: str) -> Applied:
    applied = _applied(pipe)
    for one in applied:
        if one.name == name:
            return one
    names = listed(one.name for one in applied) or "none"
    raise SalunError(f"No erasure called {name!r} is applied; applied now: {names}.")


def _finite(scale) -> float:
    try:
        number = float(scale)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SalunError(f"scale must be a finite number, not {scale!r}; 1 applies the erasure as trained.")
    return number


def _change(pipe, after: tuple[Applied, ...]) -> None:
    """Makes `after` the applied erasures, kind by kind; on a failure nothing changes."""
    before, done = _applied(pipe), []
    groups = [_grouped(pipe, part) for part in (before, after)]
    try:
        for kind, module in dict.fromkeys([*groups[0], *groups[1]]):
            parts = [tuple(part.get((kind, module), ())) for part in groups]
            if parts[0] != parts[1]:
                kind.change(pipe, *parts)
                done.append((kind, *parts))
    except BaseException:
        for kind, old, new in done:
            kind.change(pipe, new, old)
        raise
    for module in components(pipe):
        _note(module, _on(pipe, module, before), _on(pipe, module, after))


def _note(module, before: tuple[Applied, ...], after: tuple[Applied, ...]) -> None:
    """What a network wears by now, on itself and in its config."""
    if before == after:
        return
    if after:
        setattr(module, WORN, after)
    else:
        delattr(module, WORN)
    marks = _marks_of(module)
    leaving = {one.digest for one in before} if any(not isinstance(mark, Mark) for mark in marks) else set()
    rest = [mark for mark in marks if not _is_of(mark, before) and mark["digest"] not in leaving]
    _mark(module, rest + [Mark(one) for one in after if one.erasure.in_weights])


class Mark(dict):
    """What the config tells of an applied erasure: name, scale and digest, which is made when the config is saved."""

    def __init__(self, one: Applied):
        super().__init__(name=one.name, scale=one.scale)
        self.one = one

    def __missing__(self, key):
        if key != "digest":
            raise KeyError(key)
        self[key] = self.one.digest
        return self[key]

    def items(self):
        """With the digest."""
        return {**super().copy(), "digest": self["digest"]}.items()

    def __reduce__(self):
        return dict, ([*self.items()],)


def _is_of(mark: dict, applied: tuple[Applied, ...]) -> bool:
    return isinstance(mark, Mark) and any(mark.one is one for one in applied)


def _mark(module, marks: list[dict]) -> None:
    """Makes a network's config say that ``marks`` erased it: save_pretrained() writes it beside the weights."""
    if not hasattr(module, "register_to_config"):
        if hasattr(module, "config"):  # transformers' own
            setattr(module.config, MARK, marks) if marks else vars(module.config).pop(MARK, None)
        return
    rest = {key: value for key, value in module.config.items() if key != MARK}
    changed = FrozenDict(rest | ({MARK: marks} if marks else {}))  # a key of it can be set, but not taken
    # load_ip_adapter() sets an attribute of the config that no key says, without which its images are not heeded
    vars(changed).update({name: value for name, value in vars(module.config).items() if name != MARK})
    module._internal_dict = changed

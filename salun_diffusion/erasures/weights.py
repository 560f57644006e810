"""Masked deltas on live weights: the first kind of erasure.

With several at once a weight is original + the sum of scale * delta, computed in float32 on the CPU and rounded to the
parameter's dtype; an erasure at scale 0 leaves the base model's own bits. The base model's tensors are kept, and taking
erasures off puts them back: but only where what the erasures wrote is found as they wrote it.
"""

import torch
from safetensors import safe_open

from ..errors import SalunError
from ..files import listed
from ..models.quantized import is_quantized
from .base import Erasure
from .delta import DTYPES, FORMAT, Delta
from .fingerprint import ROUNDINGS, check_have_values, fingerprint, matches
from .live import check_drawn_with, check_editable, on_disk, own_parameters
from .merge import in_parallel, merge
from .originals import SPARE, Kept, Original, Written, can_exchange, has_offloading, put, room_for


class MaskedWeights(Erasure):
    """A :class:`Delta` that goes onto a network's weights; ``memory`` holds parameter name -> :class:`Original`."""

    FORMAT = FORMAT

    def __init__(self, delta: Delta):
        self.delta, self.metadata, self.component = delta, delta.metadata, delta.component

    @classmethod
    def load(cls, path):
        return cls(Delta.load(path))

    def digest(self):
        return self.delta.digest()

    def is_same(self, other):
        """As the digests would say, but told by the first parameter, mostly."""
        if not isinstance(other, MaskedWeights):
            return False
        ours, theirs = self.delta, other.delta
        return ours.shapes() == theirs.shapes() and all(
            values.dtype == theirs.values[name].dtype
            and torch.equal(ours.packed(name), theirs.packed(name))
            and torch.equal(values.view(torch.uint8), theirs.values[name].view(torch.uint8))
            for name, values in ours.values.items()
        )

    def describe(self):
        return {"weights": sum(value.numel() for value in self.delta.values.values())}

    def acts(self, applied):
        """Whether any weight, of those that it names, is another one with it than without."""
        for name, original in applied.memory.items():
            base = original.base.contiguous().view(-1)
            with_it = torch.empty_like(base)
            merge(base, [self.term(name, applied.scale)], with_it)
            if not torch.equal(with_it, base):
                return True
        return False

    def term(self, name, scale) -> tuple[torch.Tensor, torch.Tensor, float]:
        """What :func:`merge` adds to the parameter ``name``."""
        return self.delta.packed(name), self.delta.values[name], scale

    def check_fit(self, pipe, path, check_base, applied):
        module, delta, where = self.network(pipe), self.delta, self.component or "denoiser"
        parameters = own_parameters(module)
        base = f" (base model {delta.metadata['base_model']})" if delta.metadata.get("base_model") else ""
        unknown = set(delta.masks) - set(parameters)
        if unknown:
            raise SalunError(
                f"{path} changes {len(unknown)} of {len(delta.masks)} parameters that this pipeline's {where} does "
                f"not have: {listed(unknown)}; load the model that it was made for{base}."
            )
        for name, shape in delta.shapes().items():
            if shape != parameters[name].shape:
                raise SalunError(
                    f"{path} was made for another base model: {name} has shape {shape} there and "
                    f"{tuple(parameters[name].shape)} here; load the model that it was made for{base}."
                )
        quantized = [
            name for name in delta.masks if parameters[name].dtype not in DTYPES or is_quantized(parameters[name])
        ]
        if quantized:
            raise SalunError(
                f"{path} can be applied to float32, float16 and bfloat16 weights only, which these are not: "
                f"{listed(quantized)}; load the model unquantized."
            )
        check_editable(pipe, module)  # before values are looked at: what is on disk has none here
        check_have_values(parameters)
        if check_base:
            here = fingerprint(base_parameters(module, applied))
            if not matches(delta.fingerprint, here):
                changed = _fused_lora(module) + _new_tokens(pipe, self)
                raise SalunError(
                    f"{path} was made for another base model{base}: fingerprint {delta.fingerprint.digest()} there and "
                    f"{here.digest()} here{changed}; load that model, or pass check_base=False to apply it to this one "
                    "all the same."
                )

    @classmethod
    def change(cls, pipe, before, after):
        """Only the parameters that an arriving or leaving erasure names are written."""
        erasure = (*before, *after)[0].erasure  # they are all of one network
        module = erasure.network(pipe)
        touched = {name for one in {*before} ^ {*after} for name in one.erasure.delta.masks}
        parameters = own_parameters(module)
        gone = touched - set(parameters)
        if gone:
            raise SalunError(
                f"The {erasure.component or 'denoiser'} no longer has {listed(gone)}; undo what was added to it since, "
                "then try again."
            )
        check_editable(pipe, module)
        check_drawn_with(module, touched)
        check_have_values({name: parameters[name] for name in touched})
        originals = {name: one.memory[name] for one in before for name in one.memory if name in touched}
        known = [name for name in sorted(touched) if name in originals]
        there = in_parallel(lambda name: _as_written(parameters[name], name, before), known)
        if altered := [name for name, found in zip(known, there, strict=True) if not found]:
            raise SalunError(
                f"Something else has written over what the erasures {listed(repr(one.name) for one in before)} wrote: "
                f"{listed(altered, 3)}; load the pipeline anew, and unload or fuse erasures before such an edit "
                "(fuse_lora(), load_state_dict())."
            )
        _exchange(module, {name: parameters[name] for name in touched}, originals, before, after)

    @classmethod
    def fuse(cls, pipe, applied):
        SPARE.pop(applied[0].erasure.network(pipe), None)

    @classmethod
    def intact(cls, pipe, one, applied):
        module = one.erasure.network(pipe)
        parameters, disk = own_parameters(module), on_disk(module)
        try:
            check_drawn_with(module, one.memory)
        except SalunError:
            return False
        for name in one.memory:
            weight = parameters.get(name)
            if weight is not None and weight in disk:
                weight = _from_disk(*disk[weight], weight)
            if weight is not None and weight.is_meta:
                return None
            if weight is None or not _as_written(weight, name, applied, thorough=True):
                return False
        return True


def _fused_lora(module) -> str:
    fused = any(getattr(part, "merged", False) is True for part in module.modules())  # peft's layers have it
    return " (a LoRA is fused into it: load the erasure before fuse_lora())" if fused else ""


def _new_tokens(pipe, erasure) -> str:
    tokenizer = getattr(pipe, "tokenizer", None) if erasure.component == "text_encoder" else None
    grown = tokenizer is not None and len(tokenizer) > tokenizer.vocab_size
    return " (textual inversion has added tokens to it: load the erasure before that)" if grown else ""


def _from_disk(file, key, weight):
    try:
        with safe_open(file, framework="pt") as found:
            return found.get_tensor(key)
    except OSError:  # it is written at the first offloading, until when the weight is in memory
        return weight


@torch.no_grad()
def _as_written(weight, name, erasures, thorough=False) -> bool:
    """Whether `weight` has the values that `erasures` gave it, maybe rounded by a change of dtype since then."""
    there = [one for one in erasures if name in one.memory]
    original = there[0].memory[name]
    if original.is_there(weight, thorough):
        return True
    if original.base.shape != weight.shape or not weight.is_floating_point():
        return False
    if original.base.data_ptr() == weight.data_ptr():  # at scale 0 they are one: it was edited there
        return False
    terms = [one.erasure.term(name, one.scale) for one in there if one.scale]
    found = weight.cpu().contiguous().view(-1).float()
    for dtype in dict.fromkeys([weight.dtype, original.base.dtype]):
        base = original.base_as(dtype)
        written = torch.empty(base.shape)
        merge(base, terms, written)
        for rounding in ROUNDINGS:
            rounded = written.to(dtype)
            for step in (*rounding, weight.dtype):
                rounded = rounded.to(step)
            if torch.equal(rounded.float(), found):
                return True
    return False


@torch.inference_mode(False)  # else the weights would be tensors that PyTorch forbids to edit later
def _exchange(module, parameters, originals, before, after) -> None:
    """Takes `parameters`, of which those in `originals` wear `before`, to `after`; if that fails, back."""
    offloaded = has_offloading(module)
    changes = []
    for name, weight in parameters.items():
        exchange = can_exchange(weight) and not offloaded
        if name not in originals:
            originals[name] = Original(weight.detach() if exchange else weight.detach().to("cpu", copy=True))
        changes.append((name, weight, originals[name], exchange))
    changes.sort(key=lambda change: -change[1].numel())  # so that no thread is left with the largest
    try:
        in_parallel(lambda change: _write(module, *change, before, after), changes)
    except BaseException:  # an overflow, a device out of memory, Ctrl-C: never leave it half applied
        in_parallel(lambda change: _write(module, *change, None, before), changes)
        raise
    for one in before:  # first: the same erasure at another scale shares its memory
        if one not in after:
            one.memory.clear()
    for one in after:
        one.memory.update({name: originals[name] for name in one.erasure.delta.masks if name in originals})


@torch.no_grad()  # it is a thread's own, as is the mode of inference
def _write(module, name, weight, original, exchange, before, after) -> None:
    """Makes `weight` what `after` asks for; it is what `before` asked for, or, if that is None, anything."""
    was, wanted = (
        [one for one in side or () if one.scale and name in one.erasure.delta.masks] for side in (before, after)
    )
    if before is not None and [(one.erasure, one.scale) for one in was] == [(one.erasure, one.scale) for one in wanted]:
        original.written = original.written or Written.of(weight)
        return
    staying = {one.erasure: one.scale for one in after}
    leaving = weight.detach() if was else None
    if len(was) == 1 and staying.get(was[0].erasure) == 0:  # turned off, so that it may be turned on again at once
        erasure, scale = was[0].erasure, was[0].scale
        values = leaving if exchange else leaving.to("cpu", copy=True)
        original.kept[erasure], leaving = Kept(scale, values, original.written.checksum), None
    known = None
    found = original.kept.get(wanted[0].erasure) if len(wanted) == 1 else None
    if not wanted:
        put(weight, original.base.to(weight.dtype), exchange)
    elif found and (found.scale, found.weights.dtype) == (wanted[0].scale, weight.dtype):
        put(weight, found.weights, exchange)
        known = found.checksum
    else:
        known = _merge(module, name, weight, original, exchange, wanted, leaving)
        leaving = None
    if any(name in one.erasure.delta.masks for one in after):
        original.written = Written.of(weight, known)
    for erasure, kept in [*original.kept.items()]:
        if staying.get(erasure) != 0:
            del original.kept[erasure]
            if kept.weights.data_ptr() != weight.data_ptr():
                leaving = kept.weights
    if leaving is not None and exchange:
        SPARE.setdefault(module, {})[name] = leaving


def _merge(module, name, weight, original, exchange, wanted, free) -> int | None:
    """Makes `weight` the base model's with the erasures `wanted`; `free` is the tensor that it has, if that may be
    written over. The result's checksum.
    """
    base = original.base_as(weight.dtype)
    row_major = weight.is_contiguous() and exchange and weight.dtype in DTYPES
    if row_major:
        made = free if free is not None else room_for(module, name, weight)
    else:  # float8, which layerwise casting has made of it since: no arithmetic there
        made = torch.empty(weight.shape, dtype=weight.dtype if weight.dtype in DTYPES else torch.float32)
        base = base.to(made.dtype)
    merged = merge(base, [one.erasure.term(name, one.scale) for one in wanted], made.view(-1), weight.dtype)
    if not merged.fits:
        raise SalunError(f"{name} would hold NaN or Inf in {weight.dtype}; choose a smaller scale.")
    if exchange and not row_major and weight.dtype == made.dtype:
        made = room_for(module, name, weight).copy_(made)
    put(weight, made, exchange)
    return merged.checksum if made.dtype == weight.dtype else None


def base_parameters(module, applied):
    """The parameters as the base model has them, under what is applied; they are made one at a time."""
    for name, weight in own_parameters(module).items():
        original = next((one.memory[name] for one in applied if name in one.memory), None)
        yield name, weight if original is None else original.base_as(weight.dtype).view(weight.shape)

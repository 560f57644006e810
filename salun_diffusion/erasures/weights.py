"""Masked deltas on live weights: the first kind of erasure.

With several at once a weight is original + the sum of scale * delta, computed in float32 on the CPU and rounded to the
parameter's dtype. The originals of the changed weights, and of no others, are kept on the CPU, and removing an erasure
puts them back: but only where what the erasures wrote is found as they wrote it.
"""

import torch
from safetensors import safe_open

from ..errors import SalunError
from ..files import listed
from ..models.load import denoiser
from .base import Applied, Erasure
from .delta import DTYPES, FORMAT, Delta, is_finite, merge
from .fingerprint import ROUNDINGS, check_have_values, fingerprint, matches
from .live import check_drawn_with, check_editable, on_disk, own_parameters


class MaskedWeights(Erasure):
    """A :class:`Delta` that goes onto the denoiser's weights; ``memory`` holds parameter name -> the base model's
    weights at the delta's places.
    """

    FORMAT = FORMAT

    def __init__(self, delta: Delta):
        self.delta, self.metadata = delta, delta.metadata

    @classmethod
    def load(cls, path):
        return cls(Delta.load(path))

    def digest(self):
        return self.delta.digest()

    def describe(self):
        return {"weights": sum(value.numel() for value in self.delta.values.values())}

    def acts(self, applied):
        """Whether any weight, of those that it names, is another one with it than without."""
        for name, original in applied.memory.items():
            moved = original.float() + self.delta.values[name].float() * applied.scale
            if not torch.equal(moved.to(original.dtype), original):
                return True
        return False

    def check_fit(self, pipe, path, check_base, applied):
        module, delta = denoiser(pipe), self.delta
        parameters = own_parameters(module)
        base = f" (base model {delta.metadata['base_model']})" if delta.metadata.get("base_model") else ""
        unknown = set(delta.masks) - set(parameters)
        if unknown:
            raise SalunError(
                f"{path} changes {len(unknown)} of {len(delta.masks)} parameters that this pipeline's denoiser does "
                f"not have: {listed(unknown)}; load the model that it was made for{base}."
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
        check_editable(pipe)  # before values are looked at: what is on disk has none here
        check_have_values(parameters)
        if check_base:
            here = fingerprint(base_parameters(module, applied))
            if not matches(delta.fingerprint, here):
                raise SalunError(
                    f"{path} was made for another base model{base}: fingerprint {delta.fingerprint.digest()} there and "
                    f"{here.digest()} here{_fused_lora(module)}; load that model, or pass check_base=False to apply it "
                    "to this one all the same."
                )

    @classmethod
    def change(cls, pipe, before, after):
        """Only the parameters that an arriving or leaving erasure names are written."""
        module = denoiser(pipe)
        touched = {name for one in {*before} ^ {*after} for name in one.erasure.delta.masks}
        parameters = own_parameters(module)
        gone = touched - set(parameters)
        if gone:
            raise SalunError(
                f"The denoiser no longer has {listed(gone)}; undo what was added to it since, then try again."
            )
        check_editable(pipe)
        check_drawn_with(module, touched)
        check_have_values({name: parameters[name] for name in touched})
        if altered := [name for name in sorted(touched) if not _as_written(parameters[name], name, before)]:
            raise SalunError(
                f"Something else has written over what the erasures {listed(repr(one.name) for one in before)} wrote: "
                f"{listed(altered, 3)}; load the pipeline anew, and unload or fuse erasures before such an edit "
                "(fuse_lora(), load_state_dict())."
            )
        known = (*before, *(one for one in after if one not in before))
        try:
            _write(parameters, touched, known, after)
        except BaseException:  # an overflow, a device out of memory, Ctrl-C: never leave it half applied
            _write(parameters, touched, known, before)
            raise

    @classmethod
    def intact(cls, pipe, one, applied):
        module = denoiser(pipe)
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
            if weight is None or not _as_written(weight, name, applied):
                return False
        return True


def _fused_lora(module) -> str:
    fused = any(getattr(part, "merged", False) is True for part in module.modules())  # peft's layers have it
    return " (a LoRA is fused into it: load the erasure before fuse_lora())" if fused else ""


def _from_disk(file, key, weight):
    try:
        with safe_open(file, framework="pt") as found:
            return found.get_tensor(key)
    except OSError:  # it is written at the first offloading, until when the weight is in memory
        return weight


@torch.no_grad()
def _as_written(weight, name, erasures) -> bool:
    """Whether `weight` has the values that `erasures` gave it, maybe rounded by a change of dtype since then."""
    there = [one for one in erasures if name in one.memory]
    if not there:
        return True
    if any(one.erasure.delta.masks[name].shape != weight.shape for one in there) or not weight.is_floating_point():
        return False
    terms = [(one.erasure.delta.places(name), one.erasure.delta.values[name], one.scale) for one in there]
    flat = weight.cpu().contiguous().view(-1)
    found = [flat.float().index_select(0, places) for places, _, _ in terms]
    for dtype in dict.fromkeys([weight.dtype, *(one.memory[name].dtype for one in there)]):
        written = torch.zeros(flat.shape)
        for (places, _, _), one in zip(terms, there, strict=True):
            written.index_copy_(0, places, one.memory[name].to(dtype).float())
        merge(written, terms)
        for rounding in ROUNDINGS:
            rounded = written.to(dtype)
            for step in (*rounding, weight.dtype):
                rounded = rounded.to(step)
            rounded = rounded.float()
            if all(torch.equal(rounded.index_select(0, p), f) for (p, _, _), f in zip(terms, found, strict=True)):
                return True
    return False


@torch.no_grad()
def _write(parameters, names, known, wanted) -> None:
    """Takes the erasures `known` off the parameters `names`, and puts `wanted` on."""
    for name in names:
        weight, terms = parameters[name], []
        flat = weight.cpu().contiguous().view(-1)  # no copy, but the weight itself, if it is row-major on the CPU
        if weight.dtype not in DTYPES:  # float8, which layerwise casting has made of it since: no arithmetic there
            flat = flat.float()
        _restore(flat, name, known, weight.dtype)
        for one in wanted:
            if name in one.erasure.delta.masks:
                places = one.erasure.delta.places(name)
                one.memory.setdefault(name, flat.index_select(0, places))
                terms.append((places, one.erasure.delta.values[name], one.scale))
        merge(flat, terms)
        made = flat if flat.dtype == weight.dtype else flat.to(weight.dtype).float()
        if terms and not is_finite(made):
            raise SalunError(f"{name} would hold NaN or Inf in {weight.dtype}; choose a smaller scale.")
        if flat.data_ptr() != weight.data_ptr():
            weight.copy_(flat.view(weight.shape))


def _restore(flat, name, erasures, dtype) -> None:
    """Makes `flat`, the parameter `name` of `dtype` with `erasures` on, the base model's again."""
    for one in erasures:
        if name in one.memory:
            flat.index_copy_(0, one.erasure.delta.places(name), one.memory[name].to(dtype).to(flat.dtype))


def base_parameters(module, applied: tuple[Applied, ...]):
    """The parameters as the base model has them, under what is applied; they are made one at a time."""
    for name, weight in own_parameters(module).items():
        touching = [one for one in applied if name in one.memory]
        if touching:
            flat = weight.detach().flatten().to("cpu", copy=True)
            _restore(flat, name, touching, flat.dtype)
            weight = flat.view(weight.shape)
        yield name, weight

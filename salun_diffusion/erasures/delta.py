"""The masked-delta file: what an erasure changes in a model, one bit a weight and one value a changed weight.

The format, `salun-delta` versions 1 and 2
------------------------------------------
A safetensors file about one network of a pipeline, its COMPONENT: in version 1 the denoiser, whether the pipeline calls
it unet or transformer; in version 2 what the metadata name, if they name one. A writer SHOULD take version 1 where that
says all.

For every parameter NAME of the component that may have changed, it MUST hold
    NAME.mask   uint8, ceil(n / 8) bytes: one bit a weight, row-major; bit k (value 2**k) of byte j is weight 8*j + k;
                bits past the last weight MUST be zero
    NAME.delta  one dimension, one value per set bit of NAME.mask, in the same row-major order
and once, for the whole component (its P parameters in the order of their names, changed or not),
    fingerprint float32 [P, 16]: weights number k * (n - 1) // 15, k = 0..15, of each parameter (zeros if n is 0)
and no other tensor. All deltas MUST have one dtype: float32, float16 or bfloat16, or in version 2 int8; then there MUST
also be, where a NAME of at least two dimensions has sizes[0] rows and any other has one,
    NAME.scale  bfloat16 [rows]: a value is, in float32, NAME.delta times the scale of its row. The largest |NAME.delta|
                of a row MUST be 127; where all are 0, or there is none, the scale MUST be 1
No value may be NaN or Inf. At least one bit of one mask MUST be set; a single mask MAY be all zero.

No more than 16 dimensions a parameter, 2**36 weights in all and a header of 4,000,000 bytes: a reader MUST refuse what
claims more before it makes room for it. JSON MUST NOT hold NaN, Infinity or a name twice.

Metadata is text to text. Plain text:
    format      MUST be "salun-delta"
    structure   MUST be the SHA-256 (hex) of Python's json.dumps([[NAME, sizes], ...]), all P parameters sorted by NAME
    component   in version 2, MAY be "unet", "transformer" or "text_encoder", as the pipeline calls it; version 1 has
                none. Without one it is the denoiser. The NAMEs of a text encoder MUST be without the "text_model." that
                some versions of transformers begin them with
    concept, method, scope, base_model, base_revision    MAY be given
Every other value MUST be JSON:
    version     MUST be 1 or 2
    shapes      MUST be {NAME: sizes} of the changed parameters
    density, settings, versions, ...    MAY be given; a reader MUST keep and MAY ignore keys that it does not know

What it means
-------------
    weight = base + scale * delta where the mask is set, computed in float32 and rounded to the parameter's own dtype;
    weight = base, bit for bit, everywhere else.
Several files add up: base + (scale_1 * delta_1 + scale_2 * delta_2 + ...), with one rounding at the end.
A reader that undoes this MUST put back base weights that it kept: subtracting does not restore them.

What makes it exact: training moves the float32 delta d itself (weight = base + d), so a float32 file reproduces the
trained weights bit for bit. For a float16 or bfloat16 file the trainer MUST first replace d by `quantised(dtype)` and
evaluate that, so that base + file = the evaluated weights in every dtype. A delta that overflows in the chosen dtype
is refused, never clipped.

The fingerprint tells the base model from its fine-tunes. Two fingerprints MUST be taken for one model if there are
weights from which both follow by rounding: each as a whole kept in float32, rounded to float16, to bfloat16, or to one
and then the other, save that a parameter with a sample that this rounding could not have produced was kept in float32.
So a fine-tune that moved its weights by 1e-4 of themselves is told apart, from float32 in any dtype; only what is less
than half an ulp of float16 (5e-4) for every sample is lost between a model in float16 and its fine-tune in bfloat16.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import SalunError
from ..files import listed
from ..models.load import COMPONENTS, DENOISERS
from ..tensors import OUR_HEADER_LIMIT, is_finite, raw_bytes, read_safetensors, write_safetensors
from . import int8
from .fingerprint import SAMPLES, Fingerprint
from .format import RESERVED, check_keys, metadata_from_text, metadata_to_text, read_shapes
from .mask import PackedMasks, check_not_empty, count_bits, pack, packed_masks, places

FORMAT, VERSIONS = "salun-delta", (1, 2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Delta:
    """An erasure in memory.

    Attributes:
        masks: parameter name → bool tensor of the parameter's shape, True where a weight changes. Of a delta that was
            read from a file they stay packed, and each is unpacked whenever it is asked for.
        values: parameter name → 1-D tensor, one delta per True, row-major; all float32, float16 or bfloat16.
        fingerprint: of the base model, all the component's parameters (``fingerprint(module.named_parameters())``).
        metadata: concept, method, density, scope, base_model, base_revision, settings, versions …
        component: the network of the pipeline that it changes, of ``COMPONENTS``; None for the denoiser, whatever its
            name.
        int8: whether its values, in memory float32, are of int8 and a scale a row, as its file is to hold them.

    Raises:
        SalunError: masks and values that do not fit, or NaN or Inf.
    """

    masks: Mapping[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    fingerprint: Fingerprint
    metadata: dict
    component: str | None = None
    int8: bool = False

    def __post_init__(self):
        self.check()

    def check(self, what: str = "the delta") -> None:
        """Pass if this is a sound delta.

        Raises:
            SalunError: it is not; the message begins with ``what``.
        """
        if self.component not in (None, *COMPONENTS):
            raise SalunError(f"{what}: its component is {self.component!r}, and must be of {', '.join(COMPONENTS)}.")
        if set(self.masks) != set(self.values):
            odd = listed(set(self.masks) ^ set(self.values))
            raise SalunError(f"{what}: every parameter needs a mask and values, but {odd} has only one of them.")
        dtypes = {value.dtype for value in self.values.values()}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            raise SalunError(
                f"{what}: all values must have one dtype of float32, float16, bfloat16, "
                f"not {listed(str(dtype).removeprefix('torch.') for dtype in dtypes)}."
            )
        is_packed = isinstance(self.masks, PackedMasks)
        masks = self.masks.packed if is_packed else self.masks
        check_not_empty(what, masks)
        for name, mask in masks.items():
            chosen = count_bits(mask) if is_packed else int(torch.count_nonzero(mask))
            dtype = torch.bool if is_packed else mask.dtype
            if dtype != torch.bool or self.values[name].shape != (chosen,):
                raise SalunError(
                    f"{what}: {name} needs a bool mask and one value for each of its {chosen} chosen weights, "
                    f"not a mask of {dtype} and values of shape {tuple(self.values[name].shape)}."
                )
        broken = [name for name, value in self.values.items() if not is_finite(value)]
        if broken:
            raise SalunError(f"{what}: NaN or Inf in {listed(broken)}; lower the learning rate and train again.")

    def quantised(self, dtype: torch.dtype) -> "Delta":
        """The same delta with its values rounded to ``dtype``: what a file of that dtype gives back.

        Raises:
            SalunError: a value overflows there.
        """
        if dtype == torch.int8:
            return replace(self, values={name: int8.unpack(*self._int8(name)) for name in self.values}, int8=True)
        if dtype not in DTYPES:
            raise SalunError(f"A delta is stored in float32, float16, bfloat16 or int8, not {dtype}.")
        values = {name: value.to(dtype) for name, value in self.values.items()}
        broken = [name for name, value in values.items() if not is_finite(value)]
        if broken:
            raise SalunError(
                f"The delta of {listed(broken)} overflows in {str(dtype).removeprefix('torch.')} "
                f"(largest value {torch.finfo(dtype).max:g}); choose bfloat16 or float32."
            )
        return replace(self, values=values, int8=False)

    def _int8(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The values of a parameter as int8, their scales, and each one's row."""
        shape = self.shapes()[name]
        row = int8.rows(self.packed(name), shape)
        return *int8.pack(self.values[name], row, int8.count(shape)), row

    def packed(self, name: str) -> torch.Tensor:
        """The mask of the parameter `name` as files hold it: uint8, one bit a weight, on the CPU."""
        return self.masks.packed[name] if isinstance(self.masks, PackedMasks) else pack(self.masks[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of every parameter that it names."""
        if isinstance(self.masks, PackedMasks):
            return self.masks.shapes
        return {name: tuple(mask.shape) for name, mask in self.masks.items()}

    def dense(self, name: str) -> torch.Tensor:
        """The delta of the parameter `name`: float32, the parameter's shape, zero where nothing changes."""
        dense = torch.zeros(self.shapes()[name])
        dense.view(-1)[places(self.packed(name))] = self.values[name].detach().cpu().float()
        return dense

    def digest(self) -> str:
        """SHA-256 (hex) of what the delta does, whatever file it came from: names, shapes, masks and values."""
        sha = hashlib.sha256()
        if self.component not in (None, *DENOISERS):
            sha.update(self.component.encode())
        for name, shape in sorted(self.shapes().items()):
            value = self.values[name]
            sha.update(json.dumps([name, list(shape), str(value.dtype)]).encode())
            sha.update(raw_bytes(self.packed(name)))
            sha.update(raw_bytes(value))
        return sha.hexdigest()

    def save(self, path, dtype: torch.dtype | None = None) -> None:
        """Write the file, atomically; ``dtype`` rounds the values first (:meth:`quantised`), None keeps theirs.

        Raises:
            SalunError: NaN or Inf, overflow, metadata that the format cannot hold, or a disk that refuses it.
        """
        self.check(f"Cannot write {path}")
        delta = self if dtype is None else self.quantised(dtype)
        tensors = {"fingerprint": self.fingerprint.samples}
        shapes = {name: list(shape) for name, shape in delta.shapes().items()}
        for name in shapes:
            tensors[f"{name}.mask"] = delta.packed(name)
            tensors[f"{name}.delta"] = delta.values[name]
            if delta.int8:
                tensors[f"{name}.delta"], tensors[f"{name}.scale"], _ = delta._int8(name)
        version = 1 if delta.component is None and not delta.int8 else 2
        reserved = dict(
            format=FORMAT,
            version=version,
            component=self.component,
            shapes=shapes,
            structure=self.fingerprint.structure,
        )
        write_safetensors(path, tensors, metadata_to_text(path, self.metadata, **reserved))

    @classmethod
    def load(cls, path) -> "Delta":
        """Read the file, values in their stored dtype, everything on the CPU.

        Raises:
            SalunError: any fault in it.
        """
        tensors, text = read_safetensors(path, OUR_HEADER_LIMIT)
        metadata = metadata_from_text(path, text, FORMAT, *VERSIONS)
        shapes = read_shapes(path, metadata)
        of_int8 = metadata["version"] == 2 and any(tensors[name].dtype == torch.int8 for name in tensors)
        kinds = ("mask", "delta", *(("scale",) if of_int8 else ()))
        check_keys(path, tensors, {"fingerprint"} | {f"{name}.{kind}" for name in shapes for kind in kinds})
        samples, structure = tensors["fingerprint"], metadata.get("structure")
        if samples.dtype != torch.float32 or samples.shape[1:] != (SAMPLES,) or structure is None:
            raise SalunError(f"{path} is damaged: its fingerprint of the base model is not float32 [P, {SAMPLES}].")
        if not re.fullmatch("[0-9a-f]{64}", structure):
            raise SalunError(f"{path} is damaged: its 'structure' is no SHA-256 of 64 hex digits.")
        if len(samples) < len(shapes):
            raise SalunError(
                f"{path} is damaged: its fingerprint has {len(samples)} rows, fewer than the {len(shapes)} parameters "
                "that it changes."
            )
        masks = packed_masks(path, tensors, shapes)
        values = {name: tensors[f"{name}.delta"] for name in shapes}
        if of_int8:
            for name, shape in masks.shapes.items():
                row, scales = int8.rows(masks.packed[name], shape), tensors[f"{name}.scale"]
                int8.check(path, name, values[name], scales, row, int8.count(shape))
                values[name] = int8.unpack(values[name], scales, row)
        component = metadata.get("component") if metadata["version"] == 2 else None
        if component not in (None, *COMPONENTS):
            raise SalunError(
                f"{path} changes the component {component!r} of a pipeline, where {', '.join(COMPONENTS)} are known; "
                "update salun_diffusion."
            )
        metadata = {key: value for key, value in metadata.items() if key not in RESERVED}
        try:
            return cls(masks, values, Fingerprint(structure, samples), metadata, component, of_int8)
        except SalunError as error:
            raise SalunError(f"{path} is damaged: {error}") from error

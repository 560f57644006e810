"""Low-rank adapters: the second kind of erasure, in a file that ``pipe.load_lora_weights`` opens too.

The format, `salun-lora` version 1
----------------------------------
The file that a pipeline's ``save_lora_weights`` writes: a safetensors file which MUST hold, for each layer NAME of the
denoiser that is adapted, of rank r, and no other tensor (PART is ``unet`` or ``transformer``),
    PART.NAME.lora_A.weight   [r, in], or [r, in, height, width] for a convolution
    PART.NAME.lora_B.weight   [out, r], or [out, r, 1, 1]
all in one dtype: float32, float16 or bfloat16. Its metadata MUST have
    lora_adapter_metadata     JSON: what peft's LoraConfig is made of, its names beginning with "PART."; alpha MUST be r
                              in every layer
and, as a masked delta's (``delta.py``), what says where the adapter belongs:
    format      MUST be "salun-lora"
    structure   MUST be the SHA-256 of the denoiser's names and shapes
and as JSON
    version     MUST be 1
    fingerprint MUST be base64 of the base model's fingerprint, float32 [P, 16], little-endian: a tensor of that name
                would keep others from opening the file
beside concept, method, scope, base_model … as there.

What it means: a layer's output is base(x) + scale * B(A(x)), the sum of all adapters that are active. No weight of the
base model is changed.
"""

import base64
import hashlib
import json
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..errors import SalunError
from ..files import listed
from ..models.load import denoiser
from ..tensors import OUR_HEADER_LIMIT, raw_bytes, read_safetensors, write_safetensors
from .base import Erasure
from .delta import DTYPES
from .fingerprint import SAMPLES, Fingerprint, check_have_values, fingerprint, matches
from .format import RESERVED, metadata_from_text, metadata_to_text
from .live import check_editable, own_parameters
from .weights import base_parameters

FORMAT, VERSION = "salun-lora", 1
CONFIG = "lora_adapter_metadata"  # diffusers' name
KEPT = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "peft_type")  # any version of peft knows
KEY = re.compile(r"(unet|transformer)\.(.+)\.lora_([AB])\.weight")


def check_adaptable(pipe, what: str) -> None:
    """Pass if peft can put adapters onto the pipeline's denoiser and diffusers save and load them.

    Raises:
        SalunError: it cannot; the message begins with ``what``.
    """
    if find_spec("peft") is None:
        raise SalunError(f"{what} needs peft: pip install 'salun-diffusion[export]'.")
    if not hasattr(pipe, "save_lora_weights") or not hasattr(denoiser(pipe), "load_lora_adapter"):
        raise SalunError(f"{what} needs a pipeline that takes LoRA, which {type(pipe).__name__} does not.")


def lora_config(ranks: dict[str, int]):
    """The config for peft of an adapter with these ranks by layer, alpha = rank everywhere: B(A(x)) as it is."""
    from peft import LoraConfig

    rank = max(ranks.values())
    pattern = {f"^{name}$": one for name, one in ranks.items() if one != rank}
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(ranks), init_lora_weights="gaussian", rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )  # fmt: skip


def save_adapter(path, pipe, state: dict[str, torch.Tensor], base: Fingerprint, about: dict) -> None:
    """Write the file, atomically.

    Args:
        path: the file.
        pipe: the pipeline that the adapter is for.
        state: ``NAME.lora_A.weight`` … → values, as ``peft.get_peft_model_state_dict`` gives them; alpha = rank.
        base: the base model's fingerprint.
        about: further metadata.

    Raises:
        SalunError: metadata that the format cannot hold, or a disk that refuses it.
    """
    path, part = Path(path), "unet" if hasattr(pipe, "unet") else "transformer"
    ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in state.items() if ".lora_A." in name}
    config = {key: value for key, value in lora_config(ranks).to_dict().items() if key in KEPT}
    with tempfile.TemporaryDirectory() as folder:
        type(pipe).save_lora_weights(
            folder, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config},
        )  # fmt: skip
        tensors, text = read_safetensors(next(Path(folder).glob("*.safetensors")))
    written = json.loads(text[CONFIG])
    written[f"{part}.target_modules"] = sorted(written[f"{part}.target_modules"])  # a set, in any order
    samples = base.samples.numpy().astype("<f4").tobytes()
    reserved = {"format": FORMAT, "version": VERSION, "structure": base.structure, CONFIG: written,
                "fingerprint": base64.b64encode(samples).decode()}  # fmt: skip
    write_safetensors(path, tensors, metadata_to_text(path, about, **reserved))


class LowRankAdapter(Erasure):
    """An adapter that peft puts beside the denoiser's layers, under a name of its own.

    Attributes:
        part: the pipeline's part that it is for, "unet" or "transformer".
        factors: layer → (A, B), as the file has them.
        fingerprint: the base model's.
    """

    FORMAT = FORMAT

    def __init__(self, part: str, factors: dict, base: Fingerprint, metadata: dict):
        self.part, self.factors, self.fingerprint, self.metadata = part, factors, base, metadata

    @classmethod
    def load(cls, path):
        tensors, text = read_safetensors(path, OUR_HEADER_LIMIT)
        metadata = metadata_from_text(path, text, FORMAT, VERSION)
        found = {name: KEY.fullmatch(name) for name in tensors}
        if odd := [name for name, match in found.items() if match is None]:
            raise SalunError(f"{path} is damaged: {listed(odd)} is no factor of a layer.")
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        for name, match in found.items():
            pairs.setdefault(match[2], {})[match[3]] = tensors[name]
        odd = [name for name, pair in pairs.items() if not _is_pair(pair)]
        parts, dtypes = {match[1] for match in found.values()}, {value.dtype for value in tensors.values()}
        if odd or len(parts) != 1 or len(dtypes) != 1 or not dtypes <= {*DTYPES}:
            what = f" (see {listed(odd)})" if odd else ""
            raise SalunError(f"{path} is damaged: its factors do not fit together{what}.")
        part, factors = parts.pop(), {name: (pair["A"], pair["B"]) for name, pair in sorted(pairs.items())}
        if not _alpha_is_rank(metadata.pop(CONFIG, None), part, factors):
            raise SalunError(f"{path} is damaged: its {CONFIG} is not that of its factors, with alpha = rank.")
        base = _fingerprint(path, metadata)
        return cls(part, factors, base, {key: value for key, value in metadata.items() if key not in RESERVED})

    def digest(self):
        sha = hashlib.sha256()
        for name, pair in self.factors.items():
            for factor in pair:
                sha.update(json.dumps([name, list(factor.shape), str(factor.dtype)]).encode() + raw_bytes(factor))
        return sha.hexdigest()

    def as_peft(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The state dict and the config that diffusers' ``load_lora_adapter`` takes."""
        state = {}
        for name, (down, up) in self.factors.items():
            state |= {f"{self.part}.{name}.lora_A.weight": down, f"{self.part}.{name}.lora_B.weight": up}
        config = lora_config({name: len(down) for name, (down, _) in self.factors.items()}).to_dict()
        return state, {f"{self.part}.{key}": value for key, value in config.items() if key in KEPT}

    def describe(self):
        return {"weights": sum(factor.numel() for pair in self.factors.values() for factor in pair)}

    def acts(self, applied):
        return applied.scale != 0 and any(down.any() and up.any() for down, up in self.factors.values())

    def check_fit(self, pipe, path, check_base, applied):
        check_adaptable(pipe, f"{path} is a low-rank adapter and")
        module = denoiser(pipe)
        parameters = own_parameters(module)
        base = f" (base model {self.metadata['base_model']})" if self.metadata.get("base_model") else ""
        for name, (down, up) in self.factors.items():
            weight = parameters.get(f"{name}.weight")
            wanted = (len(up), *down.shape[1:])
            if not hasattr(pipe, self.part) or weight is None or tuple(weight.shape) != wanted:
                here = "is not there" if weight is None else f"has a weight of shape {tuple(weight.shape)}"
                raise SalunError(
                    f"{path} was made for another base model: {self.part}.{name} has a weight of shape {wanted} there "
                    f"and {here} here; load the model that it was made for{base}."
                )
        check_editable(pipe)
        check_have_values(parameters)
        if check_base:
            found = fingerprint(base_parameters(module, applied))
            if not matches(self.fingerprint, found):
                raise SalunError(
                    f"{path} was made for another base model{base}: fingerprint {self.fingerprint.digest()} there and "
                    f"{found.digest()} here; load that model, or pass check_base=False to apply it to this one all "
                    "the same."
                )

    @classmethod
    def change(cls, pipe, before, after):
        """By peft alone: an adapter is put on or deleted, and the scale is its strength. Others' stay as they are."""
        check_editable(pipe)
        if fused := [one.name for one in before if _merged(pipe, one)]:
            raise SalunError(
                f"The erasure {listed(fused)} was fused with the weights by fuse_lora(): call pipe.unfuse_lora() first."
            )
        try:
            _bring(pipe, before, after)
        except BaseException:
            _bring(pipe, after, before)
            raise

    @classmethod
    def intact(cls, pipe, one, applied):
        layers = _layers(denoiser(pipe))
        if any(parameter.is_meta for parameter in denoiser(pipe).parameters()):
            return None
        if _merged(pipe, one):
            return False
        for name, pair in one.erasure.factors.items():
            layer, adapter = layers.get(name), _adapter(one)
            if layer is None or adapter not in layer.lora_A or adapter not in layer.active_adapters:
                return False
            if layer.disable_adapters or layer.scaling[adapter] != one.scale:
                return False
            there = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if not all(torch.equal(a.cpu(), b.to(a.dtype)) for a, b in zip(there, pair, strict=True)):
                return False
        return True

    @classmethod
    @torch.no_grad()
    def fuse(cls, pipe, applied):
        network = denoiser(pipe)
        check_editable(pipe)
        check_have_values(own_parameters(network))
        layers = _layers(network)
        for one in applied:
            for name in one.erasure.factors:
                weight, change = layers[name].get_base_layer().weight, layers[name].get_delta_weight(_adapter(one))
                weight.copy_(weight.float() + change.float())
        _bring(pipe, applied, ())


def _is_pair(pair: dict[str, torch.Tensor]) -> bool:
    """Whether the two factors are those of one linear layer or convolution."""
    if pair.keys() != {"A", "B"}:
        return False
    down, up = pair["A"], pair["B"]
    return down.ndim in (2, 4) and len(down) > 0 and up.shape[1:] == (len(down), *(1,) * (down.ndim - 2))


def _alpha_is_rank(config, part: str, factors: dict) -> bool:
    """Whether diffusers, which goes by ``config``, does with the ``factors`` what this file's format says."""
    if not isinstance(config, dict):
        return False
    ranks = {name: len(down) for name, (down, _) in factors.items()}
    most, pattern = config.get(f"{part}.r"), config.get(f"{part}.rank_pattern") or {}
    return (
        sorted(config.get(f"{part}.target_modules") or []) == sorted(ranks)
        and config.get(f"{part}.lora_alpha") == most
        and (config.get(f"{part}.alpha_pattern") or {}) == pattern
        and ranks == {name: pattern.get(f"^{name}$", most) for name in ranks}
    )


def _fingerprint(path, metadata: dict) -> Fingerprint:
    try:
        samples = np.frombuffer(base64.b64decode(metadata.pop("fingerprint"), validate=True), "<f4")
        samples = torch.from_numpy(samples.astype(np.float32)).view(-1, SAMPLES)
        if re.fullmatch("[0-9a-f]{64}", metadata["structure"]) and samples.isfinite().all():
            return Fingerprint(metadata["structure"], samples)
    except (KeyError, ValueError, TypeError, RuntimeError):
        pass
    raise SalunError(f"{path} is damaged: its metadata hold no fingerprint of the base model, or a damaged one.")


def _adapter(one) -> str:
    """What peft calls it: no dots, and no other adapter's name."""
    return re.sub(r"\W+", "_", one.name) + "_" + one.digest[:8]


def _layers(network) -> dict[str, torch.nn.Module]:
    """The layers that peft has wrapped for LoRA, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}


def _merged(pipe, one) -> bool:
    layers = _layers(denoiser(pipe)).values()
    return any(_adapter(one) in layer.merged_adapters for layer in layers)


def _bring(pipe, before, after) -> None:
    """From what ``before`` names to what ``after`` does, or from anything between."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = denoiser(pipe)
    there = {*getattr(network, "peft_config", {})}
    own = {_adapter(one): one for one in (*before, *after)}
    wanted = {_adapter(one): one for one in after}
    active = network.active_adapters() if there else []
    others = [name for name in ([active] if isinstance(active, str) else active) if name not in own]
    if there <= own.keys() and not wanted:
        if there:
            network.unload_lora()  # the layers themselves again
        return
    for name in own.keys() - wanted.keys():
        if name in there:
            network.delete_adapters(name)
    for name, one in wanted.items():
        if name not in there:
            state, config = one.erasure.as_peft()
            network.load_lora_adapter(
                state, prefix=one.erasure.part, adapter_name=name, metadata=config, _pipeline=pipe
            )
    for part in network.modules():
        if isinstance(part, BaseTunerLayer):
            part.set_adapter([*others, *wanted], inference_mode=True)
    for layer in _layers(network).values():
        for name, one in wanted.items():
            if name in layer.lora_A:
                layer.set_scale(name, one.scale)

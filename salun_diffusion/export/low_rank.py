"""``lora``: the nearest low-rank adapter of each layer (by singular values), made and written by peft and diffusers.

A delta W of a layer becomes B·A with rank r, the best one in the sum of squares (Eckart and Young). A convolution's
delta is taken as a matrix of its output channels by all else. What a low-rank adapter cannot hold (norms, biases) is
left out and named. The factors have the delta's own number format.
"""

import os
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from ..erasures.adapter import config_of, save_adapter
from ..erasures.locate import ADAPTER_NAME
from ..erasures.lora import check_adaptable
from ..errors import SalunError
from ..models.load import denoiser

RANK = 32


@torch.no_grad()
def write(request):
    """Write the adapter's folder, or its file alone if the output is named '….safetensors'."""
    check_adaptable(request.pipe, "--format lora")
    from peft import LoraConfig, get_peft_model_state_dict

    delta, network, options = request.delta, denoiser(request.pipe), request.options
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {name: layer for name, layer in network.named_modules()
              if isinstance(layer, kinds) and f"{name}.weight" in delta.masks}  # fmt: skip
    left_out = sorted(set(delta.masks) - {f"{name}.weight" for name in layers})
    if not layers:
        raise SalunError("The erasure changes norms and biases alone, which no low-rank adapter can hold.")
    factors = {}
    for name in tqdm(layers, desc="decomposing", unit="layer", disable=None):
        factors[name] = torch.linalg.svd(delta.dense(f"{name}.weight").flatten(1), full_matrices=False)
    rank = options.rank or (RANK if options.error is None else _smallest_rank(factors, options.error))
    ranks = {name: min(rank, len(values)) for name, (_, values, _) in factors.items()}
    network.add_adapter(LoraConfig(**config_of(ranks)), "export")
    for name, (left, values, right) in factors.items():
        layer, r, root = network.get_submodule(name), ranks[name], values[: ranks[name]].sqrt()
        down, up = layer.lora_A["export"].weight, layer.lora_B["export"].weight
        down.copy_((root[:, None] * right[:r]).view(down.shape))
        up.copy_((left[:, :r] * root).view(up.shape))
    dtype = next(iter(delta.values.values())).dtype
    state = {name: value.to(dtype) for name, value in get_peft_model_state_dict(network, adapter_name="export").items()}
    network.unload_lora()
    _save(request, state, rank)
    return rank, left_out


def _smallest_rank(factors: dict, error: float) -> int:
    """The smallest rank, the same for all layers, that leaves at most ``error`` of the change (root of squares)."""
    squares = [values.double().square() for _, values, _ in factors.values()]
    total = float(sum(part.sum() for part in squares))
    for rank in range(1, max(map(len, squares)) + 1):
        if float(sum(part[rank:].sum() for part in squares)) <= error**2 * total:
            return rank
    return max(map(len, squares))


def _save(request, state: dict, rank: int) -> None:
    from diffusers.utils import convert_state_dict_to_kohya

    delta = request.delta
    output = request.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary, "adapter")
        folder.mkdir()
        if request.options.names == "kohya":
            from safetensors.torch import save_file

            plain = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
            save_file(
                {key: value.contiguous() for key, value in plain.items()}, folder / ADAPTER_NAME, request.metadata
            )
        else:
            about = {key: value for key, value in delta.metadata.items() if key not in ("density", "settings")}
            about |= {"rank": rank, "converted_from": delta.digest()}
            save_adapter(folder / ADAPTER_NAME, request.pipe, state, delta.fingerprint, about)
        os.replace(folder / ADAPTER_NAME if output.suffix == ".safetensors" else folder, output)


def read_back(request, pipe) -> None:
    """As a user of diffusers does, and fused, so that the weights themselves can be compared."""
    output = request.output
    if output.is_dir():
        pipe.load_lora_weights(str(output))
    else:
        pipe.load_lora_weights(str(output.parent), weight_name=output.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()

"""Loading a masked delta in plain steps, a parameter at a time: what `load_erasure` is measured against, and its twin
in the tests. It makes the same checks and ends with the same bits.

Masks are unpacked to a byte a weight, the originals of the changed weights are gathered, and all is written in place;
taking it off first computes again what was written, and compares.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from salun_diffusion.erasures.fingerprint import Fingerprint, fingerprint, matches
from salun_diffusion.errors import SalunError
from salun_diffusion.tensors import check_layout, raw_bytes

CHUNK = 1 << 20  # weights read or written at once


class SlowErasure:
    """The erasure in the file at ``path``; :meth:`load` puts it onto a denoiser, :meth:`unload` takes it off."""

    def __init__(self, path):
        check_layout(Path(path))
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            about = file.metadata()
        if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
            raise SalunError(f"{path} holds NaN or Inf in {broken}.")
        self.base = Fingerprint(about["structure"], tensors["fingerprint"])
        self.masks, self.values = {}, {}
        for name, shape in json.loads(about["shapes"]).items():
            bits = np.unpackbits(tensors[f"{name}.mask"].numpy(), bitorder="little")
            count = int(np.prod(shape, dtype=int))
            mask, values = torch.from_numpy(bits[:count]).view(torch.bool).reshape(shape), tensors[f"{name}.delta"]
            if bits[count:].any() or int(torch.count_nonzero(mask)) != len(values) or not _is_finite(values):
                raise SalunError(f"{path} is damaged in {name}.")
            self.masks[name], self.values[name] = mask, values
        if not any(mask.any() for mask in self.masks.values()):
            raise SalunError(f"{path} changes nothing.")
        self.digest = self._digest()

    def _digest(self) -> str:
        sha = hashlib.sha256()
        for name in sorted(self.masks):
            mask, value = self.masks[name], self.values[name]
            sha.update(json.dumps([name, list(mask.shape), str(value.dtype)]).encode())
            sha.update(raw_bytes(torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))))
            sha.update(raw_bytes(value))
        return sha.hexdigest()

    @torch.no_grad()
    def load(self, module, scale: float = 1.0) -> None:
        """Onto ``module``, whose weights lie row-major."""
        if not matches(self.base, fingerprint(module.named_parameters())):
            raise SalunError("That is another base model.")
        self.originals, self.scale = {}, scale
        for name, mask in self.masks.items():
            weight = module.get_parameter(name).view(-1)
            self.originals[name] = weight.index_select(0, _places(mask, weight.device))
            self._add(name, weight)
            if not _is_finite(weight):
                raise SalunError(f"{name} would hold NaN or Inf.")

    @torch.no_grad()
    def unload(self, module) -> None:
        """Off ``module``, where what was written is found unaltered."""
        for name, mask in self.masks.items():
            weight = module.get_parameter(name).view(-1)
            places, written = _places(mask, weight.device), torch.zeros(weight.shape, device=weight.device)
            written.index_copy_(0, places, self.originals[name].float())
            self._add(name, written)
            found, wanted = weight.float().index_select(0, places), written.to(weight.dtype).float()
            if not torch.equal(wanted.index_select(0, places), found):
                raise SalunError(f"{name} was written over.")
        for name, mask in self.masks.items():
            weight = module.get_parameter(name).view(-1)
            weight.index_copy_(0, _places(mask, weight.device), self.originals[name])

    def _add(self, name, weight) -> None:
        places, values = _places(self.masks[name], weight.device), self.values[name].to(weight.device)
        for where, value in zip(places.split(CHUNK), values.split(CHUNK), strict=True):
            changed = weight.index_select(0, where).float() + value.float() * self.scale
            weight.index_copy_(0, where, changed.to(weight.dtype))


def _places(mask, device) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy())).to(device)


def _is_finite(values) -> bool:
    return values.numel() == 0 or bool(torch.stack(values.aminmax()).isfinite().all())

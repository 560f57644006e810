"""The change of the weights that may move, and of nothing else: what a training or a closed form makes.

The trained quantity is the change itself: ``θ = θ0 + d`` with one fp32 value of ``d`` per masked weight, packed in
row-major order as the masked-delta file stores it. Weights outside the mask are never written, so they end
bit-identical to the base whatever moves ``d``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from ..erasures.delta import Delta
from ..erasures.fingerprint import Fingerprint
from ..erasures.mask import pack, places

# Weights gathered or put back at once: buffers that fit a cache are used again, and several times faster than ones of a
# whole parameter's size, whose memory the system makes anew each time.
CHUNK = 1 << 20


class MaskedChange:
    """Packed fp32 changes of the masked weights of some parameters, and the base model's values of those weights.

    Args:
        parameters: by name; those whose mask is all zero stop requiring gradients.
        masks: bool, of the parameters' shapes.
        keep_places: hold the places of the masked weights, 4 bytes each, rather than find them from one bit a weight
            whenever they are needed. By default on a CPU alone, where memory is cheap and time is not.
        component: whose parameters they are (``models.load.COMPONENTS``); None for the denoiser.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        masks: dict[str, torch.Tensor],
        keep_places: bool | None = None,
        component: str | None = None,
    ):
        self.component = component
        self.parameters = {name: parameters[name] for name, mask in masks.items() if mask.any()}
        for name, parameter in parameters.items():  # where nothing may move, no gradient is made
            parameter.requires_grad_(name in self.parameters)
        self.masks = {name: masks[name].cpu() for name in self.parameters}
        if keep_places is None:
            keep_places = all(p.device.type == "cpu" for p in parameters.values())
        self.keep_places = keep_places
        packed = {name: pack(self.masks[name]).to(p.device) for name, p in self.parameters.items()}
        self.where = {name: places(bits).int() if keep_places else bits for name, bits in packed.items()}
        self.base = {name: p.detach().flatten()[self._places(name)] for name, p in self.parameters.items()}
        self.values = {name: nn.Parameter(torch.zeros_like(b, dtype=torch.float32)) for name, b in self.base.items()}
        self.hooks: list = []

    def pack_gradients(self) -> None:
        """From now until :meth:`close`, a parameter's dense gradient is packed into its value's ``grad`` and freed as
        soon as backward has made it (a post-accumulate hook), so that only one dense gradient exists at a time.
        """
        self.gradients = {name: torch.empty_like(value) for name, value in self.values.items()}
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._pack(name, p))
            for name, p in self.parameters.items()
        ]

    def _places(self, name: str) -> torch.Tensor:
        """Where the masked weights lie, row-major. Gathering by places is, on a CPU, some thirty times faster than by a
        mask.
        """
        return self.where[name] if self.keep_places else places(self.where[name])

    @torch.no_grad()
    def _pack(self, name: str, parameter: nn.Parameter) -> None:
        value, dense = self.values[name], parameter.grad.flatten()
        first = value.grad is None
        if first:  # else it holds an earlier batch's, or what a penalty on the change itself has put there
            value.grad = self.gradients[name]
        for where, packed in zip(self._places(name).split(CHUNK), value.grad.split(CHUNK), strict=True):
            part = dense.index_select(0, where)
            packed.copy_(part) if first else packed.add_(part)
        parameter.grad = None

    def deltas(self) -> dict[str, torch.Tensor]:
        """By parameter, how far its masked weights are from the base model's, fp32, packed row-major."""
        return dict(self.values)

    def packed(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        """What ``dense``, of the parameter's shape, holds for the weights that may move."""
        return dense.to(self.values[name].device).flatten()[self._places(name)]

    @torch.no_grad()
    def set(self, weights: dict[str, torch.Tensor]) -> None:
        """Make the weights that may move those of ``weights``, by name, in fp32."""
        for name, value in self.values.items():
            value.copy_(self.packed(name, weights[name]) - self.base[name].float())
        self.write()

    def reduce(self, accelerator: Accelerator) -> None:
        """Replace each packed gradient by the processes' mean: dense gradients never travel."""
        if accelerator.num_processes > 1:
            for value in self.values.values():
                value.grad = accelerator.reduce(value.grad, "mean")

    def clear_gradients(self) -> None:
        """Drop the packed gradients, and a dense one that an earlier backward or one that ran out of memory left: the
        next would be added to it.
        """
        for name, value in self.values.items():
            value.grad = self.parameters[name].grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Put ``θ0 + d``, summed in fp32 and rounded to the parameter's dtype, where the mask is set."""
        for name in self.parameters:
            self._put(name, self.values[name])

    def _put(self, name: str, change: torch.Tensor | None) -> None:
        parameter, base, where = self.parameters[name], self.base[name], self._places(name)
        for start in range(0, len(base), CHUNK):
            part = slice(start, start + CHUNK)
            packed = base[part] if change is None else (base[part].float() + change[part]).to(parameter.dtype)
            parameter.view(-1).index_copy_(0, where[part].long(), packed)

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Within it, the network has the base model's weights."""
        with torch.no_grad():
            for name in self.parameters:
                self._put(name, None)
        try:
            yield
        finally:  # also where memory ran out: the step is then tried again, and not with the base model's weights
            self.write()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the network the base model's weights back, bit for bit."""
        for name in self.parameters:
            self._put(name, None)

    def snap(self, dtype: torch.dtype) -> None:
        """Round the deltas to the dtype they will be saved in, and the weights with them."""
        for value in self.values.values():
            value.data = value.data.to(dtype).float()
        self.write()

    def save(self, path, base: Fingerprint, about: dict, dtype: torch.dtype) -> None:
        """Write the change as a masked delta; ``about`` is what its metadata say."""
        values = {name: value.detach().cpu() for name, value in self.values.items()}
        Delta(self.masks, values, base, about, self.component).save(path, dtype)

    def close(self) -> None:
        """Stop packing gradients."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

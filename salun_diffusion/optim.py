"""Adam on the weights that may move, and on nothing else.

The trained quantity is the change itself: ``θ = θ0 + d`` with one fp32 value of ``d`` per masked weight, packed in
row-major order as the masked-delta file stores it. Adam's moments are as long as ``d``; weights outside the mask are
never written, so they end bit-identical to the base whatever the optimizer does.
"""

import torch
from accelerate import Accelerator
from torch import nn


class MaskedDeltas:
    """Packed fp32 deltas of the masked weights of some parameters, and the Adam that trains them.

    While it is active, a parameter's dense gradient is packed and freed as soon as backward has made it (a
    post-accumulate hook), so that only one dense gradient exists at a time.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], masks: dict[str, torch.Tensor], learning_rate: float):
        self.parameters = {name: parameters[name] for name, mask in masks.items() if mask.any()}
        self.masks = {name: masks[name].to(p.device) for name, p in self.parameters.items()}
        self.base = {name: p.detach()[self.masks[name]] for name, p in self.parameters.items()}
        self.values = {name: nn.Parameter(torch.zeros_like(b, dtype=torch.float32)) for name, b in self.base.items()}
        self.adam = torch.optim.Adam(self.values.values(), lr=learning_rate, fused=True)
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._pack(name, p))
            for name, p in self.parameters.items()
        ]

    def _pack(self, name: str, parameter: nn.Parameter) -> None:
        packed, value = parameter.grad[self.masks[name]].float(), self.values[name]
        value.grad = packed if value.grad is None else value.grad.add_(packed)
        parameter.grad = None

    def step(self, accelerator: Accelerator) -> None:
        """One Adam step (Kingma & Ba 2015) on the processes' mean gradient; then the masked weights become ``θ0 + d``.
        Only packed gradients travel between processes."""
        for value in self.values.values():
            value.grad = accelerator.reduce(value.grad, "mean")
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Put ``θ0 + d``, summed in fp32 and rounded to the parameter's dtype, where the mask is set."""
        for name, parameter in self.parameters.items():
            parameter[self.masks[name]] = (self.base[name].float() + self.values[name]).to(parameter.dtype)

    def snap(self, dtype: torch.dtype) -> None:
        """Round the deltas to the dtype they will be saved in, and the weights with them."""
        for value in self.values.values():
            value.data = value.data.to(dtype).float()
        self.write()

    def close(self) -> None:
        """Stop packing gradients."""
        for hook in self.hooks:
            hook.remove()

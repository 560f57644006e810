"""Adam on a packed change: its moments are as long as the change, whatever the network's size."""

import torch
from accelerate import Accelerator

from .change import MaskedChange


class PackedAdam:
    """torch's Adam over the values of a :class:`MaskedChange`, whose gradients it lets be packed, and over what a
    method trains beside it.

    Args:
        change: what it moves.
        learning_rate: Adam's.
        own: the method's own parameters, by names that the change has not, fp32.
        own_rate: Adam's learning rate for these.
    """

    def __init__(self, change: MaskedChange, learning_rate: float, own: dict[str, torch.nn.Parameter], own_rate: float):
        self.change, self.own, self.trained = change, own, {**change.values, **own}
        change.pack_gradients()
        groups = [{"params": list(change.values.values()), "lr": learning_rate}]
        groups += [{"params": list(own.values()), "lr": own_rate}] if own else []
        self.adam = torch.optim.Adam(groups, fused=True)

    def clear_gradients(self) -> None:
        """Drop what an earlier backward left."""
        self.change.clear_gradients()
        for value in self.own.values():
            value.grad = None

    def reduce(self, accelerator: Accelerator) -> None:
        """Replace each gradient by the processes' mean."""
        self.change.reduce(accelerator)
        if accelerator.num_processes > 1:
            for value in self.own.values():
                value.grad = accelerator.reduce(value.grad, "mean")

    def state(self) -> dict[str, torch.Tensor]:
        """What training changes: ``value.NAME``, ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, fp32 and packed."""
        tensors = {f"value.{name}": value.detach() for name, value in self.trained.items()}
        for name, value in self.trained.items():
            # Adam has no moments before its first step, which fp16's first gradients may overflow
            moments = self.adam.state.get(value) or {}
            tensors |= {f"{key}.{name}": moments.get(key, torch.zeros_like(value)) for key in ("exp_avg", "exp_avg_sq")}
        return tensors

    @property
    def updates(self) -> int:
        """Steps that Adam took: fewer than the training's where fp16 gradients overflowed."""
        return int(next(iter(self.adam.state.values()))["step"]) if self.adam.state else 0

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], updates: int) -> None:
        """Restore :meth:`state` after ``updates`` steps of Adam, and the weights with it."""
        for name, value in self.trained.items():
            value.copy_(tensors[f"value.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(value.device) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[value] = {"step": torch.tensor(float(updates), device=value.device)} | moments
        self.change.write()

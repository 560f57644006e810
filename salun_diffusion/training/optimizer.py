"""Adam on a packed change: its moments are as long as the change, whatever the network's size."""

import torch

from .change import MaskedChange


class PackedAdam:
    """torch's Adam over the values of a :class:`MaskedChange`, whose gradients it lets be packed.

    Args:
        change: what it moves.
        learning_rate: Adam's.
    """

    def __init__(self, change: MaskedChange, learning_rate: float):
        self.change = change
        change.pack_gradients()
        self.adam = torch.optim.Adam(change.values.values(), lr=learning_rate, fused=True)

    def state(self) -> dict[str, torch.Tensor]:
        """What training changes: ``value.NAME``, ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, fp32 and packed."""
        tensors = {f"value.{name}": value.detach() for name, value in self.change.values.items()}
        for name, value in self.change.values.items():
            moments = self.adam.state[value]
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors

    @property
    def updates(self) -> int:
        """Steps that Adam took: fewer than the training's where fp16 gradients overflowed."""
        return int(next(iter(self.adam.state.values()))["step"]) if self.adam.state else 0

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], updates: int) -> None:
        """Restore :meth:`state` after ``updates`` steps of Adam, and the weights with it."""
        for name, value in self.change.values.items():
            value.copy_(tensors[f"value.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(value.device) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[value] = {"step": torch.tensor(float(updates), device=value.device)} | moments
        self.change.write()

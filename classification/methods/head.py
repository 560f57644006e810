"""Three ways to forget a class in the last layer alone ("Beyond the Shadow of Bias", 2605.08730), from notes on their
code: BiasShift lowers the bias, TS-BGRM and LB-HR train the layer. All of the network before it stays as it is, so its
features still tell the forgotten class: they are there to show what the head-bias measures find.

The features come from the network in eval mode: the published code leaves it in train mode, which moves batch-norm's
running statistics.
"""

import torch
import torch.nn.functional as F
from torch import nn

from salun_diffusion.errors import SalunError

from .boundary import last_layer
from .task import Task

REPAIR_EPOCHS, REPAIR_RATE = 1, 0.001  # of TS-BGRM's second stage, as published
OTHERS_BIAS = 0.1  # by which TS-BGRM's first stage scales the gradient of the kept classes' biases; our choice
DECAY_EVERY, DECAY = 2, 0.5  # of LB-HR's rate, as published
LEAST_BIAS = -0.01  # LB-HR's b_min, as published


def bias_shift(task: Task) -> None:
    """Lower b by α for the forgotten classes. The released default, −0.01, *raises* the bias; here α lowers it."""
    head, _ = _head(task)
    with torch.no_grad():
        head.bias[task.forgotten] -= task.settings.alpha
    task.model.eval()


def ts_bgrm(task: Task) -> None:
    """Two stages with AdamW: −CE(forget), the gradient of the other classes' biases scaled by ``OTHERS_BIAS``; then one
    epoch of CE(retain).
    """
    head, features = _head(task)
    kept = torch.ones(task.classes, dtype=torch.bool, device=head.bias.device)
    kept[task.forgotten] = False
    optimizer = _adamw(task, head, task.settings.learning_rate)
    for _ in range(task.settings.epochs):
        for pixels, labels in task.batches(task.forget):
            optimizer.zero_grad()
            (-F.cross_entropy(head(features(pixels)), labels)).backward()
            head.bias.grad[kept] *= OTHERS_BIAS
            optimizer.step()
    optimizer = _adamw(task, head, REPAIR_RATE)
    for _ in range(REPAIR_EPOCHS):
        for pixels, labels in task.batches(task.retain):
            optimizer.zero_grad()
            F.cross_entropy(head(features(pixels)), labels).backward()
            optimizer.step()
    task.model.eval()


def lb_hr(task: Task) -> None:
    """CE(retain) + α Σ_c max(0, b_min − b_c)² with SGD, whose rate halves every second epoch."""
    head, features = _head(task)
    s = task.settings
    optimizer = torch.optim.SGD(head.parameters(), s.learning_rate, s.momentum, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, DECAY_EVERY, DECAY)
    for _ in range(s.epochs):
        for pixels, labels in task.batches(task.retain):
            optimizer.zero_grad()
            floor = (LEAST_BIAS - head.bias).clamp(min=0).square().sum()
            (F.cross_entropy(head(features(pixels)), labels) + s.alpha * floor).backward()
            optimizer.step()
        schedule.step()
    task.model.eval()


def _adamw(task: Task, head: nn.Linear, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(head.parameters(), rate, weight_decay=task.settings.weight_decay)


def _head(task: Task):
    """The last layer, and pictures → what it is given.

    Raises:
        SalunError: the model ends in another layer, or one without bias.
    """
    _, head = last_layer(task.model, task.classes)
    if head.bias is None:
        raise SalunError("This method changes the last layer's biases, and the model's last layer has none.")
    model, seen = task.model.eval(), []

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            model(pixels)
        finally:
            hook.remove()
        return seen.pop()

    return head, features

"""Batches from pictures that lie in memory, augmented together, and the one SGD loop that everything trains with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from salun_diffusion.errors import SalunError

from .data import Pictures

EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class Recipe:
    """How a model is trained from nothing: the source model, and Retrain with the same."""

    epochs: int
    learning_rate: float
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = (
        "steps"  # "steps": a tenth at 1/2 and 3/4 of the epochs; "one-cycle": up for a third, then down to 0
    )
    augment: str = "crop+flip"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, what draws without a generator (dropout, a layer's stochastic depth) depends on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def inputs(images: torch.Tensor) -> torch.Tensor:
    """Pictures as a model takes them.

    Args:
        images: uint8 of any shape.

    Returns:
        fp32 in 0…1, of the same shape.
    """
    return images.float().div_(255)


def batches(pictures: Pictures, size: int, generator: torch.Generator, augment: str) -> Iterator[tuple]:
    """One shuffled, augmented pass; the last batch is as small as it is.

    Args:
        pictures: ``n`` of them, uint8 with int64 labels.
        size: pictures a batch.
        generator: on the CPU; it fixes order and augmentation.
        augment: "none", "crop" or "crop+flip".

    Yields:
        ``(inputs, labels)``: fp32 ``(size, channels, height, width)`` in 0…1, and int64 ``(size,)``.
    """
    order = torch.randperm(len(pictures), generator=generator).to(pictures.labels.device)
    for rows in order.split(size):
        images = pictures.images[rows]
        if augment != "none":
            images = crop(images, generator)
        if augment == "crop+flip":
            flip = (torch.rand(len(rows), generator=generator) < 0.5).to(images.device)
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        yield inputs(images), pictures.labels[rows]


def crop(images: torch.Tensor, generator: torch.Generator, share: int = 8) -> torch.Tensor:
    """Each picture moved by up to an eighth of its side (4 of CIFAR's 32 pixels) either way, black beyond its edge.

    Args:
        images: uint8 ``(n, channels, height, width)``.
        generator: on the CPU.
        share: the part of the side, as its inverse.

    Returns:
        uint8 of the same shape.
    """
    count, _, height, width = images.shape
    pad = max(height // share, 1)
    padded = F.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator).to(images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    picture = torch.arange(count, device=images.device)
    # advanced indices around a slice put the channels last
    return padded[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class FreezeOutsideMask:
    """Called after each step, puts every weight outside a mask back to the value that it had here, bit for bit: masking
    gradients alone, as the published code did before February 2026, lets weight decay and momentum move it.

    Batch-norm's running statistics are no weights and stay free: they follow the features, as they do in the published
    code, since frozen ones would not fit the weights that did move.

    Args:
        masks: by parameter name, bool of the parameter's shape, true where a weight may move.
    """

    def __init__(self, model: nn.Module, masks: dict[str, torch.Tensor]):
        parameters = dict(model.named_parameters())
        self.frozen = [
            (parameters[n], ~m.to(parameters[n].device), parameters[n].detach().clone()) for n, m in masks.items()
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, outside, base in self.frozen:
            parameter.copy_(torch.where(outside, base, parameter))


def optimise(
    model: nn.Module,
    epochs: int,
    passes: Callable[[int], Iterator[tuple]],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    title: str,
    rate: Callable[[float], float] = lambda done: 1.0,
    batches_each: int = 1,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """SGD on ``loss(logits, labels)`` over the batches of ``passes(epoch)``, in train mode; it ends in eval mode.

    Args:
        model: what is trained, in place.
        epochs: passes.
        learning_rate: SGD's.
        momentum: SGD's.
        weight_decay: SGD's.
        title: before the progress bar.
        passes: epoch → its batches, ``(inputs, labels)``; inputs fp32 ``(n, channels, height, width)`` in 0…1.
        loss: fp32 ``(n, classes)`` and the batch's labels → a scalar.
        rate: factor of the learning rate by the share of the training that is done, 0…1.
        batches_each: batches of an epoch, for that share and the progress bar.
        after_step: called after every step.

    Raises:
        SalunError: a loss that is not finite; the model is of no use then.
    """
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum, weight_decay=weight_decay)
    total, done = epochs * batches_each, 0
    model.train()
    with tqdm(total=total, desc=title, unit="batch", leave=False) as bar:
        for epoch in range(epochs):
            for pixels, labels in passes(epoch):
                optimizer.param_groups[0]["lr"] = learning_rate * rate(done / total)
                try:
                    value = loss(model(pixels), labels)
                except ValueError as error:  # batch-norm's
                    if "more than 1 value per channel" not in str(error):
                        raise
                    raise SalunError(
                        f"{title}: a batch of {len(pixels)} is too small for batch-norm at this size of pictures: give "
                        "another --batch_size (the last batch holds what is left), or a larger --image_size."
                    ) from None
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                after_step()
                done += 1
                bar.update()
            if not torch.isfinite(value):
                raise SalunError(f"{title}: the loss is {value.item()}; give a lower learning rate.")
    model.eval()


def train(model: nn.Module, pictures: Pictures, recipe: Recipe, generator: torch.Generator, title: str) -> None:
    """Cross-entropy by ``recipe``, in place.

    Raises:
        SalunError: as :func:`optimise`.
    """
    shapes = {"steps": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)), "one-cycle": _one_cycle}
    optimise(
        model, recipe.epochs, lambda epoch: batches(pictures, recipe.batch_size, generator, recipe.augment),
        F.cross_entropy, learning_rate=recipe.learning_rate, momentum=recipe.momentum,
        weight_decay=recipe.weight_decay, title=title, rate=shapes[recipe.schedule],
        batches_each=-(-len(pictures) // recipe.batch_size),
    )  # fmt: skip


def _one_cycle(done: float) -> float:
    return 3 * done if done < 1 / 3 else 1.5 * (1 - done)


@torch.no_grad()
def logits(model: nn.Module, pictures: Pictures) -> torch.Tensor:
    """The model's answers to all pictures, in eval mode.

    Returns:
        fp32 ``(n, classes)`` on the CPU.

    Raises:
        SalunError: one is not finite.
    """
    model.eval()
    whole = torch.cat([model(inputs(part)).float().cpu() for part in pictures.images.split(EVALUATION_BATCH)])
    if not torch.isfinite(whole).all():
        raise SalunError("The model answers NaN or infinity: it is broken, so nothing was measured.")
    return whole


def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Percent of the pictures that the model, in eval mode, answers right."""
    return 100 * (logits(model, pictures).argmax(1) == pictures.labels.cpu()).float().mean().item()

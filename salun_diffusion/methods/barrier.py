"""BARRIER: "interval protection" of what is to stay (arXiv 2605.15737), as its code's ``UnlearnIntervalProtection``."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..options import option
from ..process import progress
from .base import GradientMethod
from .losses import denoising, misaligned_prompt

ROWS = 128  # inputs of a layer that are looked at in a picture: all tokens of a prompt, some of the pixels


@dataclass(frozen=True)
class BarrierOptions:
    """The values of the authors' code for classes of SD."""

    protection: float = option(10.0, "λ: weight of the penalty", least=0)
    directions: int = option(64, "k: of the forget inputs of a layer, along which it may change", least=1)
    pictures: int = option(32, "of each set, from which the inputs of the layers are taken", least=1)


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a layer are like, fp32: ``mean`` ``(in,)`` of the forget set's, their first principal
    directions ``forget`` ``(in, k)``, the others times the deviation along them ``rest`` ``(in, in − k)``, and along
    the first ones the ``inner`` interval of the forget set and the ``outer`` one of both sets, ``(2, k)`` each.
    """

    mean: torch.Tensor
    forget: torch.Tensor
    rest: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor


class BARRIER(GradientMethod):
    """The concept's prompt predicts what the anchor's does, and the layers may only do otherwise for inputs that are
    the concept's: :func:`penalty`, averaged over the layers, holds the rest.

    The inputs are those that the base model's layers get on noised pictures of the forget and the retain set. Linear
    layers and convolutions are protected; norms in scope are not. From the authors' code (random labels for SD), with
    these differences: a convolution's inputs are whole patches (theirs protects the kernel's centre alone), and the
    deviations of the other directions are per input (theirs are singular values, which grow with the number of
    pictures). The outer interval is that of the retain pictures, as in all of their configurations, and the retain
    loss has the weight 0 unless ``--alpha`` says otherwise. Theirs trains the cross-attention's queries, keys and
    values; this scope has its output too.
    """

    title = "BARRIER"
    settings = {"max_train_steps": 250, "learning_rate": 5e-6, "alpha": 0.0}
    Options = BarrierOptions

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        self.inputs = self._inputs()

    def begin(self, change):
        super().begin(change)
        shapes = {name: p.shape for name, p in self.model.network.named_parameters()}
        self.places = {}  # by parameter, its shape, and where in it the values of `deltas` lie
        for name, delta in change.deltas().items():
            shape = shapes[name] if name in shapes else delta.shape  # of an adapted layer, its change is whole
            places = change.packed(name, torch.arange(shape.numel()).view(shape))
            self.places[name] = shape, places.flatten()

    def losses(self, forget, retain):
        with torch.no_grad():
            anchor = self.predict(forget.noisy, forget.timesteps, forget.anchor_condition)
        erased, kept = self.predict_both(forget, retain)
        loss = misaligned_prompt(erased, anchor) + self.options.protection * self.protected()
        return loss, denoising(kept, retain.target)

    def protected(self) -> torch.Tensor:
        """The mean :func:`penalty` of the layers that may change."""
        changes = {}
        for name, delta in self.change.deltas().items():
            shape, places = self.places[name]
            whole = delta.new_zeros(shape.numel()).index_copy(0, places, delta.flatten())
            changes[name] = whole.view(shape)
        found = []
        for name, inputs in self.inputs.items():
            weight, bias = changes.get(f"{name}.weight"), changes.get(f"{name}.bias")
            if weight is not None:
                found.append(penalty(weight.flatten(1), bias, inputs))
        return sum(found) / max(len(found), 1)

    def _inputs(self) -> dict[str, Inputs]:
        layers = {
            name: module
            for name, module in self.model.network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad
        }
        forget: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        for rows in self._seen("forget", layers):
            for name, found in rows.items():
                forget[name].append(found)
        inputs = {name: directions(torch.cat(found), self.options.directions) for name, found in forget.items()}
        for rows in self._seen("retain", layers):
            for name, found in rows.items():
                one = inputs[name]
                along = (found.to(one.mean) - one.mean) @ one.forget
                one.outer[0].copy_(torch.minimum(one.outer[0], along.amin(0)))
                one.outer[1].copy_(torch.maximum(one.outer[1], along.amax(0)))
        return inputs

    @torch.no_grad()
    def _seen(self, kind: str, layers: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
        """For each of some pictures of a set, at a timestep of its own, up to ``ROWS`` inputs of each layer, fp32."""
        images, seen = self.batches.sets[kind], {}
        count = min(self.options.pictures, len(images))
        which = torch.arange(count) * len(images) // count  # of all concepts alike
        for i in progress(
            f"inputs, {kind} set", count, "image", self.batches.accelerator.is_main_process, over=which.tolist()
        ):
            generator = self.batches.generator("barrier rows", kind, i)

            def look(module, given, name, generator=generator):
                rows = rows_of(module, given[0])
                chosen = torch.randperm(len(rows), generator=generator)[:ROWS]
                seen[name] = rows[chosen.to(rows.device)].float()

            hooks = [
                layer.register_forward_pre_hook(lambda module, given, name=name, look=look: look(module, given, name))
                for name, layer in layers.items()
            ]
            try:
                batch = self.batches.noised(
                    images, torch.tensor([i]), *self.batches.draw(images, 1, "barrier", kind, i)
                )
                self.predict(batch.noisy, batch.timesteps, batch.condition)
            finally:
                for hook in hooks:
                    hook.remove()
            yield dict(seen)


def rows_of(layer: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """What the weight of a linear layer or a convolution is multiplied with, ``(n, in)``: for a convolution patches."""
    if isinstance(layer, nn.Linear):
        return given.flatten(0, -2)
    patches = F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def directions(rows: torch.Tensor, count: int) -> Inputs:
    """The :class:`Inputs` of a layer whose forget inputs are ``rows`` ``(n, in)``; the outer interval is theirs too.

    A direction's sign, which decides what :func:`penalty` adds up before it squares, is that of its largest entry.
    """
    mean = rows.double().mean(0)
    centred = rows.double() - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    forget, rest = vectors[:, :count], vectors[:, count:] * variances[count:].sqrt()
    along = centred @ forget
    inner = torch.stack([quantiles(along, 0.05), quantiles(along, 0.95)])
    outer = torch.stack([along.amin(0), along.amax(0)])
    return Inputs(*(part.float().contiguous() for part in (mean, forget, rest, inner, outer)))


def quantiles(values: torch.Tensor, share: float) -> torch.Tensor:
    """Of each column; torch's own takes no more than 16 million values at once, of which a column has few."""
    return torch.stack([column.quantile(share) for column in values.T])


def penalty(weight: torch.Tensor, bias: torch.Tensor | None, inputs: Inputs) -> torch.Tensor:
    """How far a layer's change moves its output for inputs that are not the forget set's.

    With D = ΔW U_f, D⁺ and D⁻ its positive and negative part, [z₀, z₁] the inner and [lo, hi] the outer interval, the
    sum of the mean squares of ::

        ΔW μ + Δb,   ΔW U_r diag(s_r),   D⁺ lo − D⁻ z₀,   D⁺ z₀ − D⁻ lo,   D⁺ z₁ − D⁻ hi,   D⁺ hi − D⁻ z₁

    the last four being the ends of what D makes of [lo, z₀] and of [z₁, hi] in interval arithmetic.

    Args:
        weight: ΔW, ``(out, in)``, fp32.
        bias: Δb, ``(out,)``, or none.
        inputs: of the layer.
    """
    shift = weight @ inputs.mean
    along = weight @ inputs.forget
    up, down = along.clamp(min=0), (-along).clamp(min=0)
    (low, high), (start, end) = inputs.outer, inputs.inner
    moved = [shift if bias is None else shift + bias]
    moved += [up @ low - down @ start, up @ start - down @ low, up @ end - down @ high, up @ high - down @ end]
    if inputs.rest.numel():
        moved.append(weight @ inputs.rest)
    return sum(part.square().mean() for part in moved)

"""BARRIER's interval penalty against a plain version of it."""

import pytest
import torch
import torch.nn.functional as F
from plain_losses import scoped_names, told, trainer_for

from salun_diffusion.training.change import MaskedChange


def plain_rows(layer, given):
    """What a layer's weight is multiplied with, a row for each output; of a convolution, window by window."""
    if given.dim() == 3 or not isinstance(layer, torch.nn.Conv2d):
        return given.flatten(0, -2)
    (size, _), (edge, _), (stride, _) = layer.kernel_size, layer.padding, layer.stride
    given = F.pad(given, [edge] * 4)
    down, across = (range(0, length - size + 1, stride) for length in given.shape[2:])
    return torch.cat([given[:, :, i : i + size, j : j + size].flatten(1) for i in down for j in across])


def plain_protected(net, base, trainer):
    """Singular vectors of all inputs of a layer, and intervals multiplied out entry by entry of D."""
    options, batches = trainer.method.options, trainer.batches
    names = [name.removesuffix(".weight") for name, p in scoped_names(net, trainer.config.scope) if p.dim() > 1]
    seen = {}
    for kind in ("forget", "retain"):
        caught = {name: [] for name in names}
        hooks = [
            base.get_submodule(name).register_forward_hook(
                lambda module, given, out, rows=rows: rows.append(plain_rows(module, given[0]).double())
            )
            for name, rows in caught.items()
        ]
        for i in (0, 1, 3, 4):  # of six
            noise = batches.draw(batches.sets[kind], 1, "barrier", kind, i)
            batch = batches.noised(batches.sets[kind], torch.tensor([i]), *noise)
            with torch.no_grad():
                base(batch.noisy, batch.timesteps, told(batch))
        for hook in hooks:
            hook.remove()
        seen[kind] = {name: torch.cat(rows) for name, rows in caught.items()}
    total = 0
    for name in names:
        layer, before = net.get_submodule(name), base.get_submodule(name)
        change = (layer.weight - before.weight.detach()).flatten(1)
        rows, others = (seen[kind][name] for kind in ("forget", "retain"))
        mean, k = rows.mean(0), options.directions
        _, sizes, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
        vectors = torch.stack([one * one[one.abs().argmax()].sign() for one in vectors])
        along, along_others = (rows - mean) @ vectors[:k].T, (others - mean) @ vectors[:k].T
        low, high = (torch.cat([along, along_others]).amin(0).float(), torch.cat([along, along_others]).amax(0).float())
        start, end = (along.quantile(share, dim=0).float() for share in (0.05, 0.95))
        shift = change @ mean.float() + (0 if layer.bias is None else layer.bias - before.bias.detach())
        rest = change @ (vectors[k:].T * sizes[k:] / len(rows) ** 0.5).float()
        moved = change @ vectors[:k].T.float()
        ends = []
        for one, two in ((low, start), (end, high)):  # an interval times a number: its ends, in their order
            ends += [torch.minimum(moved * one, moved * two).sum(1), torch.maximum(moved * one, moved * two).sum(1)]
        count = len(change) * (change.shape[1] - k)  # of a layer with few inputs, more than there are singular vectors
        total = total + sum(part.square().mean() for part in [shift, *ends]) + rest.square().sum() / count
    return total / len(names)


@pytest.mark.parametrize("scope", ["cross-attention", "cross-attention+resnets"])
def test_barrier_protects_as_a_plain_version_does(scope, folders, tmp_path):
    """At some change, the penalty and its gradient; part of the weights may not move."""
    options = ["directions=3", "protection=2", "pictures=4"]
    trainer, parameters, base = trainer_for("barrier", folders["sd1"], tmp_path, scope=scope, method_option=options)
    torch.manual_seed(0)
    change = MaskedChange(parameters, {name: torch.rand(p.shape) < 0.7 for name, p in parameters.items()})
    trainer.method.begin(change)
    for value in change.values.values():
        value.data = 0.1 * torch.randn(len(value))
    change.write()
    found, wanted = trainer.method.protected(), plain_protected(trainer.model.network, base, trainer)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=0)
    found.backward()
    gradients = torch.autograd.grad(wanted, list(change.parameters.values()), allow_unused=True)
    for (name, value), dense in zip(change.values.items(), gradients, strict=True):
        if value.grad is None or dense is None:  # a norm
            assert value.grad is None and dense is None and "norm" in name
        else:
            torch.testing.assert_close(value.grad, change.packed(name, dense), rtol=1e-3, atol=1e-4)

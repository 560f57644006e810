"""Each unlearning method against a plain reading of its paper, on scikit-learn's digits and small networks."""

from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from classification import config, models
from classification.data import Pictures, forget_rows, load, others
from classification.methods import METHODS
from classification.methods.boundary import nearest
from classification.methods.influence import hessian_product
from classification.methods.salun import Softened, find_masks, salun
from classification.methods.task import Settings, Task
from classification.training import FreezeOutsideMask, Recipe, inputs, optimise

DOCUMENT = (Path(__file__).parents[2] / "docs" / "classification.md").read_text(encoding="utf-8")
RECIPE = Recipe(1, 0.1, 64, schedule="one-cycle", augment="none")


@pytest.fixture(scope="module")
def data():
    return load("digits", limit=400)


def task(data, model=None, seed=0, masks=None, forget="random:0.1", **settings):
    """A task on ``model``, a resnet8 by default; a tenth of the digits is to be forgotten."""
    rows = forget_rows(forget, data, 0)
    model = model or models.build("resnet8", data, 7)
    settings = {"epochs": 1, "batch_size": 64, "augment": "none"} | settings
    return Task(
        model=model.eval(), forget=data.train[rows], retain=data.train[others(rows, len(data.train))], classes=10,
        settings=Settings(**settings), generator=torch.Generator().manual_seed(seed),
        fresh=lambda: models.build("resnet8", data, 11), recipe=RECIPE, title="test", masks=masks,
    )  # fmt: skip


def what(method):
    return "class:3" if METHODS[method].whole_classes else "random:0.1"


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Flat(nn.Module):
    """One linear layer on pixels, whose every derivative can be written down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)

    def forward(self, pictures):
        return self.layer(pictures.flatten(1))


def test_every_row_of_the_methods_is_whole():
    assert tuple(models.MODELS) == config.MODELS
    names = {item.name for item in fields(Settings)}
    for method in METHODS.values():
        assert set(method.defaults) <= set(method.settings) <= names
        assert method.tuned in method.settings or not method.settings
        assert f"| {method.title} | {method.description} | {method.paper}".strip() in DOCUMENT


class Watched:
    """Settings that remember which of them were read."""

    def __init__(self, settings):
        self._settings, self.read = settings, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self._settings, name)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_the_settings_that_its_row_names_and_no_other(data, method):
    work = task(data, forget=what(method), epochs=1)
    work.settings = Watched(work.settings)
    METHODS[method](work)
    assert work.settings.read == set(METHODS[method].settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_deterministic_and_keeps_the_models_form(data, method):
    defaults = {"epochs": 1} | {key: value for key, value in METHODS[method].defaults.items() if key != "epochs"}
    results = []
    for _ in range(2):
        work = task(data, forget=what(method), **defaults)
        before = weights(models.Mixture([work.fresh(), work.fresh()], work.fresh()) if method == "sisa" else work.model)
        METHODS[method](work)
        after = weights(work.model)
        assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
        assert all(torch.isfinite(value).all() for value in after.values()) and not same(before, after)
        assert work.model(inputs(work.forget.images)).shape == (len(work.forget), 10) and not work.model.training
        results.append(after)
    assert same(*results)


def plain_scores(work):
    model, total = work.model, {name: 0 for name, _ in work.model.named_parameters()}
    for rows in torch.arange(len(work.forget)).split(work.settings.batch_size):
        model.zero_grad()
        (-F.cross_entropy(model(inputs(work.forget.images[rows])), work.forget.labels[rows])).backward()
        total = {name: total[name] + p.grad.clone() for name, p in model.named_parameters()}
    return torch.cat([total[name].abs().flatten() for name in total])


def test_the_mask_is_the_top_share_by_argsort(data):
    work = task(data, density=0.3, batch_size=16)
    masks = find_masks(work)
    flat = torch.cat([masks[name].flatten() for name, _ in work.model.named_parameters()])
    order = plain_scores(work).argsort(descending=True, stable=True)
    expected = torch.zeros_like(flat)
    expected[order[: int(0.3 * len(flat))]] = True
    assert torch.equal(flat, expected)


def test_weights_outside_the_mask_stay_to_the_bit(data):
    """Through weight decay, momentum and batch-norm's affine parameters; its running statistics are the exception."""
    work = task(data, density=0.3, epochs=2, learning_rate=0.05, weight_decay=0.1)
    before, masks = weights(work.model), find_masks(work)
    salun(work)
    after = weights(work.model)
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask]), name
    moved = sum(int((after[name] != before[name]).sum()) for name in masks)
    assert moved > 0.9 * sum(int(mask.sum()) for mask in masks.values())
    assert not torch.equal(after["network.1.running_mean"], before["network.1.running_mean"])


def test_masking_gradients_alone_would_not_hold_them(data):
    """What the published code does, and why :class:`FreezeOutsideMask` is there."""
    work = task(data, weight_decay=0.1)
    before, masks = weights(work.model), find_masks(work)
    for name, parameter in work.model.named_parameters():
        parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    METHODS["rl"](work)
    after = weights(work.model)
    assert any(not torch.equal(after[name][~mask], before[name][~mask]) for name, mask in masks.items())


def test_salun_under_a_full_mask_is_random_labelling(data):
    full = {name: torch.ones_like(p, dtype=torch.bool) for name, p in task(data).model.named_parameters()}
    one, other = task(data, masks=full), task(data)
    salun(one)
    METHODS["rl"](other)
    assert same(weights(one.model), weights(other.model))


def test_random_labels_then_true_ones(data):
    work, seen = task(data, Flat(), epochs=2), []
    real = work.optimise
    work.optimise = lambda passes, *rest: seen.extend(passes(epoch) for epoch in range(2)) or real(passes, *rest)
    METHODS["rl"](work)
    labels = [[list(part) for part in epoch] for epoch in seen]
    for epoch in labels:
        assert sum(len(part[1]) for part in epoch) == len(work.forget) + len(work.retain)
        kept = torch.cat([part[1] for part in epoch[1:]])
        assert torch.equal(kept.sort().values, work.retain.labels.sort().values), "the retain set keeps its own labels"
    assert not torch.equal(labels[0][0][1], labels[1][0][1]), "drawn afresh in each epoch"


def test_the_optimiser_is_torchs_sgd(data):
    """FT against the loop that one would write."""
    work, plain = task(data, Flat(), epochs=2), Flat()
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    reference = task(data, plain, epochs=2)
    for _ in range(2):
        for pixels, labels in reference.batches(reference.retain):
            optimizer.zero_grad()
            F.cross_entropy(plain(pixels), labels).backward()
            optimizer.step()
    METHODS["ft"](work)
    assert same(weights(work.model), weights(plain))


def test_l1_decays_linearly_to_nothing(data):
    work, plain = task(data, Flat(), epochs=4, alpha=0.01), Flat()
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    reference = task(data, plain, epochs=4)
    for factor in (0.01, 0.0075, 0.005, 0.0025):
        for pixels, labels in reference.batches(reference.retain):
            optimizer.zero_grad()
            size = plain.layer.weight.abs().sum() + plain.layer.bias.abs().sum()
            (F.cross_entropy(plain(pixels), labels) + factor * size).backward()
            optimizer.step()
    METHODS["l1_sparse"](work)
    assert all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(work.model.parameters(), plain.parameters(), strict=True)
    )


def test_gradient_ascent_is_one_step_up(data):
    work = task(data, Flat(), momentum=0.0, weight_decay=0.0, learning_rate=0.5)
    plain = deepcopy(work.model)
    F.cross_entropy(plain(inputs(work.forget.images)), work.forget.labels).backward()
    METHODS["ga"](work)
    for mine, theirs in zip(work.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs + 0.5 * theirs.grad, atol=1e-6)


def test_neggrad_weighs_both_losses(data):
    work = task(data, Flat(), momentum=0.0, weight_decay=0.0, learning_rate=0.5, alpha=0.9, batch_size=1000)
    plain = deepcopy(work.model)
    kept = F.cross_entropy(plain(inputs(work.retain.images)), work.retain.labels)
    lost = F.cross_entropy(plain(inputs(work.forget.images)), work.forget.labels)
    (0.9 * kept - 0.1 * lost).backward()
    METHODS["neggrad_plus"](work)
    for mine, theirs in zip(work.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs - 0.5 * theirs.grad, atol=1e-6)


def test_influence_is_the_inverse_hessian_written_out(data):
    work = task(data, Flat().double(), alpha=2.0)
    model, count = deepcopy(work.model), len(work.forget) + len(work.retain)

    def gradients(pictures):
        found = []
        for image, label in zip(inputs(pictures.images).double(), pictures.labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model(image[None]), label[None]).backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return torch.stack(found)

    lost, kept = gradients(work.forget), gradients(work.retain)
    v = lost.sum(0) / count - kept.sum(0) * len(lost) / (count * len(kept))
    hessian = torch.eye(len(v), dtype=torch.float64) + kept.T @ kept / len(kept)  # all, since they are below 1,000
    expected = torch.cat([p.detach().flatten() for p in model.parameters()]) + 2 * torch.linalg.solve(hessian, v)
    METHODS["iu"](work)
    found = torch.cat([p.detach().flatten() for p in work.model.parameters()])
    step = expected - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(found, expected, atol=1e-3 * float(step.abs().max()))
    assert not torch.allclose(found - step, expected, atol=1e-3 * float(step.abs().max())), "the step is not nothing"


def test_influence_goes_through_batch_norm_and_convolutions(data):
    """The product with the Hessian against gradients of single pictures."""
    work = task(data)
    torch.manual_seed(0)
    names = {name: p.detach() for name, p in work.model.named_parameters()}
    w = {name: torch.randn_like(p) for name, p in names.items()}
    some = work.retain[torch.arange(5)]
    found = hessian_product(work.model, names, some, w)
    expected = {name: value.clone() for name, value in w.items()}
    for image, label in zip(inputs(some.images), some.labels, strict=True):
        work.model.zero_grad()
        F.cross_entropy(work.model(image[None]), label[None]).backward()
        slope = sum((p.grad * w[name]).sum() for name, p in work.model.named_parameters())
        expected = {name: expected[name] + slope * p.grad / 5 for name, p in work.model.named_parameters()}
    for name in w:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4), name


def test_soft_thresholding_has_the_fixed_points_it_should(data):
    work = task(data, Flat(), epochs=1, density=0.5, batch_size=1000)  # two steps: a batch of each set
    soften, base = Softened(work), deepcopy(work.model)
    torch.manual_seed(1)
    changes = {name: torch.randn_like(p) for name, p in work.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in work.model.named_parameters():
            parameter += changes[name]
    soften()
    flat = torch.cat([change.flatten() for change in changes.values()])
    count = int(0.5 * len(flat) * (1 - 1 / 2))
    threshold = flat.abs().sort().values[count - 1]
    expected = flat.sign() * (flat.abs() - threshold).clamp(min=0)
    now = torch.cat([(p - q).flatten() for p, q in zip(work.model.parameters(), base.parameters(), strict=True)])
    assert torch.allclose(now, expected, atol=1e-6) and int((now == 0).sum()) == count
    before = weights(work.model)
    soften()  # at the last step k is 0: nothing is a fixed point but everything
    assert same(before, weights(work.model))


def test_boundary_shrink_takes_the_answer_to_the_perturbed_picture(data):
    work = task(data, Flat())
    pixels, labels = inputs(work.forget.images), work.forget.labels
    found = nearest(work.model, pixels, labels)
    moved = pixels.clone().requires_grad_()
    F.cross_entropy(work.model(moved), labels).backward()
    expected = work.model((pixels + 0.1 * moved.grad.sign()).clamp(0, 1)).argmax(1)
    assert torch.equal(found, expected)


def test_boundary_expanding_drops_its_class_again(data):
    work = task(data, Flat(), learning_rate=0.5, momentum=0.0, weight_decay=0.0)
    source = deepcopy(work.model)
    METHODS["be"](work)
    wide = torch.cat([source.layer.weight, source.layer.weight.mean(0, keepdim=True)]).detach().requires_grad_()
    bias = torch.cat([source.layer.bias, source.layer.bias.mean(0, keepdim=True)]).detach().requires_grad_()
    logits = inputs(work.forget.images).flatten(1) @ wide.T + bias
    F.cross_entropy(logits, torch.full_like(work.forget.labels, 10)).backward()
    assert torch.allclose(work.model.layer.weight, (wide - 0.5 * wide.grad)[:-1], atol=1e-6)
    assert work.model.layer.weight.shape == (10, 64)


def test_retrain_knows_neither_the_source_nor_the_forget_set(data):
    one, other = task(data), task(data, models.build("resnet8", data, 99))
    other.forget = Pictures(other.forget.images.flip(0), other.forget.labels)
    METHODS["retrain"](one)
    METHODS["retrain"](other)
    assert same(weights(one.model), weights(other.model))


def test_a_loss_that_is_no_number_ends_the_run(data):
    from salun_diffusion.errors import SalunError

    with pytest.raises(SalunError, match="the loss is (nan|inf); give a lower learning rate"):
        METHODS["ft"](task(data, Flat(), learning_rate=1e30, epochs=3))


def test_held_weights_and_the_share_of_the_training(data):
    rates, model = [], Flat()
    held = FreezeOutsideMask(model, {"layer.bias": torch.zeros(10, dtype=torch.bool)})
    work = task(data, model)
    optimise(
        model, 2, lambda epoch: work.batches(work.retain), F.cross_entropy, learning_rate=0.1, momentum=0.9,
        weight_decay=0.1, title="x", rate=lambda done: rates.append(done) or 1.0, batches_each=5, after_step=held,
    )  # fmt: skip
    assert rates == [step / 10 for step in range(10)]
    assert torch.equal(model.layer.bias, Flat().layer.bias) and not torch.equal(model.layer.weight, Flat().layer.weight)

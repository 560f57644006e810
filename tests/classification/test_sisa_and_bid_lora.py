"""SISA's ensemble and BID-LoRA's adapters, each against a plain reading."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from test_unlearning_methods import Flat, same, task, weights
from torch import nn
from torchvision.models import VisionTransformer

from classification import models
from classification.data import joined, load
from classification.methods import METHODS, bid_lora
from classification.methods.bid_lora import adapt, escape, replayed
from classification.methods.sisa import Ensemble, Kept, replay
from classification.training import inputs, seeded
from salun_diffusion.errors import SalunError


@pytest.fixture(scope="module")
def data():
    return load("digits", limit=400)


def of(pictures, classes):
    return pictures[torch.isin(pictures.labels, torch.tensor(classes))]


def test_sisa_ends_where_it_would_have_without_the_class_to_the_bit(data):
    work, other = (task(data, forget="class:3", alpha=1.0, epochs=2) for _ in range(2))
    ensemble, never = Ensemble(work), Ensemble(other)
    ensemble.learn(joined(work.retain, work.forget))
    with_class = weights(ensemble.model())
    touched = next(shard for shard, slices in enumerate(ensemble.plan) if any(3 in part for part in slices))
    number = next(number for number, part in enumerate(ensemble.plan[touched]) if 3 in part)
    stages = [list(part) for part in ensemble.stages]
    ensemble.forget([3], work.retain)
    for shard, part in enumerate(ensemble.stages):
        kept = [one is before for one, before in zip(part, stages[shard], strict=True)]
        assert kept == [True] * 6 if shard != touched else kept == [True] * (number + 1) + [False] * (5 - number)
    never.learn(other.retain)
    assert same(weights(ensemble.model()), weights(never.model()))
    assert not any(3 in stage.buffer for part in ensemble.stages for stage in part)
    differing = {name for name, value in weights(ensemble.model()).items() if not torch.equal(value, with_class[name])}
    assert any(name.startswith("gate.") for name in differing), "the gate learns without the class too"
    assert not any(name.startswith(f"networks.{1 - touched}.") for name in differing)


def test_a_shard_of_sisa_is_plain_sgd_with_a_replay(data):
    work = task(data, forget="class:3", alpha=0.5, batch_size=1000, momentum=0.0, weight_decay=0.1)
    work.fresh = Flat
    ensemble, plain = Ensemble(work), Flat()
    assert sorted(sum((part for slices in ensemble.plan for part in slices), [])) == list(range(10))
    ensemble.learn(work.retain)
    kept = {}
    for number, classes in enumerate(ensemble.plan[1]):
        part, draw = of(work.retain, classes), torch.Generator().manual_seed(ensemble.seed + 10 + number)
        if len(part):
            count = round(0.5 * len(part))
            taken = [part]
            for place, (pictures, sizes, when) in enumerate(kept.values()):
                low, high = min(sizes), max(sizes)
                scores = [0.7 * (size - low) / (high - low) + 0.3 * 0.95 ** (number - when) for size in sizes]
                share = min(count // len(kept) + (place < count % len(kept)), len(pictures))
                taken.append(pictures[torch.multinomial(torch.tensor(scores), share, generator=draw)])
            whole = joined(*taken)
            assert number == 0 or len(whole) == len(part) + count
            plain.zero_grad()
            F.cross_entropy(plain(inputs(whole.images)), whole.labels).backward()
            for weight in plain.parameters():
                weight.data -= 0.01 * (weight.grad + 0.1 * weight.data)
            sizes = []
            for pixels, label in zip(inputs(part.images), part.labels, strict=True):
                pixels.requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(plain(pixels[None]), label[None]), pixels)
                sizes.append(float(slope.norm()))
            kept[classes[0]] = (part, sizes, number)
        found = ensemble.stages[1][number + 1].weights
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in plain.state_dict().items())


def test_the_gate_is_taught_the_shard_of_each_class(data):
    work = task(data, forget="class:3", alpha=0.5, batch_size=1000, momentum=0.0, weight_decay=0.0)
    work.fresh = Flat
    ensemble, plain = Ensemble(work), Flat()
    ensemble.learn(work.retain)
    of_class = {label: shard for shard, slices in enumerate(ensemble.plan) for part in slices for label in part}
    sent = torch.tensor([of_class[label] for label in work.retain.labels.tolist()])
    F.cross_entropy(plain(inputs(work.retain.images)), sent).backward()
    assert torch.allclose(ensemble.gate.layer.weight, plain.layer.weight - 0.01 * plain.layer.weight.grad, atol=1e-6)


def test_a_replay_takes_as_many_of_each_class_and_the_important_more_often(data):
    few, many = of(data.train, [0])[torch.arange(2)], of(data.train, [1])
    sizes = torch.zeros(len(many))
    sizes[0] = 1  # 0.7 + 0.3 against 0.3 each
    buffer = {0: Kept(few, torch.tensor([1.0, 2.0]), 0), 1: Kept(many, sizes, 0)}
    assert buffer[1].scores(3)[:2].tolist() == pytest.approx([0.7 + 0.3 * 0.95**3, 0.3 * 0.95**3])
    draw, first = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        one, other = replay(buffer, 0, 2, draw)
        assert one.labels.tolist() == [0] and other.labels.tolist() == [1]
        first += torch.equal(other.images[0], many.images[0])
    expected = 1 / (1 + 0.3 * (len(many) - 1))
    assert first / 200 == pytest.approx(expected, abs=4 * math.sqrt(expected / 200))
    assert [len(part) for part in replay(buffer, 0, 9, draw)] == [2, 4], "there are no more of the first"


def test_a_mixture_answers_with_probabilities_weighed_by_its_gate(data):
    networks, gate = [Flat(), Flat()], Flat()
    networks[1].layer.weight.data *= -3
    pixels = inputs(data.train.images[:5])
    shares = gate(pixels)[:, :2].softmax(1)
    expected = sum(shares[:, s, None] * networks[s](pixels).softmax(1) for s in range(2))
    found = models.Mixture(networks, gate)(pixels).exp()
    assert torch.allclose(found, expected, atol=1e-6) and torch.allclose(found.sum(1), torch.ones(5))


def test_the_escape_direction_is_against_the_nearest_point_of_the_centres_hull():
    sizes = torch.tensor([1.0, 2.0, 5.0])  # along three axes: the hull's point nearest to 0 weighs each by 1/size²
    share = sizes**-2 / (sizes**-2).sum()
    nearest = F.pad(share * sizes, (0, 2))
    found = escape(F.pad(torch.diag(sizes), (0, 2)), torch.Generator().manual_seed(0))
    assert torch.allclose(found, -nearest / nearest.norm(), atol=0.03) and found.norm() == pytest.approx(1)


class Deep(nn.Module):
    """Two layers, in double precision, so that Adam's division by small gradients can be compared."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 12).double(), nn.Linear(12, 10).double()

    def forward(self, pictures):
        return self.last(torch.tanh(self.first(pictures.flatten(1).double())))


def test_bid_lora_is_three_losses_each_on_its_own_adapter(data):
    given = {"epochs": 3, "batch_size": 1000, "learning_rate": 0.02, "weight_decay": 0.1, "alpha": 4.0}
    work = task(data, Deep(), forget="class:3", **given)
    new, work.retain = of(work.retain, [5, 6]), of(work.retain, [0, 1, 2])
    sets = {"retain": replayed(work.retain), "forget": work.forget, "new": new}
    assert len(sets["retain"]) == math.ceil(0.1 * len(work.retain)) and len(sets["retain"].labels.unique()) == 3

    net, draw = Deep(), torch.Generator().manual_seed(0)
    x = {part: inputs(pictures.images).flatten(1).double() for part, pictures in sets.items()}
    y = {part: pictures.labels for part, pictures in sets.items()}
    W, bias, head, shift = (p.detach().clone() for p in net.parameters())
    source = torch.tanh(x["retain"] @ W.T + bias)
    centres = torch.stack([source[y["retain"] == k].mean(0) for k in (0, 1, 2)])
    point = 4.0 * escape(centres, draw)
    with seeded(int(torch.randint(2**31, (), generator=draw))):
        ranks = {"retain": 8, "forget": 4, "new": 8}
        configs = {part: LoraConfig(r=r, lora_alpha=r, target_modules=["first"]) for part, r in ranks.items()}
        start = get_peft_model(net, configs["retain"], "retain")
        start.add_adapter("forget", configs["forget"])
        start.add_adapter("new", configs["new"])
    layer = start.base_model.model.first
    A = {part: layer.lora_A[part].weight.detach().clone().requires_grad_() for part in sets}
    B = {part: layer.lora_B[part].weight.detach().clone().requires_grad_() for part in sets}
    head.requires_grad_(), shift.requires_grad_()
    moments = {part: {} for part in sets}

    def adamw(part, name, weight, gradient, rate, decay, step):
        m, v = moments[part].get(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        moments[part][name] = m, v
        weight.data *= 1 - rate * decay
        weight.data -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)

    for epoch in range(3):
        rate = 0.02 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for part in sets:
            moved = W + sum(B[p] @ A[p] for p in sets)
            e = torch.tanh(x[part] @ moved.T + bias)
            answers = e @ head.T + shift
            loss = {
                "retain": lambda e=e, z=answers: F.cross_entropy(z, y["retain"]) + (e - source).square().mean(),
                "forget": lambda e=e: (e - point).square().mean(),
                "new": lambda z=answers: F.cross_entropy(z, y["new"]),
            }[part]()
            own = {"A": A[part], "B": B[part]} | ({} if part == "forget" else {"head": head, "shift": shift})
            for (name, weight), gradient in zip(
                own.items(), torch.autograd.grad(loss, list(own.values())), strict=True
            ):
                rows = torch.isin(torch.arange(10), y[part])
                if name in ("head", "shift"):
                    gradient = gradient * rows.view(-1, *[1] * (gradient.ndim - 1))
                adamw(part, name, weight, gradient, rate, 0.1 if name in "AB" else 0.0, epoch + 1)
    before = weights(work.model)
    adapt(work, new)
    after = weights(work.model)
    assert torch.allclose(after["first.weight"], W + sum(B[p] @ A[p] for p in sets), atol=1e-6)
    assert torch.allclose(after["last.weight"], head, atol=1e-6) and torch.allclose(
        after["last.bias"], shift, atol=1e-6
    )
    untouched = [3, 4, 7, 8, 9]
    assert torch.equal(after["last.weight"][untouched], before["last.weight"][untouched])
    assert torch.equal(after["first.bias"], before["first.bias"])
    assert not torch.allclose(after["first.weight"], before["first.weight"], atol=1e-2)


def test_bid_lora_adapts_attention_alone_where_there_is_any(data, monkeypatch):
    def seen(task, tuned, *rest):
        train(task, tuned, *rest)
        moved = {name: bool(weight.any()) for name, weight in tuned.named_parameters() if "lora_B" in name}
        assert len(moved) == 8 and all(moved.values()), "both adapters get a gradient, B begins at 0"

    train = bid_lora._train
    monkeypatch.setattr(bid_lora, "_train", seen)

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.network = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=10)
            nn.init.normal_(self.network.heads.head.weight, std=0.1)

        def forward(self, pictures):
            return self.network(pictures.expand(-1, 3, -1, -1))

    work = task(data, Seen(), forget="class:3", epochs=2, learning_rate=0.01)
    before, kinds = weights(work.model), [type(module) for module in work.model.modules()]
    METHODS["bid_lora"](work)
    after = weights(work.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    ends = ("self_attention.in_proj_weight", "self_attention.out_proj.weight", "head.weight", "head.bias")
    assert len(changed) == 6 and all(name.endswith(ends) for name in changed)
    assert [type(module) for module in work.model.modules()] == kinds and all(
        weight.requires_grad for weight in work.model.parameters()
    )


def test_bid_lora_leaves_batch_norm_and_the_forgotten_row(data):
    work = task(data, forget="class:3", epochs=2, learning_rate=0.01)
    before = deepcopy(weights(work.model))
    METHODS["bid_lora"](work)
    after = weights(work.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    convolutions = {name for name, value in before.items() if value.ndim == 4 and name not in ("mean", "std")}
    assert changed == convolutions | {"network.8.weight", "network.8.bias"}
    assert torch.equal(after["network.8.weight"][3], before["network.8.weight"][3])
    with pytest.raises(SalunError, match="BID-LoRA adapts the layers before the last, and this model has none"):
        METHODS["bid_lora"](task(data, Flat(), forget="class:3"))

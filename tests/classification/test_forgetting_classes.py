"""Forgetting a whole class: its measures and its methods, each against a plain reading."""

import json
import math
import re
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PIL
from shell import here
from test_unlearning_methods import Flat, task, weights
from torch import nn

from classification import models
from classification.classwise import head_bias, redistribution, selectivity
from classification.config import Config
from classification.convergence import relearning
from classification.data import Pictures, load
from classification.methods import METHODS
from classification.methods.damp import damp, directions
from classification.methods.mode_connectivity import Path
from classification.training import inputs
from salun_diffusion.errors import SalunError

NAMES = tuple("abcd")


@pytest.fixture(scope="module")
def data():
    return load("digits", limit=400)


def answers(*classes):
    return F.one_hot(torch.tensor(classes), len(NAMES)).float()


def test_where_the_forgotten_go_by_counting():
    before, after = answers(0, 0, 0, 1), answers(1, 1, 2, 0)  # shares: a .75 → .25, b .25 → .5, c 0 → .25
    found = redistribution(before, after, torch.tensor([0]), NAMES)
    assert found["score"] == {"a": 0, "b": 0.5, "c": 0.5, "d": 0} and found["sink_share"] == 0.5
    assert found["entropy"] == pytest.approx(math.log(2) / math.log(3), abs=1e-4)
    one = redistribution(before, answers(3, 3, 3, 1), torch.tensor([0]), NAMES)
    assert one["sink"] == "d" and one["sink_share"] == 1 and one["entropy"] == 0
    none = redistribution(before, before, torch.tensor([0]), NAMES)
    assert none["sink"] is None and not any(none["score"].values())


def test_head_bias_by_hand():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].bias.data = torch.tensor([-3.0, -1.0, 1.0, 2.0])
    found = head_bias(model, torch.tensor([0, 2]))  # b_V −3, 1; b_R −1, 2
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = {"bias_gap": -1.5, "bsc": 0.4, "mbg": sigma(-1 + 1), "mbs": sigma(-3 + 1)}
    assert found == pytest.approx(expected, abs=1e-4)
    assert head_bias(nn.Sequential(nn.Linear(4, 4, bias=False)), torch.tensor([0])) == {}


def test_selectivity_is_the_difference_of_the_falls():
    class Answers(nn.Module):
        def __init__(self, told):
            super().__init__()
            self.told = told

        def forward(self, pixels):
            return answers(*(self.told[round(255 * float(p))] for p in pixels[:, 0, 0, 0]))

    pictures = Pictures(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([0, 0, 1, 2]))
    source, model = Answers([0, 0, 1, 2]), Answers([1, 0, 1, 3])
    gone, kept = pictures[torch.tensor([0, 1])], pictures[torch.tensor([2, 3])]
    assert selectivity(model, source, kept, gone) == 0  # half of both is lost
    assert selectivity(Answers([1, 1, 1, 2]), source, kept, gone) == 100


def test_damp_is_the_projection_written_out(data):
    work = task(data, Flat(), forget="class:3", alpha=0.5)
    before, x = work.model.layer.weight.detach().clone(), inputs(work.forget.images).flatten(1)
    y = inputs(work.retain.images).flatten(1)
    kept = torch.stack([y[work.retain.labels == k].mean(0) for k in work.retain.labels.unique()])
    lost = x.mean(0)
    _, sizes, rows = torch.linalg.svd(kept)
    count = next(k for k in range(1, 10) if (sizes[:k] ** 2).sum() / (sizes**2).sum() >= 0.99)
    rest = lost - rows[:count].T @ (rows[:count] @ lost)
    q = rest / rest.norm()

    def says_lost(vectors):
        return [bool((v - lost).norm() < min((v - k).norm() for k in kept)) for v in vectors]

    found, alarms = says_lost(x), says_lost(y)
    accuracy = (sum(found) / len(found) + 1 - sum(alarms) / len(alarms)) / 2
    expected = before @ (torch.eye(64) - 0.5 * (2 * accuracy - 1) * torch.outer(q, q))
    bias = work.model.layer.bias.detach().clone()
    damp(work)
    assert torch.allclose(work.model.layer.weight, expected, atol=1e-5) and torch.equal(work.model.layer.bias, bias)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_damp_of_a_convolution_acts_on_the_channels_of_every_tap(data):
    work = task(data, forget="class:3", alpha=100.0)  # wherever it acts, in full
    before = weights(work.model)
    damp(work)
    changed = [name for name, value in weights(work.model).items() if not torch.equal(value, before[name])]
    assert changed and all(name.endswith("weight") for name in changed)
    kernels = [name for name in changed if before[name].ndim == 4 and before[name].shape[-1] == 3]
    for name in kernels:
        change = (weights(work.model)[name] - before[name]).permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 1, "one class, one direction"
    assert kernels


def test_nothing_is_left_where_the_kept_span_all():
    eye = torch.eye(3)
    assert directions(eye[:1] + eye[1:2], eye).shape == (3, 0)
    assert torch.allclose(directions(eye[2:] * 5, eye[:2])[:, 0].abs(), eye[2])


def test_bias_shift_lowers_one_number(data):
    work = task(data, forget="class:3", alpha=2.5)
    before = weights(work.model)
    METHODS["bias_shift"](work)
    after = weights(work.model)
    (name,) = [name for name in after if not torch.equal(after[name], before[name])]
    expected = before[name].clone()
    expected[3] -= 2.5
    assert torch.equal(after[name], expected)


@pytest.mark.parametrize("method", ["ts_bgrm", "lb_hr"])
def test_the_methods_of_the_head_leave_the_rest_to_the_bit(data, method):
    work = task(data, forget="class:3", learning_rate=0.01)
    before = weights(work.model)
    METHODS[method](work)
    changed = {name for name, value in weights(work.model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("network.8.")}


def test_ts_bgrm_against_the_loop(data):
    work, plain = task(data, Flat(), forget="class:3", epochs=2), Flat()
    loop = task(data, plain, forget="class:3", epochs=2)
    kept = [k for k in range(10) if k != 3]
    for rate, epochs, pictures, sign in ((0.01, 2, loop.forget, -1), (0.001, 1, loop.retain, 1)):
        optimizer = torch.optim.AdamW(plain.parameters(), rate, weight_decay=5e-4)
        for _ in range(epochs):
            for pixels, labels in loop.batches(pictures):
                optimizer.zero_grad()
                (sign * F.cross_entropy(plain(pixels), labels)).backward()
                if sign < 0:
                    plain.layer.bias.grad[kept] *= 0.1
                optimizer.step()
    METHODS["ts_bgrm"](work)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(work.model.parameters(), plain.parameters(), strict=True)
    )


def test_lb_hr_against_the_loop(data):
    work, plain = task(data, Flat(), forget="class:3", epochs=3, alpha=4.0), Flat()
    work.model.layer.bias.data -= 0.2  # below its floor
    plain.layer.bias.data -= 0.2
    loop = task(data, plain, forget="class:3", epochs=3)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for rate in (0.01, 0.01, 0.005):
        optimizer.param_groups[0]["lr"] = rate
        for pixels, labels in loop.batches(loop.retain):
            optimizer.zero_grad()
            floor = sum(max(torch.zeros(()), -0.01 - b) ** 2 for b in plain.layer.bias)
            (F.cross_entropy(plain(pixels), labels) + 4 * floor).backward()
            optimizer.step()
    METHODS["lb_hr"](work)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(work.model.parameters(), plain.parameters(), strict=True)
    )


def test_ieu_is_one_step_of_its_formula(data):
    given = {"momentum": 0.0, "weight_decay": 0.1, "learning_rate": 0.04, "alpha": 0.5, "batch_size": 1000}
    work, other = task(data, Flat(), **given), task(data, Flat(), **given)
    plain = deepcopy(work.model)
    kept = F.cross_entropy(plain(inputs(work.retain.images)), work.retain.labels)
    lost = F.cross_entropy(plain(inputs(work.forget.images)), work.forget.labels)
    (kept - 0.5 * torch.minimum(lost, torch.tensor(math.log(10)))).backward()
    list(other.batches(other.forget)), list(other.batches(other.retain))  # draws their order, as the method does
    METHODS["ieu"](work)
    for mine, theirs in zip(work.model.parameters(), plain.parameters(), strict=True):
        noise = 0.2 * 1e-3 * torch.randn(theirs.shape, generator=other.generator)
        assert torch.allclose(mine, (1 - 0.04 * 0.1) * theirs - 0.04 * theirs.grad + noise, atol=1e-6)


def test_methods_for_whole_classes_are_for_them_alone():
    config = Config()
    config.check()
    assert not any(METHODS[name].whole_classes for name in config.methods)
    config = Config(forget="class:3")
    config.check()
    assert config.methods == list(METHODS)
    with pytest.raises(
        SalunError, match="The method damp forgets whole classes, and --forget is random:0.1: give class"
    ):
        Config(methods=["damp"]).check()


def test_a_run_that_forgets_a_class_has_a_second_table(tmp_path):
    (tmp_path / "quick.json").write_text(json.dumps({"method_settings": {"sisa": {"epochs": 1}}}))
    quick = [
        "--limit",
        "400",
        "--epochs",
        "2",
        "--forget",
        "class:3",
        "--methods",
        "bias_shift",
        "sisa",
        "--seeds",
        "0",
    ]
    here("python", "-m", "classification", "run", "--output_dir", tmp_path / "out", *quick,
         "--config", tmp_path / "quick.json")  # fmt: skip
    cell = json.loads((tmp_path / "out/seed-0/bias_shift/results.json").read_text())["metrics"]["classwise"]
    assert set(cell["redistribution"]["score"]) == set("0123456789") and cell["redistribution"]["score"]["3"] == 0
    text = (tmp_path / "out/table.md").read_text()
    assert re.search(rf"^\| BiasShift \| {cell['selectivity']:.1f} \| .*{cell['bias_gap']:.2f}", text, re.M)
    assert re.search(r"^\| SISA \| .*\| – \| – \| – \| – \| [\d.]+ \|$", text, re.M), "an ensemble has no one head"
    document = tmp_path / "d.md"
    document.write_text("<!-- digits-class -->\n<!-- end -->\n")
    here("python", "-m", "classification", "table", "--results", tmp_path / "out/results.json", "--into", document,
         "--output_dir", tmp_path / "none")  # fmt: skip
    assert "| BiasShift |" in document.read_text() and "Selectivity:" in document.read_text()


def test_the_models_of_the_room_have_a_head_with_a_bias(data):
    assert set(head_bias(models.build("resnet8", data, 0), torch.tensor([3]))) == {"bias_gap", "bsc", "mbg", "mbs"}


def test_relearning_is_plain_sgd(data):
    pictures = data.train[torch.arange(60)]
    torch.manual_seed(0)
    model, plain, source = Flat(), Flat(), Flat()
    found = relearning(model, source, pictures, 0)
    x, y = inputs(pictures.images), pictures.labels
    losses, start = [F.cross_entropy(plain(x), y).item()], deepcopy(plain)
    for _ in range(100):
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        for weight in plain.parameters():
            weight.data -= 0.01 * weight.grad
        losses.append(F.cross_entropy(plain(x), y).item())
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), start.parameters(), strict=True)])
    assert found["loss_area"] == pytest.approx(sum(losses) / 101, abs=1e-3)
    assert found["distance"] == pytest.approx(float(moved.norm()), abs=1e-3) and found["steps"] == 0
    assert relearning(start, plain, pictures, 0)["steps"] == 100, "the source's loss is that of the last step"


def test_the_path_of_mcu_is_the_curve_and_one_step_on_it(data):
    work = task(data, Flat(), epochs=1, alpha=0.2, momentum=0.0, weight_decay=0.0, batch_size=1000)
    other = Flat()
    other.layer.weight.data += 1
    path, draw = Path(work.model, other), torch.Generator().manual_seed(0)
    assert all(
        torch.equal(path.at(0.0)[n], path.start[n]) and torch.equal(path.at(1.0)[n], path.end[n]) for n in path.end
    )
    lost, kept = (torch.randperm(len(part), generator=draw) for part in (work.forget, work.retain))
    t = float(torch.rand((), generator=draw))
    a, b = work.model.layer.weight.detach(), other.layer.weight.detach()
    middle = ((a + b) / 2).requires_grad_()
    weight = (1 - t) ** 2 * a + 2 * t * (1 - t) * middle + t**2 * b
    loss = 0
    for rows, part, factor in ((kept, work.retain, 1), (lost, work.forget, -0.2)):
        scores = F.linear(inputs(part.images[rows]).flatten(1), weight, other.layer.bias)
        loss = loss + factor * F.cross_entropy(scores, part.labels[rows])
    loss.backward()
    path.bend(work)
    assert torch.allclose(path.middle["layer.weight"], middle - 0.01 * middle.grad, atol=1e-6)


def test_batch_norms_statistics_are_those_of_the_pictures(data):
    source, part = nn.Sequential(nn.BatchNorm2d(1)), data.train[torch.arange(50)]
    model = Path(source, source).model(0.5, part)
    x = inputs(part.images)
    assert torch.allclose(model[0].running_mean, x.mean()) and torch.allclose(model[0].running_var, x.var())
    assert model[0].momentum == 0.1 and not model.training


def test_the_path_is_drawn_from_the_source_to_its_end(tmp_path):
    quick = ["--limit", "400", "--epochs", "2", "--forget", "class:3", "--methods", "mcu", "--seeds", "0"]
    done = here("python", "-m", "classification", "curve", "--output_dir", tmp_path, *quick)
    found = json.loads((tmp_path / "curve.json").read_text())
    assert f"MCU takes t = {found['chosen']}" in done.stdout and 0.75 <= found["chosen"] <= 1
    assert found["t"][0] == 0 and found["t"][-1] == 1 and len(found["forget"]) == len(found["t"]) == 21
    with PIL.open(tmp_path / "curve.png") as picture:
        assert picture.width > 500

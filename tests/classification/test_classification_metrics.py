"""Data, models and metrics of the classification room."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from torch import nn

from classification import memorisation, metrics, models
from classification.data import Data, Pictures, forget_rows, load, others, spread
from classification.models import Normalised
from classification.training import Recipe, crop, logits, seeded, train
from salun_diffusion.errors import SalunError


@pytest.fixture(scope="module")
def data():
    return load("digits")


def test_the_split_is_one_and_stratified(data):
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1293, 144, 360]
    again = load("digits")
    assert torch.equal(again.train.images, data.train.images) and torch.equal(again.test.labels, data.test.labels)
    assert not torch.equal(load("digits", split_seed=1).train.labels, data.train.labels)
    for part in (data.train, data.validation, data.test):
        shares = torch.bincount(part.labels) / len(part)
        assert (shares - 0.1).abs().max() < 0.02
    whole = torch.cat([data.train.images, data.validation.images, data.test.images]).flatten(1)
    assert len(torch.unique(whole, dim=0)) == 1797, "every picture is in one part"
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape[1:] == (1, 8, 8)


def test_forget_sets(data):
    rows = forget_rows("random:0.1", data, 0)
    assert len(rows) == 129 and torch.equal(rows, forget_rows("random:0.1", data, 0))
    assert not torch.equal(rows, forget_rows("random:0.1", data, 1))
    kept = others(rows, len(data.train))
    assert sorted([*rows.tolist(), *kept.tolist()]) == list(range(len(data.train)))
    three = forget_rows("class:3", data, 0)
    assert (data.train.labels[three] == 3).all() and len(three) == int((data.train.labels == 3).sum())
    scores = torch.zeros(len(data.train))
    scores[[7, 900, 30]] = torch.tensor([0.5, 1.0, 0.9])
    assert {7, 30, 900} <= set(forget_rows("memorised:0.01", data, 0, scores).tolist())


@pytest.mark.parametrize(
    "spec, message",
    [
        ("random:0", "names no share between 0 and 1 of 1293 training pictures"),
        ("random:1", "names no share between 0 and 1"),
        ("random:half", "names no share between 0 and 1"),
        ("random:0.0001", "names no share between 0 and 1"),
        ("class:ten", "There is no class 'ten' in digits; there are: 0, 1, 2"),
        ("class:10", "There is no class '10'"),
        ("class:²", "There is no class '²'"),
        ("some", "'some' is no forget set: give random:0.1, class:NAME, indices:FILE or memorised:0.1"),
        ("indices:nowhere.txt", "nowhere.txt cannot be read as a list of numbers"),
    ],
)
def test_forget_sets_that_cannot_be(data, spec, message):
    with pytest.raises(SalunError, match=message):
        forget_rows(spec, data, 0)


@pytest.mark.parametrize(
    "text, fault",
    [("1 1797", "1797 is outside 0…1796"), ("-1", "-1 is outside"), ("1 1", "twice"), ("", "empty"), ("a", "read")],
)
def test_indices_that_cannot_be(data, tmp_path, text, fault):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(SalunError, match=fault):
        forget_rows(f"indices:{tmp_path / 'rows.txt'}", data, 0)


def test_indices_are_the_data_sets_own_numbers(tmp_path):
    """As its authors count them, and not what a split has left of them: a picture to forget is never held out."""
    whole, numbers = load_digits(), list(range(0, 1797, 31))
    (tmp_path / "rows.txt").write_text(" ".join(map(str, reversed(numbers))))
    spec = f"indices:{tmp_path / 'rows.txt'}"
    found = load("digits", learnt=numbers)
    chosen = found.train[forget_rows(spec, found, 0)]
    expected = torch.from_numpy((whole.images[numbers] * (255 / 16)).round()).to(torch.uint8)
    assert torch.equal(chosen.images[:, 0], expected) and chosen.labels.tolist() == whole.target[numbers].tolist()
    assert [len(part) for part in (found.train, found.validation, found.test)] == [1293, 144, 360]
    with pytest.raises(SalunError, match="rows.txt names \\d+, which is not learnt: --limit, validation or test"):
        forget_rows(spec, load("digits", limit=1000, learnt=numbers), 0)


def test_a_limit_takes_every_class():
    labels = torch.arange(3).repeat_interleave(40)  # in the order of the classes, as folders are read
    assert torch.bincount(labels[spread(labels, 60)]).tolist() == [20, 20, 20]
    assert torch.equal(spread(labels, None), torch.arange(120)) and len(spread(labels, 500)) == 120
    rare = torch.tensor([0] * 100 + [1] * 2 + [2] * 50)
    assert torch.bincount(rare[spread(rare, 15)]).tolist() == [9, 1, 5], "one at least, else the share of each"
    assert spread(torch.arange(10).repeat(40), 60).tolist() == list(range(60)), "the first where they take turns"


def test_what_draws_without_a_generator_is_seeded_too(data):
    found = []
    for _ in range(2):
        model = Normalised(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)), torch.zeros(1), torch.ones(1))
        nn.init.ones_(model.network[2].weight)
        nn.init.zeros_(model.network[2].bias)
        with seeded(5):
            train(model, data.train, Recipe(1, 0.1, 64, augment="none"), torch.Generator().manual_seed(0), "x")
        found.append(model.network[2].weight)
    assert torch.equal(*found)


def test_a_data_set_that_is_not_there():
    with pytest.raises(SalunError, match="could not be loaded as a data set .* give 'digits', one of cifar10"):
        load("/no/such/folder")


@pytest.mark.parametrize("name", models.MODELS)
def test_models_take_small_colour_pictures(name):
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    part = Pictures(images, torch.arange(6))
    data = Data("x", tuple("abcdef"), part, part, part)
    model = models.build(name, data, 0).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 6)
    other = models.build(name, data, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    pixels = images.double() / 255
    assert torch.allclose(model.mean.flatten().double(), pixels.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model.std.flatten().double(), pixels.std((0, 2, 3), unbiased=False), atol=1e-6)


def test_a_small_vit_takes_grey_pictures(data):
    model = models.build("vit_xs", data, 0).eval()
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert model.network.conv_proj.weight.shape == (64, 1, 2, 2), "four patches a side"


def test_models_that_cannot_be(data):
    with pytest.raises(SalunError, match="takes colour pictures, and digits has grey ones"):
        models.build("swin_t", data, 0)


def test_cropping_moves_each_picture_by_itself():
    images = torch.arange(1, 1 + 5 * 3 * 16 * 16).reshape(5, 3, 16, 16)
    moved = crop(images, torch.Generator().manual_seed(0))
    top, left = torch.randint(5, (2, 5), generator=torch.Generator().manual_seed(0))
    for i in range(5):
        padded = torch.zeros(3, 20, 20, dtype=images.dtype)
        padded[:, 2:18, 2:18] = images[i]
        assert torch.equal(moved[i], padded[:, top[i] : top[i] + 16, left[i] : left[i] + 16])


def test_the_published_attack_is_sklearns_svc():
    rng = np.random.default_rng(0)
    forget, retain, test = rng.normal(2, 1, 50), rng.normal(3, 1, 80), rng.normal(1, 1, 80)
    chance = lambda scores: (1 / (1 + np.exp(-scores)))[:, None]  # noqa: E731
    attack = SVC(C=3, kernel="rbf", gamma="auto").fit(
        np.concatenate([chance(retain), chance(test)]), [1] * 80 + [0] * 80
    )
    expected = 100 * (attack.predict(chance(forget)) == 0).mean()
    assert metrics.published_attack(forget, retain, test, 0) == pytest.approx(expected)  # as many as there are members


def test_the_corrected_attack():
    unseen = np.linspace(0, 1, 200)
    assert metrics.corrected_attack(unseen + 2, unseen) == {"auc": 1.0, "tpr": 100.0}
    assert metrics.corrected_attack(unseen, unseen)["auc"] == 0.5
    rng = np.random.default_rng(0)
    forget, others = rng.normal(0.5, 1, 300), rng.normal(0, 1, 1000)
    found = metrics.corrected_attack(forget, others)
    assert found["auc"] == pytest.approx(roc_auc_score([1] * 300 + [0] * 1000, np.r_[forget, others]), abs=1e-4)
    threshold = np.sort(others)[-10]  # ten of a thousand lie at or above it
    assert found["tpr"] == pytest.approx(100 * (forget >= threshold).mean(), abs=0.4)


def test_the_gap_is_the_mean_distance():
    retrain = {"ua": 5.24, "ra": 100.0, "ta": 94.26, "mia": 12.88}  # the paper's Table 1, 10%
    assert metrics.gap({"ua": 1.55, "ra": 99.88, "ta": 93.93, "mia": 13.28}, retrain) == pytest.approx(1.135)
    assert metrics.gap(retrain, retrain) == 0


@pytest.fixture(scope="module")
def learnt(data):
    model = models.build("resnet8", data, 0)
    train(model, data.train, Recipe(4, 0.1, 64, schedule="one-cycle", augment="none"), torch.Generator(), "source")
    return model


def test_every_metric_of_a_model_by_hand(data, learnt):
    forget, retain = data.train[torch.arange(100)], data.train[torch.arange(100, 1293)]
    right = {name: (logits(learnt, part).argmax(1) == part.labels).double().mean().item() * 100
             for name, part in (("f", forget), ("r", retain), ("t", data.test))}  # fmt: skip
    found = metrics.evaluate(learnt, forget, retain, data.test, data.test, 0, goal=right["f"])
    assert found["ua"] == pytest.approx(100 - right["f"], abs=1e-3)
    assert found["ra"] == pytest.approx(right["r"], abs=1e-3) and found["ta"] == pytest.approx(right["t"], abs=1e-3)
    assert found["relearn_epochs"] == 0, "what was never forgotten needs no relearning"
    assert (
        found["counts"]["ta"]["n"] == 360 and found["counts"]["ta"]["low"] < found["ta"] < found["counts"]["ta"]["high"]
    )
    p = logits(learnt, forget).double().softmax(1).gather(1, forget.labels[:, None]).flatten()
    log_odds = metrics.confidence(logits(learnt, forget), forget.labels)
    assert torch.allclose((p / (1 - p)).log(), torch.from_numpy(log_odds), atol=1e-3, rtol=1e-3)


def test_a_fresh_model_has_everything_to_learn(data):
    fresh = models.build("resnet8", data, 1)
    assert metrics.relearn_epochs(fresh, data.train[torch.arange(50)], 100.0, 0) == metrics.RELEARN_EPOCHS


def test_memorisation_is_what_learning_changes(data, monkeypatch):
    """A wrongly labelled picture is answered as labelled only by the models that learnt it."""
    part = data.train[torch.arange(200)]
    labels = part.labels.clone()
    labels[:3] = (labels[:3] + 5) % 10
    monkeypatch.setattr(memorisation, "MODELS", 6)
    recipe = Recipe(25, 0.1, 32, schedule="one-cycle", augment="none", weight_decay=0)
    found = memorisation.scores(lambda k: models.build("resnet8", data, k), Pictures(part.images, labels), recipe, 0)
    assert found.shape == (200,) and found.abs().max() <= 1
    assert found[:3].mean() > 0.6 > 0.3 > found[3:].mean()

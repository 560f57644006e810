"""The mask: exactly the top share of all scores, against a sort that one can read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salun_diffusion import SalunError
from salun_diffusion.masks import SALIENCY, saliency
from salun_diffusion.masks.saliency import top_density


def by_argsort(scores, density):
    """Slow twin: sort all scores, highest first, earlier weights first among equals; keep ⌊ρN⌋."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    order = torch.argsort(flat, descending=True, stable=True)
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[: int(len(flat) * density + 1e-9)]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == torch.bool and torch.equal(found[name], expected[name]), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=4),
    percent=st.integers(1, 100),
    levels=st.sampled_from([1, 2, 5, 1000]),  # few levels make many ties
)
def test_matches_argsort(seed, shapes, percent, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"p{i}": torch.randint(levels, shape, generator=generator).float() * 1e-3 for i, shape in enumerate(shapes)
    }
    if int(percent * sum(s.numel() for s in scores.values()) / 100 + 1e-9) == 0:
        with pytest.raises(SalunError, match="keeps no weight"):
            top_density(scores, percent / 100)
    else:
        assert_same(top_density(scores, percent / 100), by_argsort(scores, percent / 100))


@pytest.mark.parametrize("density", [0.1, 0.29, 0.5, 1.0])
def test_continuous_scores_over_many_magnitudes(density):
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-38, 30, (300, 100), generator=generator)
    scores = {
        "wide": torch.rand(300, 100, generator=generator) * 10.0**exponents,  # subnormals among them
        "zeros": torch.zeros(77),
        "scalar": torch.tensor(0.5),
    }
    found = top_density(scores, density)
    assert_same(found, by_argsort(scores, density))
    assert sum(int(m.sum()) for m in found.values()) == round(30078 * density - 0.4999)


def test_chunks_do_not_change_the_mask(monkeypatch):
    scores = {"a": torch.rand(1000).round(decimals=2), "b": torch.rand(333)}
    whole = top_density(scores, 0.37)
    monkeypatch.setattr(saliency, "CHUNK", 7)
    assert_same(top_density(scores, 0.37), whole)


def test_scores_are_the_absolute_sum_of_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    data = torch.randn(4, 6, 5)
    found = saliency.scores(dict(layer.named_parameters()), [lambda x=x: layer(x).square().mean() for x in data])
    total = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for x in data:
        grads = torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad
    for name in total:
        torch.testing.assert_close(found[name], total[name].abs(), rtol=0, atol=0)
    assert all(p.grad is None for p in layer.parameters())


def test_other_scores_are_what_they_say():
    """Each weight by weight, against loops over single weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    parameters = dict(layer.named_parameters())
    losses = [lambda x=x: layer(x).square().mean() for x in torch.randn(5, 6, 4)]
    others = [lambda x=x: layer(x).abs().mean() for x in torch.randn(5, 6, 4)]

    def gradients(losses, name, place):
        return [float(torch.autograd.grad(loss(), parameters[name])[0].flatten()[place]) for loss in losses]

    found = {
        "gradient-weight": saliency.times_weights(saliency.scores(parameters, losses), parameters),
        "fisher": saliency.scores(parameters, losses, square=True),
        "contrast": saliency.contrast(saliency.scores(parameters, losses), saliency.scores(parameters, others)),
        "magnitude": saliency.magnitudes(parameters),
        "random": saliency.random_scores(parameters, torch.Generator().manual_seed(1)),
    }
    assert {*found, "gradient"} == {*SALIENCY}
    sums = [abs(sum(gradients(others, name, i))) for name, p in parameters.items() for i in range(p.numel())]
    for name, parameter in parameters.items():
        for i, weight in enumerate(parameter.flatten().tolist()):
            own = gradients(losses, name, i)
            other = abs(sum(gradients(others, name, i)))
            wanted = {
                "gradient-weight": abs(sum(own) * weight),
                "fisher": sum(one**2 for one in own),
                "contrast": abs(sum(own)) / (1 + other / (sum(sums) / len(sums))),
                "magnitude": abs(weight),
            }
            for kind, value in wanted.items():
                assert float(found[kind][name].flatten()[i]) == pytest.approx(value, rel=1e-5), (kind, name, i)
    generator = torch.Generator().manual_seed(1)
    assert all(
        torch.equal(found["random"][name], torch.rand(p.shape, generator=generator)) for name, p in parameters.items()
    )


def test_scores_do_not_count_what_an_earlier_backward_left():
    layer = torch.nn.Linear(3, 1, bias=False)
    layer(torch.tensor([[5.0, -1.0, 1.0]])).sum().backward()
    left = layer.weight.grad
    found = saliency.scores(dict(layer.named_parameters()), [lambda: layer(torch.ones(1, 3)).sum()])
    assert found["weight"].tolist() == [[1, 1, 1]]
    assert layer.weight.grad is left and left.tolist() == [[5, -1, 1]]


def test_scores_of_half_precision_weights_are_summed_in_fp32():
    layer = torch.nn.Linear(1, 1, bias=False).bfloat16()
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    losses = [lambda: layer(one).sum()] + [lambda: layer(one).sum() * 2**-9] * 4
    # In bfloat16, 1 + 2⁻⁹ is 1 again each time; the sum must not stall there.
    assert saliency.scores(dict(layer.named_parameters()), losses)["weight"].item() == 1 + 4 * 2**-9


def test_bad_scores_are_refused():
    layer = torch.nn.Linear(2, 2)
    parameters = dict(layer.named_parameters())
    with pytest.raises(SalunError, match="saliency of weight is not finite"):
        saliency.scores(parameters, [lambda: layer(torch.full((1, 2), float("inf"))).sum()])
    with pytest.raises(SalunError, match="zero everywhere"):
        saliency.scores(parameters, [lambda: layer(torch.ones(1, 2)).sum() * 0])


@pytest.mark.parametrize("density", [0, -0.5, 1.01, 0.001])
def test_density_out_of_range(density):
    with pytest.raises(SalunError, match="give a share"):
        top_density({"a": torch.rand(10)}, density)


def test_a_threshold_for_each_layer():
    generator = torch.Generator().manual_seed(0)
    scores = {"loud": 100 * torch.rand(10, 10, generator=generator), "quiet": torch.rand(31, generator=generator)}
    scores["scale"] = torch.ones(2)
    found = saliency.select(scores, 0.3, "layer")
    for name in ("loud", "quiet"):
        assert_same({name: found[name]}, by_argsort({name: scores[name]}, 0.3))
    assert not found["scale"].any()
    assert int(saliency.select(scores, 0.3)["loud"].sum()) > int(found["loud"].sum())
    with pytest.raises(SalunError, match="selects no weight"):
        saliency.select({"scale": torch.ones(2)}, 0.3, "layer")

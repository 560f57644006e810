"""The masked-delta file and the fingerprint of the base model."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from salun_diffusion.erasures.delta import DTYPES, Delta
from salun_diffusion.erasures.fingerprint import Fingerprint, _number, _origins, _place, _round, fingerprint, matches
from salun_diffusion.erasures.merge import PIECE, checksum, merge
from salun_diffusion.errors import SalunError
from salun_diffusion.tensors import is_finite, read_safetensors

SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
HALF, BRAIN = torch.float16, torch.bfloat16
ROUNDINGS = [(), (HALF,), (BRAIN,), (HALF, BRAIN), (BRAIN, HALF)]  # what the format says that a base may have seen


def random_delta(shapes, seed=0, dtype=torch.float32, share=0.5, **metadata):
    generator = torch.Generator().manual_seed(seed)
    base = {f"block.{i}.weight": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    base["bias"] = torch.randn(11, generator=generator)  # at least one weight changes
    masks = {name: torch.rand(weight.shape, generator=generator) < share for name, weight in base.items()}
    masks["bias"][3] = True
    values = {n: (0.01 * torch.randn(int(m.sum()), generator=generator)).to(dtype) for n, m in masks.items()}
    return base, Delta(masks, values, fingerprint(base.items()), metadata)


def same_delta(a, b):
    return (
        a.masks.keys() == b.masks.keys()
        and all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)
        and all(torch.equal(a.values[name], b.values[name]) for name in a.masks)
        and all(a.values[name].dtype == b.values[name].dtype for name in a.masks)
        and a.fingerprint.structure == b.fingerprint.structure
        and torch.equal(a.fingerprint.samples, b.fingerprint.samples)
        and a.metadata == b.metadata
    )


def merged(original, terms):
    """What `merge` makes of `original` with `terms`, a list of (delta, name, scale)."""
    weight = torch.empty_like(original)
    terms = [(delta.packed(name), delta.values[name], scale) for delta, name, scale in terms]
    seen = merge(original.reshape(-1), terms, weight.view(-1))
    assert seen.fits == bool(weight.isfinite().all()) and seen.checksum == checksum(weight)
    return weight


def slow_merge(original, terms):
    """One weight at a time: add up, in float32, the next values of all whose mask is set here, and round the sum."""
    result, taken = original.flatten().clone(), [0] * len(terms)
    for i in range(len(result)):
        moves = []
        for number, (delta, name, scale) in enumerate(terms):
            if delta.masks[name].flatten()[i]:
                moves.append(np.float32(delta.values[name][taken[number]].float().item()) * np.float32(scale))
                taken[number] += 1
        if moves:
            result[i] = torch.tensor(np.float32(result[i].float().item()) + sum(moves, np.float32(0)))
    return result.view(original.shape)


@settings(max_examples=30, deadline=None)
@given(st.lists(SHAPES, max_size=3), st.integers(0, 99), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.3, 1.0]))
def test_round_trip(tmp_path_factory, shapes, seed, dtype, share):
    path = tmp_path_factory.mktemp("delta") / "erasure.safetensors"
    metadata = {"concept": "a cat", "density": 0.5, "base_model": "x/y", "settings": {"lr": 1e-4}, "steps": 3}
    _, delta = random_delta(shapes, seed, dtype, share, **metadata)
    delta.save(path)
    assert same_delta(Delta.load(path), delta)
    again = path.with_name("again")
    Delta.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()
    assert Delta.load(path).digest() == delta.digest()


@settings(max_examples=60, deadline=None)
@given(
    SHAPES,
    st.integers(0, 99),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from([1.0, -0.7, 0.0]), max_size=3),
    st.sampled_from([8, 64, PIECE]),
)
def test_merge_equals_the_slow_twin(shape, seed, stored, dtype, scales, piece):
    base, _ = random_delta([shape], seed)
    deltas = [random_delta([shape], seed + number, stored)[1] for number in range(len(scales))]
    for name, weight in base.items():
        original = weight.to(dtype)
        terms = [(delta, name, scale) for delta, scale in zip(deltas, scales, strict=True)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("salun_diffusion.erasures.merge.PIECE", piece)
            assert torch.equal(merged(original, terms), slow_merge(original, terms))
        for delta in deltas:
            dense = delta.dense(name)
            assert dense.dtype == torch.float32
            assert torch.equal(dense, slow_merge(torch.zeros(weight.shape), [(delta, name, 1.0)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [3e38, 7e4, -7e4, 1.0, float("inf"), float("nan")])
def test_merge_tells_what_the_dtype_cannot_hold(dtype, value):
    one = torch.ones(9, dtype=torch.bool)
    delta = Delta({"a": one}, {"a": torch.full((9,), 1.0)}, fingerprint([("a", torch.zeros(9))]), {})
    merged(torch.full((9,), value).to(dtype), [(delta, "a", 1.0)])  # which looks for itself
    for scale in (3e38, 1e39, -7e4):
        merged(torch.zeros(9, dtype=dtype), [(delta, "a", scale)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_finite(dtype):
    assert is_finite(torch.zeros(0, dtype=dtype)) and is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    for odd in (torch.nan, torch.inf, -torch.inf):
        for place in range(40):
            values = torch.randn(40).to(dtype)
            values[place] = odd
            assert not is_finite(values)


def test_merge_adds_several_before_it_rounds():
    original = torch.ones(1, dtype=HALF)
    one = torch.ones(1, dtype=torch.bool)
    tiny = Delta({"a": one}, {"a": torch.tensor([0.0004])}, fingerprint([("a", original)]), {})
    assert merged(original, [(tiny, "a", 1.0)]).item() == 1.0  # below half an ulp of float16 at 1
    assert merged(original, [(tiny, "a", 1.0)] * 3).item() == 1 + 2**-10


def test_unmasked_weights_keep_their_bits():
    original = torch.tensor([-0.0, -0.0])
    mask = torch.tensor([True, False])
    delta = Delta({"a": mask}, {"a": torch.tensor([0.0])}, fingerprint([("a", original)]), {})
    for times in (1, 2):
        assert merged(original, [(delta, "a", 1.0)] * times).signbit().tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_gives_exactly_the_trained_weights(tmp_path, dtype):
    base, delta = random_delta([(7, 5), (3, 2, 3, 3)], 1)
    if dtype != torch.float32:
        delta = delta.quantised(dtype)  # what a trainer does before it evaluates
    trained = {name: weight + delta.dense(name) for name, weight in base.items()}
    delta.save(tmp_path / "a", dtype=dtype)
    loaded = Delta.load(tmp_path / "a")
    assert {value.dtype for value in loaded.values.values()} == {dtype}
    for name, weight in base.items():
        assert torch.equal(merged(weight, [(loaded, name, 1.0)]), trained[name])
        for other in (HALF, BRAIN):  # and on a pipeline of another dtype: the trained delta on the rounded base
            expected = (weight.to(other).float() + delta.dense(name)).to(other)
            assert torch.equal(merged(weight.to(other), [(loaded, name, 1.0)]), expected)


def test_the_file_is_what_the_docstring_says(tmp_path):
    _, delta = random_delta([(3, 5)], concept="cat", density=0.5)
    delta.save(tmp_path / "a", dtype=HALF)
    tensors, text = read_safetensors(tmp_path / "a")
    names = ["bias", "block.0.weight"]
    assert set(tensors) == {"fingerprint", *(f"{name}.{kind}" for name in names for kind in ("mask", "delta"))}
    assert tensors["fingerprint"].shape == (2, 16) and tensors["fingerprint"].dtype == torch.float32
    for name in names:
        taken = iter(tensors[f"{name}.delta"].tolist())
        mask, size = tensors[f"{name}.mask"], delta.masks[name].numel()
        dense = [next(taken) if mask[i // 8] >> (i % 8) & 1 else 0.0 for i in range(size)]
        assert next(taken, None) is None
        assert torch.equal(torch.tensor(dense), delta.quantised(HALF).dense(name).flatten())
    assert text["concept"] == "cat" and text["density"] == "0.5" and text["format"] == "salun-delta"
    assert json.loads(text["version"]) == 1
    assert json.loads(text["shapes"]) == {"block.0.weight": [3, 5], "bias": [11]}
    # half of the weights in float16: well under the two bytes a weight of the dense float16 tensors
    _, large = random_delta([(256, 256)])
    large.save(tmp_path / "large", dtype=HALF)
    assert (tmp_path / "large").stat().st_size < 0.6 * 2 * 256 * 256


def test_quantised_and_save_refuse(tmp_path):
    _, delta = random_delta([(3, 5)])
    delta.values["bias"][0] = 1e5
    assert delta.quantised(BRAIN).values["bias"].dtype == BRAIN
    for refused in (lambda: delta.quantised(HALF), lambda: delta.save(tmp_path / "a", dtype=HALF)):
        with pytest.raises(SalunError, match=r"delta of bias overflows in float16 \(largest value 65504\); choose bfl"):
            refused()
    with pytest.raises(SalunError, match="stored in float32, float16, bfloat16 or int8, not torch.float64"):
        delta.save(tmp_path / "a", dtype=torch.float64)
    with pytest.raises(SalunError, match="the format itself fills the metadata version"):
        Delta(delta.masks, delta.values, delta.fingerprint, {"version": 7}).save(tmp_path / "a")
    delta.values["bias"][0] = float("nan")
    with pytest.raises(SalunError, match=r"Cannot write .*: NaN or Inf in bias; lower the learning rate"):
        delta.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_unsound_delta_cannot_be_made():
    mask, print_ = torch.tensor([True, False]), fingerprint([("a", torch.ones(2))])
    cases = [
        ({"a": mask}, {}, "every parameter needs a mask and values, but a has only one"),
        ({"a": mask}, {"a": torch.ones(2)}, r"a needs a bool mask and one value for each of its 1 chosen weights"),
        ({"a": mask}, {"a": torch.ones(1, 1)}, r"not a mask of torch.bool and values of shape \(1, 1\)"),
        ({"a": mask.byte()}, {"a": torch.ones(1)}, r"not a mask of torch.uint8"),
        ({"a": mask}, {"a": torch.ones(1).double()}, "one dtype of float32, float16, bfloat16, not float64"),
        ({"a": mask, "b": mask}, {"a": torch.ones(1), "b": torch.ones(1).half()}, "not float16, float32"),
        ({"a": mask & False}, {"a": torch.ones(0)}, "the mask selects no weight at all"),
        ({}, {}, "the mask selects no weight at all"),
        ({"a": mask}, {"a": torch.tensor([float("inf")])}, "NaN or Inf in a"),
    ]
    for masks, values, sentence in cases:
        with pytest.raises(SalunError, match=sentence):
            Delta(masks, values, print_, {})


def test_loading_refuses(tmp_path):
    path = tmp_path / "erasure.safetensors"
    random_delta([(3, 5)])[1].save(path)
    tensors, text = read_safetensors(path)
    name = "block.0.weight"

    def without(mapping, key):
        return {k: v for k, v in mapping.items() if k != key}

    cases = [
        (tensors, {**text, "format": "salun-mask"}, r"is not a salun-delta file \(its metadata says 'salun-mask'\)"),
        (tensors, {**text, "version": "9"}, "has version 9 of the salun-delta format where 1 and 2 are known"),
        (tensors, without(text, "shapes"), "'shapes' must map"),
        (tensors, without(text, "structure"), r"its fingerprint of the base model is not float32 \[P, 16\]"),
        ({**tensors, "fingerprint": torch.zeros(2, 3)}, text, "its fingerprint of the base model is not"),
        (without(tensors, "fingerprint"), text, "it lacks the tensors fingerprint"),
        (without(tensors, f"{name}.delta"), text, "it lacks the tensors block.0.weight.delta"),
        ({**tensors, "else.delta": torch.ones(1)}, text, "holds tensors that its metadata does not name: else.delta"),
        ({**tensors, f"{name}.delta": torch.ones(15)}, text, "is damaged: the delta: block.0.weight needs a bool mask"),
        ({**tensors, f"{name}.mask": torch.ones(1)}, text, "block.0.weight.mask: a packed mask of shape"),
        ({**tensors, "bias.delta": tensors["bias.delta"] * torch.inf}, text, "holds NaN or Inf in bias.delta"),
    ]
    for changed, metadata, sentence in cases:
        save_file(changed, path, metadata)
        with pytest.raises(SalunError, match=sentence) as caught:
            Delta.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def slow_int8(mask, values):
    """Row by row, value by value, in Python's numbers."""
    result, taken = [], 0
    for row in mask if mask.ndim > 1 else [mask]:
        own = [float(value) for value in values[taken : taken + int(row.sum())]]
        taken += len(own)
        scale = float((torch.tensor(max(map(abs, own), default=0.0)) / 127).bfloat16()) or 1.0
        result += [max(-127, min(127, round(value / scale))) * scale for value in own]
    return torch.tensor(result)


@settings(max_examples=30, deadline=None)
@given(st.lists(SHAPES, max_size=3), st.integers(0, 99), st.sampled_from([0.0, 0.1, 1.0]))
def test_int8(tmp_path_factory, shapes, seed, share):
    """A scale a row; what was rounded once stays as it is, in the file, in memory and again."""
    path = tmp_path_factory.mktemp("delta") / "erasure.safetensors"
    base, delta = random_delta(shapes, seed, share=share)
    rounded = delta.quantised(torch.int8)
    for name, mask in delta.masks.items():
        torch.testing.assert_close(rounded.values[name], slow_int8(mask, delta.values[name]), rtol=0, atol=1e-7)
    delta.save(path, torch.int8)
    tensors, text = read_safetensors(path)
    assert text["version"] == "2" and "component" not in text
    assert {tensors[f"{name}.delta"].dtype for name in base} == {torch.int8}
    again = Delta.load(path)
    assert again.int8 and same_delta(again, rounded) and again.digest() == rounded.digest()
    again.save(path.with_name("again"))
    assert path.with_name("again").read_bytes() == path.read_bytes()
    assert same_delta(again.quantised(torch.int8), again)
    assert not again.quantised(HALF).int8


def test_damaged_int8_values_are_refused(tmp_path):
    path = tmp_path / "erasure.safetensors"
    random_delta([(3, 5)])[1].save(path, torch.int8)
    tensors, text = read_safetensors(path)
    name, sentence = "block.0.weight", "int8 values of block.0.weight and their scales do not fit together"
    for changed in (
        {f"{name}.delta": tensors[f"{name}.delta"] // 2},
        {f"{name}.delta": torch.full_like(tensors[f"{name}.delta"], -128)},
        {f"{name}.delta": tensors[f"{name}.delta"].float()},
        {f"{name}.scale": tensors[f"{name}.scale"].float()},
        {f"{name}.scale": tensors[f"{name}.scale"][:2]},
        {f"{name}.scale": -tensors[f"{name}.scale"]},
    ):
        save_file(tensors | changed, path, text)
        with pytest.raises(SalunError, match=sentence):
            Delta.load(path)
    save_file(tensors, path, text | {"version": "1"})
    with pytest.raises(SalunError, match="holds tensors that its metadata does not name: bias.scale"):
        Delta.load(path)


def test_digest_tells_contents_apart():
    _, delta = random_delta([(3, 5)])
    digests = {delta.digest(), delta.quantised(HALF).digest()}
    delta.values["bias"][0] += 1
    digests.add(delta.digest())
    flat = Delta(
        {name: mask.flatten() for name, mask in delta.masks.items()}, delta.values, delta.fingerprint, {"concept": "x"}
    )
    digests.add(flat.digest())
    assert len(digests) == 4
    assert Delta(delta.masks, delta.values, delta.fingerprint, {"concept": "y"}).digest() == delta.digest()


# The fingerprint


def model(seed=0):
    """Weights as a network has them: normal ones of several sizes, tiny ones, zeros and ones, one number, none."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"w{i}": torch.randn(32, 9, generator=generator) * 0.5**i for i in range(12)}
    weights["tiny"] = torch.randn(64, generator=generator) * 1e-6  # subnormal in float16
    weights["tinier"] = torch.randn(64, generator=generator) * 1e-9  # zero in float16
    weights["large"] = torch.randn(64, generator=generator) * 1e3
    return weights | {"zeros": torch.zeros(9), "ones": torch.ones(9), "one": torch.tensor(0.3), "none": torch.zeros(0)}


def rounded(weights, rounding):
    for dtype in rounding:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    return weights


def test_fingerprint_samples_and_structure():
    weights = {"b": torch.arange(31.0), "a": torch.tensor(0.5), "c": torch.zeros(0), "d": torch.arange(3.0)}
    print_ = fingerprint(weights.items())
    assert print_.samples.tolist() == [
        [0.5] * 16,
        [2.0 * k for k in range(16)],
        [0.0] * 16,
        [float(k * 2 // 15) for k in range(16)],
    ]
    again = fingerprint(reversed(weights.items()))
    assert print_.digest() == again.digest() and len(print_.digest()) == 16 and int(print_.digest(), 16) >= 0
    assert fingerprint((weights | {"b": torch.arange(31.0) + 1}).items()).digest() != print_.digest()
    for other in (weights | {"d": torch.arange(3.0)[None]}, weights | {"e": torch.zeros(1)}):
        assert fingerprint(other.items()).structure != print_.structure
        assert not matches(print_, fingerprint(other.items()))
    picture = torch.randn(4, 4, 3, 3)
    layouts = [fingerprint([("a", picture)]), fingerprint([("a", picture.to(memory_format=torch.channels_last))])]
    assert torch.equal(layouts[0].samples, layouts[1].samples)


@pytest.mark.parametrize("ours", ROUNDINGS)
@pytest.mark.parametrize("theirs", ROUNDINGS)
def test_the_same_model_is_recognised_in_every_dtype(ours, theirs):
    for seed in range(3):
        a = fingerprint(rounded(model(seed), ours).items())
        b = fingerprint(rounded(model(seed), theirs).items())
        assert matches(a, b) and matches(b, a)
        assert not matches(a, fingerprint(rounded(model(seed + 1), theirs).items()))


def test_norms_may_be_kept_in_float32():
    weights = model()
    kept = {"w0": weights["w0"], "large": weights["large"]}
    for rounding in ROUNDINGS:
        mixed = fingerprint((rounded(weights, rounding) | kept).items())
        for other in ROUNDINGS:
            assert matches(mixed, fingerprint(rounded(weights, other).items()))


def fine_tuned(change, of_each_weight):
    """A model and a fine-tune: each weight moves by about `change` of itself, or of its tensor's standard deviation."""
    base, generator = model(), torch.Generator().manual_seed(9)
    base |= {f"more{i}": torch.randn(32, 9, generator=generator) for i in range(60)}
    tuned = {}
    for name, weight in base.items():
        size = weight if of_each_weight else weight.std() if weight.numel() > 1 else 0
        tuned[name] = weight + change * size * torch.randn(weight.shape, generator=generator)
    return base, tuned


@pytest.mark.parametrize("change, of_each_weight", [(1e-3, True), (1e-4, False)])
@pytest.mark.parametrize("ours", ROUNDINGS)
@pytest.mark.parametrize("theirs", ROUNDINGS)
def test_a_fine_tune_is_refused_in_every_dtype(ours, theirs, change, of_each_weight):
    base, tuned = fine_tuned(change, of_each_weight)
    assert not matches(fingerprint(rounded(base, ours).items()), fingerprint(rounded(tuned, theirs).items()))


@pytest.mark.parametrize("ours", ROUNDINGS)
@pytest.mark.parametrize("theirs", ROUNDINGS)
def test_a_fine_tune_of_a_ten_thousandth_of_each_weight(ours, theirs):
    base, tuned = fine_tuned(1e-4, of_each_weight=True)
    # The limit that the format states: less than half an ulp of float16 is lost between float16 and bfloat16.
    lost = {ours[:1], theirs[:1]} == {(HALF,), (BRAIN,)}
    if not lost:
        assert not matches(fingerprint(rounded(base, ours).items()), fingerprint(rounded(tuned, theirs).items()))


def test_a_fine_tune_of_one_layer_is_refused():
    base = model()
    tuned = base | {"w3": base["w3"] * 1.01}
    for ours in ROUNDINGS:
        assert not matches(fingerprint(rounded(base, ours).items()), fingerprint(rounded(tuned, ours).items()))


@settings(max_examples=100, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=6e4, min_value=-6e4))
def test_origins_are_exactly_the_weights_that_round_to_the_sample(number):
    weight = torch.tensor([[number]])
    assert torch.equal(_number(_place(weight)), weight)
    for rounding in ROUNDINGS:
        sample = _round(weight, rounding)
        low, high = _origins(sample, rounding)
        assert low <= _place(weight) <= high
        assert _round(_number(low), rounding) == sample == _round(_number(high), rounding)
        assert _round(_number(low - 1), rounding) < sample < _round(_number(high + 1), rounding)


def test_origins_of_a_sample_that_was_never_rounded_are_itself():
    weight = torch.tensor([[1 + 2**-20, 1.0]])
    for rounding in ROUNDINGS:
        low, high = _origins(weight, rounding)
        assert torch.equal(low, _place(weight)) and torch.equal(high, low)


def test_fingerprint_refuses():
    with pytest.raises(SalunError, match="The model holds NaN or Inf in b; load a sound copy"):
        fingerprint([("a", torch.ones(3)), ("b", torch.full((3,), torch.nan))])
    with pytest.raises(SalunError, match=r"on the meta device .*before enable_sequential_cpu_offload\(\)"):
        fingerprint([("a", torch.ones(3, device="meta"))])
    samples = torch.zeros(1, 16)
    assert not matches(Fingerprint("x", samples), Fingerprint("x", torch.zeros(2, 16)))


def test_another_reader_can_open_the_file(tmp_path):
    _, delta = random_delta([(3, 5)])
    delta.save(tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["bias.delta"], delta.values["bias"])

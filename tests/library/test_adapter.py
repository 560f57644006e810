"""An erasure trained as a low-rank adapter: what stock diffusers makes of it, what the loader does, how it resumes."""

import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shell import QUICK, ROOT, here, run

from benchmarks import ranks
from eval.subjects import introduce
from salun_diffusion import (
    SalunError,
    erase,
    fuse_erasure,
    list_erasures,
    load_erasure,
    push,
    set_erasure_scale,
    unload_erasure,
)
from salun_diffusion.erasures.adapter import Adapter
from salun_diffusion.erasures.fingerprint import fingerprint
from salun_diffusion.export import export
from salun_diffusion.masks.ranks import salient_ranks
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.models import load_model
from salun_diffusion.training.adapter import AdapterChange

FILE = "pytorch_lora_weights.safetensors"
SHORT = {
    "num_forget_images": 4, "num_retain_images": 4, "num_inference_steps": 3, "max_train_steps": 3,
    "train_batch_size": 2, "learning_rate": 1e-2, "adapter": "lora", "rank": 3,
}  # fmt: skip


def opened(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_folder):
    return opened(tiny_folder)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """The run folder of an adapter on resnets and cross-attention, layers chosen by saliency."""
    folder = tmp_path_factory.mktemp("adapter")
    return erase(str(tiny_folder), "cat", output_dir=folder / "run", data_dir=str(folder / "data"), **SHORT).path


def draw(pipe, prompt="a cat"):
    noise = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=noise, output_type="pt").images


def test_stock_diffusers_takes_the_run_folder(adapter, pipe):
    base, untouched = draw(pipe), tiny.bits(pipe)
    pipe.load_lora_weights(str(adapter), adapter_name="theirs")
    full = draw(pipe)
    pipe.set_adapters(["theirs"], [0.5])
    half = draw(pipe)
    pipe.unload_lora_weights()
    assert not torch.equal(full, base) and not torch.equal(half, base) and not torch.equal(half, full)
    parameters = {name: id(p) for name, p in pipe.unet.named_parameters()}
    assert load_erasure(pipe, adapter) == "cat"
    assert torch.equal(draw(pipe), full)
    set_erasure_scale(pipe, "cat", 0.5)
    assert torch.equal(draw(pipe), half)
    (told,) = list_erasures(pipe)
    assert (told["name"], told["scale"], told["intact"], told["method"]) == ("cat", 0.5, True, "salun")
    unload_erasure(pipe)
    assert tiny.same(untouched, tiny.bits(pipe)) and list_erasures(pipe) == []
    assert parameters == {name: id(p) for name, p in pipe.unet.named_parameters()}


def test_its_file_says_what_it_is(adapter, pipe):
    with safe_open(adapter / FILE, "pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    assert (metadata["format"], metadata["concept"], metadata["method"]) == ("salun-lora", "cat", "salun")
    assert json.loads(metadata["rank"]) == 3 and json.loads(metadata["versions"])["salun_diffusion"]
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.alpha_pattern"] == config["unet.rank_pattern"] and config["unet.lora_alpha"] == config["unet.r"]
    erasure = Adapter.load(adapter / FILE)
    assert config["unet.target_modules"] == sorted(erasure.factors)
    ranks = {len(down) for down, _ in erasure.factors.values()}
    assert min(ranks) >= 2 and max(ranks) <= 6  # half to twice the rank
    assert not (adapter / "mask.safetensors").exists() and (adapter / "config.json").exists()


def test_it_goes_to_the_hub_as_it_is(adapter, tmp_path):
    found = push(adapter, "me/without-cats", dry_run=str(tmp_path / "card"))
    assert found.files == sorted([FILE, "README.md", "config.json"])
    assert (tmp_path / "card" / FILE).read_bytes() == (adapter / FILE).read_bytes()
    assert 'pipe.load_lora_weights("me/without-cats")' in (tmp_path / "card" / "README.md").read_text(encoding="utf-8")


def test_beside_other_adapters_and_a_masked_delta(adapter, pipe, tmp_path):
    """Each comes off alone, in any order; an adapter that diffusers switches off is told, and brought back."""
    untouched, base = tiny.bits(pipe), draw(pipe)
    load_erasure(pipe, adapter)
    alone = draw(pipe)
    tiny.erasure(pipe.unet, only="attn2.to_", concept="other").save(tmp_path / "erasure.safetensors")
    with pytest.raises(SalunError, match="already applied"):
        load_erasure(pipe, adapter)
    unload_erasure(pipe)
    tiny.erasure(pipe.unet, concept="other").save(tmp_path / "erasure.safetensors")
    load_erasure(pipe, tmp_path)
    masked = draw(pipe)
    load_erasure(pipe, adapter)
    both = draw(pipe)
    assert [one["intact"] for one in list_erasures(pipe)] == [True, True]
    unload_erasure(pipe, "other")
    assert torch.equal(draw(pipe), alone)
    load_erasure(pipe, tmp_path)
    assert torch.equal(draw(pipe), both)
    unload_erasure(pipe, "cat")
    assert torch.equal(draw(pipe), masked)
    unload_erasure(pipe)

    pipe.load_lora_weights(str(adapter), adapter_name="style")
    pipe.set_adapters(["style"], [0.3])
    style = draw(pipe)
    load_erasure(pipe, adapter)
    assert not torch.equal(draw(pipe), style) and len(pipe.get_active_adapters()) == 2
    pipe.set_adapters(["style"], [0.3])
    assert [one["intact"] for one in list_erasures(pipe)] == [False] and torch.equal(draw(pipe), style)
    set_erasure_scale(pipe, "cat", 1.0)
    assert [one["intact"] for one in list_erasures(pipe)] == [True]
    unload_erasure(pipe)
    assert torch.equal(draw(pipe), style) and pipe.get_active_adapters() == ["style"]
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base) and tiny.same(untouched, tiny.bits(pipe))


def test_fused_it_is_in_the_weights(adapter, pipe, tmp_path):
    load_erasure(pipe, adapter, scale=0.7)
    worn, names = draw(pipe), {name for name, _ in opened(pipe.name_or_path).unet.named_parameters()}
    erasure, before = Adapter.load(adapter / FILE), dict(opened(pipe.name_or_path).unet.named_parameters())
    fuse_erasure(pipe)
    assert {name for name, _ in pipe.unet.named_parameters()} == names and list_erasures(pipe) == []
    assert torch.allclose(draw(pipe), worn, atol=1e-4)
    for name, (down, up) in erasure.factors.items():  # the plain sum, by hand
        weight = before[f"{name}.weight"]
        product = (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)
        expected = (weight.double() + 0.7 * product).float()
        assert torch.allclose(pipe.unet.get_parameter(f"{name}.weight"), expected, atol=1e-6)
    pipe.save_pretrained(tmp_path / "fused")
    with pytest.raises(SalunError, match="already erased by it"):
        load_erasure(opened(tmp_path / "fused"), adapter)


def test_it_is_refused_where_it_does_not_belong(adapter, pipe, tiny_folder, tmp_path):
    other = tiny.build(tmp_path / "other", seed=1)
    untouched = tiny.bits(other)
    with pytest.raises(SalunError, match="was made for another base model.*fingerprint"):
        load_erasure(other, adapter)
    assert tiny.same(untouched, tiny.bits(other))
    load_erasure(other, adapter, check_base=False)
    unload_erasure(other)
    assert tiny.same(untouched, tiny.bits(other))
    layer, base = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", fingerprint(pipe.unet.named_parameters())
    change = AdapterChange(pipe, pipe.unet, {layer: 2}, seed=0)
    change.save(tmp_path / FILE, base, {"concept": "x"}, torch.float16)
    change.restore()
    load_erasure(pipe, tmp_path)  # it does nothing, but fits
    unload_erasure(pipe)
    with pytest.raises(SalunError, match=r"shape \(8, 16\) there and has a weight of shape \(8, 32\) here"):
        load_erasure(tiny.build_xl(tmp_path / "xl"), tmp_path)
    half = DiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    load_erasure(half, adapter)  # the same model, rounded
    assert list_erasures(half)[0]["intact"]
    load_erasure(pipe, adapter)
    with pytest.raises(SalunError, match="has the erasure 'cat' applied"):
        erase(pipe, "dog", output_dir=tmp_path / "run")
    pipe.fuse_lora()
    with pytest.raises(SalunError, match="call pipe.unfuse_lora"):
        unload_erasure(pipe)


@pytest.mark.parametrize("fault", ["factor", "name", "alpha", "fingerprint", "pair", "nan"])
def test_a_damaged_file_is_named(fault, adapter, pipe, tmp_path):
    tensors = load_file(adapter / FILE)
    with safe_open(adapter / FILE, "pt") as file:
        metadata = file.metadata()
    first = next(name for name in tensors if "lora_A" in name)
    if fault == "factor":
        tensors[first] = tensors[first][:1].contiguous()
    elif fault == "name":
        tensors["fingerprint"] = torch.zeros(3)
    elif fault == "alpha":
        config = json.loads(metadata["lora_adapter_metadata"]) | {"unet.lora_alpha": 99}
        metadata["lora_adapter_metadata"] = json.dumps(config)
    elif fault == "fingerprint":
        metadata["fingerprint"] = '"AAAA"'
    elif fault == "pair":
        del tensors[first]
    else:
        tensors[first] = tensors[first] * torch.nan
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(SalunError, match="is damaged" if fault != "nan" else "holds NaN or Inf"):
        load_erasure(pipe, tmp_path)
    assert not hasattr(pipe.unet, "peft_config")


@pytest.mark.parametrize(
    "method, given",
    [
        ("salun", "num_forget_images num_retain_images"),
        ("esd", ""),
        ("concept_ablation", "num_forget_images"),
        ("selective_amnesia", "num_forget_images num_retain_images fisher_images"),
        ("forget_me_not", "num_forget_images"),
    ],
)
def test_every_gradient_method_trains_one_and_gives_the_pipeline_back(method, given, pipe, tmp_path):
    before = tiny.bits(pipe)
    few = dict.fromkeys(given.split(), 4) | {"data_dir": str(tmp_path / "data"), "method": method, "rank": 2}
    few |= {"adapter": "lora", "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-2}
    done = erase(pipe, "cat", output_dir=tmp_path / "run", num_inference_steps=3, **few)
    assert tiny.same(before, tiny.bits(pipe)) and not hasattr(pipe.unet, "peft_config") and done.file.name == FILE
    base = draw(pipe)
    load_erasure(pipe, done.path)
    assert not torch.equal(draw(pipe), base)


def test_its_gradient_is_that_of_the_plain_weights(pipe):
    """One step of Adam against a twin that writes W + BA by hand, with the same A."""
    scoped_parameters(pipe.unet, "cross-attention")
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    weight = pipe.unet.get_parameter(f"{layer}.weight").detach().clone()
    change = AdapterChange(pipe, pipe.unet, {layer: 2}, seed=7)
    down, up = (change.values[f"{layer}.lora_{letter}.weight"] for letter in "AB")
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 9]), torch.randn(2, 7, 16)
    with torch.no_grad():
        up.copy_(torch.randn_like(up))
    predicted = pipe.unet(*inputs).sample
    predicted.square().mean().backward()
    by_hand = [factor.detach().clone().requires_grad_(True) for factor in (down, up)]
    twin = opened(pipe.name_or_path).unet
    expected = torch.func.functional_call(twin, {f"{layer}.weight": weight + by_hand[1] @ by_hand[0]}, inputs).sample
    expected.square().mean().backward()
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
    for factor, plain in zip((down, up), by_hand, strict=True):
        torch.testing.assert_close(factor.grad, plain.grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(change.deltas()[f"{layer}.weight"], up @ down)
    with change.at_base(), torch.no_grad():
        assert torch.equal(pipe.unet(*inputs).sample, twin(*inputs).sample)
    assert change.values[f"{layer}.lora_A.weight"].requires_grad


def test_ranks_follow_the_salient_mass():
    """The layers that hold 90% of it, by their mean score a weight, within half to twice the rank."""
    layers = {name: torch.nn.Parameter(torch.zeros(64, 64)) for name in "abcd"} | {
        "small": torch.nn.Parameter(torch.zeros(4, 64))
    }
    means = {"a": 8.0, "b": 4.0, "c": 1.0, "d": 0.5}
    scores = {f"{name}.weight": torch.full((64, 64), mean) for name, mean in means.items()}
    scores["small.weight"] = torch.full((4, 64), 1.0)
    # masses 8, 4, 1, .5 (times 4096) and .0625: a, b and c hold 13 of 13.56, a and b only 12 (88%)
    assert salient_ranks(layers, [scores], 13) == {"a": 24, "b": 12, "c": 6}
    twice = {name: 100 * score for name, score in scores.items()}
    assert salient_ranks(layers, [scores, twice], 13) == salient_ranks(layers, [scores], 13)
    scores["small.weight"] *= 1000
    assert salient_ranks(layers, [scores], 13) == {"small": 4, "a": 6}


def test_a_converted_delta_is_an_erasure_too(pipe, tiny_folder, tmp_path):
    """What the exporter writes as a LoRA is known, measured and taken off as a trained one."""
    (tmp_path / "masked").mkdir()
    delta = tiny.erasure(pipe.unet, only="attn2.to_", concept="cat", base_model=str(tiny_folder))
    delta.save(tmp_path / "masked" / "erasure.safetensors", torch.float16)
    export(tmp_path / "masked", "lora", tmp_path / "lora", rank=8)
    model = load_model(str(tiny_folder), None, torch.float32)
    base, *found = introduce(model, str(tiny_folder), [str(tmp_path / "masked"), str(tmp_path / "lora")])
    assert [one["name"] for one in found] == ["masked", "lora"] and len({one["digest"] for one in (base, *found)}) == 3
    assert found[1]["erasure"]["concept"] == "cat"
    assert found[1]["erasure"]["bytes"] == (tmp_path / "lora" / FILE).stat().st_size
    assert Adapter.load(tmp_path / "lora" / FILE).metadata["converted_from"] == delta.quantised(torch.float16).digest()
    with pytest.raises(SalunError, match="is no masked delta"):
        export(tmp_path / "lora", "lora", tmp_path / "again")


def test_sdxl_trains_one_that_stock_diffusers_takes(tmp_path):
    pipe = tiny.build_xl(tmp_path / "xl")
    done = erase(str(tmp_path / "xl"), "cat", output_dir=tmp_path / "run", data_dir=str(tmp_path / "data"), **SHORT)
    base = draw(pipe)
    pipe.load_lora_weights(str(done.path))
    theirs = draw(pipe)
    pipe.unload_lora_weights()
    load_erasure(pipe, done.path)
    assert torch.equal(draw(pipe), theirs) and not torch.equal(theirs, base)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--method uce", "--adapter lora: --method uce trains nothing, but solves for whole matrices"),
        ("--density 0.3", "--density means nothing to --adapter lora, which moves whole layers"),
        ("--threshold layer", "--threshold means nothing to --adapter lora, which moves whole layers"),
        ("--mask m.safetensors", "--mask m.safetensors: an adapter moves whole layers"),
        ("--rank 0", "--rank is 0: give a whole number of at least 1"),
        ("--scope norm", "The scope has no linear layer and no convolution"),
    ],
)
def test_what_does_not_go_with_an_adapter_is_refused(words, message, tmp_path):
    start = (
        "python erase_concept.py --pretrained_model_name_or_path demo --concept airplane --adapter lora --output_dir"
    )
    done = here(*start.split(), tmp_path / "run", *words.split(), check=False)
    assert done.returncode == 1 and f"error: {message}" in done.stderr and not (tmp_path / "run").exists()


def test_a_rank_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(SalunError, match="--rank means nothing without --adapter lora"):
        erase("demo/model", "airplane", rank=4, output_dir=tmp_path / "run")


def test_a_run_in_parts_and_one_in_a_piece_are_the_same_file(tiny_folder, tmp_path):
    shared = SHORT | {"data_dir": str(tmp_path / "data"), "lr_scheduler": "constant", "checkpointing_steps": 2}
    whole = erase(str(tiny_folder), "cat", output_dir=tmp_path / "whole", **shared)
    parts = shared | {"output_dir": tmp_path / "parts"}
    erase(str(tiny_folder), "cat", **(parts | {"max_train_steps": 2}))
    done = erase(str(tiny_folder), "cat", resume_from_checkpoint="latest", **parts)
    with safe_open(whole.file, "pt") as one, safe_open(done.file, "pt") as other:
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())
    assert Adapter.load(whole.file).digest() == Adapter.load(done.file).digest()
    assert [path.name for path in (tmp_path / "parts").glob("previous")] == []


def test_two_processes_do_what_one_does(tiny_folder, tmp_path):
    words = [
        "erase_concept.py", "--pretrained_model_name_or_path", tiny_folder, "--concept", "cat", *QUICK,
        "--adapter", "lora", "--rank", "4", "--save_dtype", "fp32", "--data_dir", tmp_path / "data",
    ]  # fmt: skip
    here("python", *words, "--output_dir", tmp_path / "one")
    two = [*words, "--train_batch_size", "2", "--output_dir", tmp_path / "two"]
    run("torchrun", "--nproc_per_node", "2", *two, ACCELERATE_USE_CPU="true")
    one, other = (Adapter.load(tmp_path / name / FILE).factors for name in ("one", "two"))
    assert one.keys() == other.keys()
    for name, pair in one.items():
        for a, b in zip(pair, other[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(max(pair[1].abs().max(), 1e-9)))


def test_bf16_trains_factors_in_fp32(tiny_folder, tmp_path):
    done = erase(
        str(tiny_folder), "cat", output_dir=tmp_path / "run", data_dir=str(tmp_path / "data"), mixed_precision="bf16",
        save_dtype="fp32", **SHORT,
    )  # fmt: skip
    factors = Adapter.load(done.file).factors
    fine = [f for pair in factors.values() for f in pair]
    assert all(f.dtype == torch.float32 and f.isfinite().all() for f in fine)
    assert any(not torch.equal(f, f.bfloat16().float()) for f in fine)


def test_the_table_of_ranks_is_made_of_the_committed_results():
    found = json.loads(ranks.RESULTS.read_text(encoding="utf-8"))
    assert ranks.table(found) in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")

"""`python -m salun_diffusion prune`: the largest changes of an erasure stay as they are, the others are gone."""

import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from shell import here

from salun_diffusion import Delta, SalunError, list_erasures, load_erasure, unload_erasure
from salun_diffusion.pruning import prune


@pytest.fixture
def pipe(tiny_folder):
    return DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


@pytest.fixture
def file(pipe, tmp_path):
    path = tmp_path / "erasure.safetensors"
    tiny.erasure(pipe.unet, only="", base_model="tiny", settings={"seed": 3}).save(path, torch.float16)
    return path


def slow_prune(delta, keep, scores=None):
    """Parameter → place → value of the largest changes, from one sorted list; equal ones in the parameters' order."""
    found = []
    for name in delta.masks:
        for value, place in zip(delta.values[name], delta.masks[name].flatten().nonzero().flatten(), strict=True):
            size = value.float().abs() * (1 if scores is None else scores[name].flatten()[place])
            found.append((-float(size), len(found), name, int(place), value))
    kept = {}
    for _, _, name, place, value in sorted(found)[: int(keep * len(found))]:
        kept.setdefault(name, {})[place] = value
    return kept


def holds(delta, kept):
    assert set(delta.masks) == set(kept)
    for name, values in kept.items():
        assert delta.masks[name].flatten().nonzero().flatten().tolist() == sorted(values)
        assert torch.equal(delta.values[name], torch.stack([values[place] for place in sorted(values)]))


@pytest.mark.parametrize("by_saliency", [False, True])
def test_the_largest_changes_stay(pipe, file, tmp_path, by_saliency):
    whole, scores, words = Delta.load(file), None, []
    if by_saliency:
        generator = torch.Generator().manual_seed(5)
        scores = {name: torch.rand(shape, generator=generator) for name, shape in whole.shapes().items()}
        save_file(scores, tmp_path / "saliency.safetensors")
        words = ["--saliency", tmp_path / "saliency.safetensors"]
    small = tmp_path / "small.safetensors"
    done = here("python", "-m", "salun_diffusion", "prune", file, "--keep", "0.125", "--output", small, *words)
    found = Delta.load(small)
    holds(found, slow_prune(whole, 0.125, scores))
    kept, of = (sum(map(len, delta.values.values())) for delta in (found, whole))
    assert kept == of // 8 and f"{kept} of {of} changed weights" in done.stdout
    assert found.metadata["pruned"]["from"] == whole.digest()
    assert found.metadata["pruned"]["by"] == ("value times saliency" if by_saliency else "value")
    assert found.metadata["density"] == pytest.approx(0.5 * kept / of)
    same = {key: value for key, value in found.metadata.items() if key not in ("pruned", "density")}
    assert same == {key: value for key, value in whole.metadata.items() if key != "density"}
    before = tiny.bits(pipe)
    load_erasure(pipe, small)
    assert list_erasures(pipe)[0]["weights"] == kept
    for name, weight in pipe.unet.named_parameters():
        old, new = before["unet", name][1].view(weight.dtype), weight.detach().flatten()
        dense = found.dense(name).flatten() if name in found.masks else torch.zeros(len(old))
        assert torch.equal(new, old + dense)
    unload_erasure(pipe)
    assert tiny.same(before, tiny.bits(pipe))


def test_values_as_int8(pipe, file, tmp_path):
    """Half the file, near the values, and it comes off without a trace. Pruned again, it is int8 still."""
    before, small, less = tiny.bits(pipe), tmp_path / "small.safetensors", tmp_path / "less.safetensors"
    done = here("python", "-m", "salun_diffusion", "prune", file, "--keep", "1", "--values", "int8", "--output", small)
    whole, found = Delta.load(file), Delta.load(small)
    error = sum(float((found.values[name] - value.float()).square().sum()) for name, value in whole.values.items())
    size = sum(float(value.float().square().sum()) for value in whole.values.values())
    assert f"int8 is {100 * (error / size) ** 0.5:.2g}% of it off" in done.stdout and 0 < error < 1e-4 * size
    assert all(torch.equal(mask, found.masks[name]) for name, mask in whole.masks.items())
    load_erasure(pipe, small)
    assert list_erasures(pipe)[0]["weights"] == sum(map(len, whole.values.values()))
    unload_erasure(pipe)
    assert tiny.same(before, tiny.bits(pipe))
    assert prune(small, 0.5, less).error < 1e-2 and Delta.load(less).int8
    with pytest.raises(SalunError, match="--keep is 1: give a share above 0 and below 1"):
        prune(file, 1, tmp_path / "none.safetensors")


def test_twice_says_so(file, tmp_path):
    first = prune(file, 0.5, tmp_path / "half")
    assert first.kept * 2 <= first.of and 0.5**0.5 < first.share < 1
    prune(tmp_path / "half", 0.5, tmp_path / "quarter")
    told = Delta.load(tmp_path / "quarter").metadata["pruned"]
    assert told["from"] == Delta.load(tmp_path / "half").digest() and told["before"]["keep"] == 0.5
    assert json.dumps(told)


def test_refuses(file, tmp_path, pipe):
    def refused(sentence, **options):
        with pytest.raises(SalunError, match=sentence) as caught:
            prune(**({"erasure": file, "keep": 0.5, "output": tmp_path / "out"} | options))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    for keep in (0, 1, 1.5):
        refused(f"--keep is {keep:g}: give a share above 0 and below 1", keep=keep)
    refused("exists: name another --output", output=file)
    refused("density|no weight|selects", keep=1e-9)
    refused("does not exist", erasure=tmp_path / "none.safetensors")
    scores = {name: torch.ones(shape) for name, shape in Delta.load(file).shapes().items()}
    name = next(iter(scores))
    for changed, sentence in (
        ({name: torch.ones(1, 1, 1)}, f"holds no saliency of their shape for {name}"),
        ({name: -scores[name]}, f"holds negative scores for {name}"),
    ):
        save_file(scores | changed, tmp_path / "saliency")
        refused(sentence, saliency=tmp_path / "saliency")

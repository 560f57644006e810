"""Erasures that say which network of the pipeline they change: version 2 of the masked delta, on a text encoder."""

from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, StableDiffusionPipeline
from safetensors.torch import save_file

from salun_diffusion import SalunError, fuse_erasure, list_erasures, load_erasure, unload_erasure
from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.live import own_parameters
from salun_diffusion.export import export
from salun_diffusion.loader import set_erasure_scale
from salun_diffusion.pruning import prune
from salun_diffusion.tensors import read_metadata, read_safetensors


@pytest.fixture
def pipe(tiny_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


def of_text_encoder(pipe, seed=7, only=".mlp.", **metadata):
    return replace(tiny.erasure(pipe.text_encoder, seed, only=only, **metadata), component="text_encoder")


@pytest.fixture
def file(pipe, tiny_folder, tmp_path):
    path = tmp_path / "words.safetensors"
    of_text_encoder(pipe, base_model=str(tiny_folder)).save(path)
    return path


def test_the_file_names_its_component(pipe, file, tmp_path):
    delta = Delta.load(file)
    assert delta.component == "text_encoder" and "component" not in delta.metadata
    text = read_metadata(file)
    assert (text["version"], text["component"]) == ("2", "text_encoder")
    delta.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    for component, version in ((None, "1"), ("unet", "2")):  # the denoiser's own are one erasure in both versions
        replace(tiny.erasure(pipe.unet), component=component).save(tmp_path / "other")
        assert read_metadata(tmp_path / "other")["version"] == version
        assert Delta.load(tmp_path / "other").digest() == tiny.erasure(pipe.unet).digest()
    assert replace(delta, component=None).digest() != delta.digest()


def test_a_file_is_refused_for_its_component(file, tmp_path):
    tensors, text = read_safetensors(file)
    known = "where unet, transformer, text_encoder are known; update salun_diffusion"
    for changed, sentence in (
        ({"component": "vae"}, f"changes the component 'vae' of a pipeline, {known}"),
        ({"component": ""}, f"changes the component '' of a pipeline, {known}"),
        ({"version": "3"}, "has version 3 of the salun-delta format where 1 and 2 are known; update"),
    ):
        save_file(tensors, tmp_path / "changed", text | changed)
        with pytest.raises(SalunError, match=sentence) as caught:
            Delta.load(tmp_path / "changed")
        assert "\n" not in str(caught.value)
    with pytest.raises(SalunError, match="its component is 'vae', and must be of unet, transformer, text_encoder"):
        replace(Delta.load(file), component="vae")


def test_a_pipeline_without_the_component(pipe, file, tmp_path):
    network = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8)
    labels = DiTPipeline(network, pipe.vae, DDIMScheduler())
    with pytest.raises(SalunError, match=r"DiTPipeline has no text_encoder \(of .* it has: transformer\)"):
        load_erasure(labels, file)
    replace(tiny.erasure(pipe.unet), component="transformer").save(tmp_path / "other")
    with pytest.raises(SalunError, match="StableDiffusionPipeline has no transformer"):
        load_erasure(pipe, tmp_path / "other")
    of_text_encoder(pipe).save(tmp_path / "other")
    tensors, text = read_safetensors(tmp_path / "other")
    save_file(tensors, tmp_path / "other", text | {"component": "unet"})
    with pytest.raises(SalunError, match="parameters that this pipeline's unet does not have: encoder.layers.0"):
        load_erasure(pipe, tmp_path / "other")
    assert list_erasures(pipe) == []


def weights_with(module, *terms):
    wanted = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    for delta, scale in terms:
        for name in delta.masks:
            wanted[name][delta.masks[name]] += scale * delta.values[name]
    return wanted


def holds(module, wanted):
    return all(torch.allclose(weight, wanted[name], atol=1e-7) for name, weight in module.named_parameters())


def test_beside_erasures_of_the_denoiser(pipe, file, tmp_path):
    """Each network wears its own: nothing of one moves when the other's come and go."""
    before = tiny.bits(pipe)
    deltas = [of_text_encoder(pipe, 1, ".self_attn."), tiny.erasure(pipe.unet, 2)]
    for i, delta in enumerate(deltas):
        delta.save(tmp_path / f"{i}.safetensors")
    first = Delta.load(file)
    text = [weights_with(pipe.text_encoder, *terms) for terms in ([(first, 1)], [(first, -0.5), (deltas[0], 1)])]
    load_erasure(pipe, file, name="words")
    load_erasure(pipe, tmp_path / "1.safetensors", name="pictures")
    assert holds(pipe.text_encoder, text[0]) and not tiny.same(before, tiny.bits(pipe))
    with pytest.raises(SalunError, match="is already applied, as 'words'"):
        load_erasure(pipe, file, name="twice")
    load_erasure(pipe, tmp_path / "0.safetensors", name="more words")
    set_erasure_scale(pipe, "words", -0.5)
    assert holds(pipe.text_encoder, text[1])
    found = [(one["name"], one["component"], one["scale"], one["intact"]) for one in list_erasures(pipe)]
    assert found == [
        ("pictures", "unet", 1.0, True),
        ("words", "text_encoder", -0.5, True),
        ("more words", "text_encoder", 1.0, True),
    ]
    with torch.no_grad():
        pipe.text_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight").mul_(2)
    assert [one["intact"] for one in list_erasures(pipe)] == [True, False, True]
    with pytest.raises(SalunError, match="Something else has written over what the erasures 'more words', 'words'"):
        unload_erasure(pipe)
    assert len(list_erasures(pipe)) == 3, "nothing was taken off, not the denoiser's either"
    with torch.no_grad():
        pipe.text_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight").div_(2)
    unload_erasure(pipe, "words")
    unload_erasure(pipe, "pictures")
    assert [one["name"] for one in list_erasures(pipe)] == ["more words"]
    unload_erasure(pipe)
    assert tiny.same(before, tiny.bits(pipe)) and not hasattr(pipe.text_encoder.config, "_erased_by")


def test_a_failure_leaves_both_networks_as_they_were(pipe, file, tmp_path):
    tiny.erasure(pipe.unet).save(tmp_path / "other")
    pipe.to(torch.float16)
    load_erasure(pipe, tmp_path / "other", name="pictures")
    before = tiny.bits(pipe)
    with pytest.raises(SalunError, match="would hold NaN or Inf"):
        load_erasure(pipe, file, scale=1e9)
    assert tiny.same(before, tiny.bits(pipe)) and [one["name"] for one in list_erasures(pipe)] == ["pictures"]


def test_a_saved_pipeline_says_what_its_text_encoder_was_erased_by(pipe, file, tmp_path):
    load_erasure(pipe, file)
    wanted = tiny.bits(pipe)
    fuse_erasure(pipe)
    assert list_erasures(pipe) == [] and tiny.same(wanted, tiny.bits(pipe))
    pipe.save_pretrained(tmp_path / "erased")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "erased", safety_checker=None)
    for one in (pipe, again):
        with pytest.raises(SalunError, match="this one is already erased by it, as 'concept 7'"):
            load_erasure(one, file)


def test_words_that_textual_inversion_has_added(pipe, file, tmp_path):
    """Before the erasure they make another model of it, which is said; after it, they change nothing."""
    save_file({"<mine>": torch.randn(pipe.text_encoder.config.hidden_size)}, tmp_path / "word.safetensors")
    load_erasure(pipe, file)
    pipe.load_textual_inversion(tmp_path / "word.safetensors", token="<mine>")
    unload_erasure(pipe)
    with pytest.raises(SalunError, match="textual inversion has added tokens to it: load the erasure before that"):
        load_erasure(pipe, file)


def test_names_do_not_depend_on_the_version_of_transformers(pipe):
    """Some keep all of a text encoder in one module, ``text_model``."""
    older = torch.nn.Module()
    older.text_model = pipe.text_encoder
    assert own_parameters(older).keys() == own_parameters(pipe.text_encoder).keys()


def test_exports_that_hold_a_text_encoder(file, pipe, tmp_path):
    load_erasure(pipe, file)
    for format in ("lora", "diff", "unet"):
        with pytest.raises(SalunError, match=f"changes the text encoder, which --format {format} does not hold: give"):
            export(file, format, tmp_path / format)
    for format in ("diffusers", "single_file"):
        done = export(file, format, tmp_path / f"{format}.safetensors")
        assert (done.largest_difference, done.left_out) == (0.0, [])
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "diffusers.safetensors", safety_checker=None)
    assert holds(again.text_encoder, dict(pipe.text_encoder.named_parameters()))


def test_pruned_it_is_still_of_its_component(pipe, file, tmp_path):
    prune(file, 0.25, tmp_path / "small.safetensors")
    load_erasure(pipe, tmp_path / "small.safetensors")
    assert list_erasures(pipe)[0]["component"] == "text_encoder"

"""Erasures on pipelines that others change too: adapters, fused layers, offloading, compilers, threads, saving."""

import threading

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from salun_diffusion import (
    SalunError,
    erase,
    fuse_erasure,
    list_erasures,
    load_erasure,
    set_erasure_scale,
    unload_erasure,
)
from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.live import own_parameters
from salun_diffusion.models import model_of
from salun_diffusion.run import check_is_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.build(folder)
    return folder


@pytest.fixture
def pipe(base):
    return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


@pytest.fixture
def file(pipe, tmp_path):
    path = tmp_path / "erasure.safetensors"
    tiny.erasure(pipe.unet).save(path)
    return path


def picture(pipe):
    """What the U-Net predicts: everything that the weights do to a picture."""
    seed = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noisy, words = (torch.randn(shape, generator=seed) for shape in [(1, 4, 8, 8), (1, 77, 16)])
        return pipe.unet(noisy, 5, words).sample


def same_but_for_rounding(one, other):
    """Of the same weights elsewhere in memory: a processor may sum in another order where they begin otherwise."""
    return torch.allclose(one, other, rtol=0, atol=1e-6)


def refused(sentence, act, *arguments, **options):
    with pytest.raises(SalunError, match=sentence) as caught:
        act(*arguments, **options)
    assert "\n" not in str(caught.value)


def lost(pipe, sentence="Something else has written over what the erasures 'concept 0' wrote: .*attn2"):
    """The erasure of `pipe` is told to be lost, and is neither taken off, scaled nor made a part of the model."""
    before = tiny.bits(pipe)
    assert [row["intact"] for row in list_erasures(pipe)] == [False]
    refused(sentence, unload_erasure, pipe)
    refused(sentence, set_erasure_scale, pipe, "concept 0", 0.5)
    refused("Something else has written over what the erasures concept 0 wrote, or", fuse_erasure, pipe)
    assert tiny.same(before, tiny.bits(pipe)) and len(list_erasures(pipe)) == 1


def test_weights_that_were_edited_in_place(pipe, file):
    load_erasure(pipe, file)
    assert list_erasures(pipe)[0]["intact"] is True
    clean = tiny.bits(pipe)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    with torch.no_grad():
        saved = layer.clone()
        layer += 0.01 * torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))  # as fuse_lora does
    lost(pipe)
    with torch.no_grad():
        layer.copy_(saved)
    assert tiny.same(clean, tiny.bits(pipe)) and list_erasures(pipe)[0]["intact"] is True
    unload_erasure(pipe)


def test_the_base_model_loaded_over_it(pipe, file):
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    load_erasure(pipe, file)
    pipe.unet.load_state_dict(weights)
    lost(pipe)


def test_several_and_another_dtype_are_still_found(pipe, file, tmp_path):
    tiny.erasure(pipe.unet, 1).save(tmp_path / "other")
    load_erasure(pipe, file, scale=0.7)
    load_erasure(pipe, tmp_path / "other")
    pipe.to(torch.float16)
    pipe.to(torch.float32)
    assert [row["intact"] for row in list_erasures(pipe)] == [True, True]
    unload_erasure(pipe)


def test_fused_projections(pipe, file):
    clean = tiny.bits(pipe)
    pipe.fuse_qkv_projections()
    for check_base in (True, False):
        refused(
            r"does not draw with .*attn2.to_k.*unfuse_qkv_projections\(\)",
            load_erasure,
            pipe,
            file,
            check_base=check_base,
        )
    pipe.unfuse_qkv_projections()
    load_erasure(pipe, file)  # diffusers leaves its copies behind: they make no other base model of it
    erased = picture(pipe)
    pipe.fuse_qkv_projections()
    refused(r"does not draw with .*unfuse_qkv_projections\(\)", unload_erasure, pipe)
    pipe.unfuse_qkv_projections()
    assert torch.equal(picture(pipe), erased) and list_erasures(pipe)[0]["intact"]
    unload_erasure(pipe)
    after = tiny.bits(pipe)
    assert tiny.same(clean, {key: after[key] for key in clean})


@pytest.mark.parametrize("threads", [2, 4])
def test_threads(pipe, tmp_path, threads):
    clean = tiny.bits(pipe)
    for number in range(threads):
        tiny.erasure(pipe.unet, number, only="").save(tmp_path / str(number))
    for _ in range(3):
        start = threading.Barrier(threads)

        def load(number, start=start):
            start.wait()
            load_erasure(pipe, tmp_path / str(number))

        workers = [threading.Thread(target=load, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert {row["name"] for row in list_erasures(pipe)} == {f"concept {number}" for number in range(threads)}
        unload_erasure(pipe)
        assert tiny.same(clean, tiny.bits(pipe))


def offload(pipe, folder):
    device = torch.device("cpu")
    pipe.unet.enable_group_offload(device, device, "leaf_level", offload_to_disk_path=str(folder))


def test_offloading_to_disk(pipe, base, file, tmp_path):
    plain = picture(pipe)
    load_erasure(pipe, file)
    erased = picture(pipe)
    assert not same_but_for_rounding(erased, plain)
    offload(pipe, tmp_path / "offloaded")
    assert same_but_for_rounding(picture(pipe), erased) and list_erasures(pipe)[0]["intact"] is True
    refused("are offloaded to disk .* before enable_group_offload", unload_erasure, pipe)
    other = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    offload(other, tmp_path / "clean")
    refused("are offloaded to disk", load_erasure, other, file)


def test_offloading_to_a_folder_of_another_run(pipe, base, file, tmp_path):
    plain = picture(pipe)
    offload(pipe, tmp_path / "offloaded")
    other = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    load_erasure(other, file)
    assert not same_but_for_rounding(picture(other), plain)
    offload(other, tmp_path / "offloaded")
    assert same_but_for_rounding(picture(other), plain)  # diffusers does not rewrite what lies there
    assert list_erasures(other)[0]["intact"] is False


def test_float8_storage(pipe, file):
    plain = {name: weight.to(torch.float8_e4m3fn) for name, weight in pipe.unet.named_parameters()}
    load_erasure(pipe, file)
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert list_erasures(pipe)[0]["intact"] is True
    set_erasure_scale(pipe, "concept 0", 3)
    assert list_erasures(pipe)[0]["intact"] is True and torch.isfinite(picture(pipe)).all()
    unload_erasure(pipe)
    for name, weight in pipe.unet.named_parameters():
        assert torch.equal(weight.float(), plain[name].float() if weight.dtype == torch.float8_e4m3fn else weight)
    refused("float32, float16 and bfloat16 weights only", load_erasure, pipe, file)


def test_freezing(pipe, file):
    import torch._inductor.config

    load_erasure(pipe, file)
    pipe.unet = torch.compile(pipe.unet)
    with torch._inductor.config.patch(freezing=True):
        refused("compiled with inductor's freezing", unload_erasure, pipe)
    unload_erasure(pipe)


def test_a_compiled_part(pipe, file):
    clean = tiny.bits(pipe)
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    load_erasure(pipe, file)
    assert list_erasures(pipe)[0]["intact"] is True
    unload_erasure(pipe)
    refused("not the base model alone: .*_orig_mod", check_is_base, model_of(pipe))
    assert tiny.same(clean, {(part, name.replace("_orig_mod.", "")): v for (part, name), v in tiny.bits(pipe).items()})


class Lora(nn.Module):
    """A layer with a LoRA on it, named as peft names it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        down, up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def forward(self, x, *_):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def wrap(unet):
    for path, module in [*unet.named_modules()]:
        if path.endswith(("to_k", "to_v")):
            setattr(unet.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], Lora(module))


def test_a_lora_before_or_after(pipe, file):
    before = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    load_erasure(pipe, file)
    wrap(pipe.unet)
    both = picture(pipe)
    unload_erasure(pipe)
    assert not torch.equal(picture(pipe), both)
    assert all(torch.equal(weight, before[name]) for name, weight in own_parameters(pipe.unet).items())
    load_erasure(pipe, file)
    assert torch.equal(picture(pipe), both)


def test_a_fused_lora_is_named(pipe, file):
    wrap(pipe.unet)
    layer = next(part for part in pipe.unet.modules() if isinstance(part, Lora))
    with torch.no_grad():
        layer.base_layer.weight += 0.1
    layer.merged = True
    refused(r"a LoRA is fused into it: load the erasure before fuse_lora\(\)", load_erasure, pipe, file)


def test_other_adapters_do_not_make_another_base_model(pipe, file):
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    processor = nn.Module()
    processor.to_k_ip = nn.ModuleList([nn.Linear(16, 16)])
    attention.processor = processor
    pipe.unet.encoder_hid_proj = nn.Module()
    pipe.unet.encoder_hid_proj.image_projection_layers = nn.ModuleList([nn.Linear(4, 4)])
    load_erasure(pipe, file)
    unload_erasure(pipe)


def test_scale(pipe, file, tmp_path):
    clean = tiny.bits(pipe)
    load_erasure(pipe, file, scale=0.3)
    wanted = tiny.bits(pipe)
    unload_erasure(pipe)
    load_erasure(pipe, file)
    set_erasure_scale(pipe, "concept 0", 0.3)
    assert tiny.same(wanted, tiny.bits(pipe)) and list_erasures(pipe)[0]["scale"] == 0.3
    refused("No erasure called 'cat' is applied; applied now: concept 0", set_erasure_scale, pipe, "cat", 1)
    refused("scale must be a finite number", set_erasure_scale, pipe, "concept 0", float("nan"))
    refused("No erasure called None is applied", set_erasure_scale, pipe, None, 1)
    unload_erasure(pipe)
    assert tiny.same(clean, tiny.bits(pipe))


def test_switching_between_loaded_erasures_moves_no_weights(pipe, file, tmp_path):
    clean, names = tiny.bits(pipe), ("concept 0", "concept 1")
    tiny.erasure(pipe.unet, 1).save(tmp_path / "other")
    load_erasure(pipe, file)
    first = tiny.bits(pipe)
    set_erasure_scale(pipe, "concept 0", 0)
    assert tiny.same(clean, tiny.bits(pipe))  # of the base model's zeros the signs too
    load_erasure(pipe, tmp_path / "other")
    second = tiny.bits(pipe)
    for _ in range(2):
        for off, on, wanted in ((*names[::-1], first), (*names, second)):
            set_erasure_scale(pipe, off, 0)
            set_erasure_scale(pipe, on, 1)
            assert tiny.same(wanted, tiny.bits(pipe)) and all(row["intact"] for row in list_erasures(pipe))
    places = {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters()}
    set_erasure_scale(pipe, "concept 1", 0)
    set_erasure_scale(pipe, "concept 1", 1)
    assert places == {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters()}
    set_erasure_scale(pipe, "concept 0", 0.5)
    set_erasure_scale(pipe, "concept 0", 0)
    assert tiny.same(second, tiny.bits(pipe))
    unload_erasure(pipe, "concept 1")
    assert tiny.same(clean, tiny.bits(pipe))
    unload_erasure(pipe)
    assert tiny.same(clean, tiny.bits(pipe))


def test_an_edit_where_an_erasure_is_turned_off(pipe, file):
    load_erasure(pipe, file, scale=0)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    layer.data += 0.01  # which PyTorch does not count, as peft's fuse_lora
    lost(pipe)


def test_an_edit_behind_pytorch(pipe, file):
    load_erasure(pipe, file)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.detach().numpy()[3, 5] += 1
    lost(pipe)


def test_in_inference_mode(pipe, file):
    clean = tiny.bits(pipe)
    with torch.inference_mode():
        load_erasure(pipe, file)
        set_erasure_scale(pipe, "concept 0", 0.5)
    set_erasure_scale(pipe, "concept 0", 2)
    with torch.inference_mode():
        unload_erasure(pipe)
    assert tiny.same(clean, tiny.bits(pipe))


def test_group_offloading_to_memory(pipe, file):
    clean = tiny.bits(pipe)
    load_erasure(pipe, file)
    erased = picture(pipe)
    device = torch.device("cpu")
    pipe.unet.enable_group_offload(device, device, "leaf_level")
    places = {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters()}
    for scale in (0, 1):
        set_erasure_scale(pipe, "concept 0", scale)
    assert torch.equal(picture(pipe), erased) and list_erasures(pipe)[0]["intact"] is True
    unload_erasure(pipe)
    load_erasure(pipe, file)
    assert torch.equal(picture(pipe), erased)
    unload_erasure(pipe)
    assert tiny.same(clean, tiny.bits(pipe))
    assert places == {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters()}  # its hooks hold these


@pytest.mark.parametrize("fuse", [True, False])
def test_a_saved_pipeline_says_that_it_is_erased(pipe, file, tmp_path, fuse):
    load_erasure(pipe, file)
    if fuse:
        fuse_erasure(pipe)
        refused("already erased by it, as 'concept 0'", load_erasure, pipe, file, check_base=False)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert list_erasures(again) == []
    for check_base in (True, False):
        refused("already erased by it, as 'concept 0'", load_erasure, again, file, check_base=check_base)
    if not fuse:
        unload_erasure(pipe)
        pipe.save_pretrained(tmp_path / "saved")
        load_erasure(DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None), file)


def test_an_inpainting_model(pipe, base, file, tmp_path):
    config = dict(pipe.unet.config)
    torch.manual_seed(1)
    nine = UNet2DConditionModel.from_config(config | {"in_channels": 9})
    weights = {name: weight for name, weight in pipe.unet.state_dict().items() if name != "conv_in.weight"}
    nine.load_state_dict(weights, strict=False)
    delta = Delta.load(file)
    pipe.unet = nine
    refused("another base model.*check_base=False", load_erasure, pipe, file)
    load_erasure(pipe, file, check_base=False)
    for name, mask in delta.masks.items():
        assert torch.equal(nine.get_parameter(name)[mask], weights[name][mask] + delta.values[name])
    unload_erasure(pipe)
    pipe.save_pretrained(tmp_path / "nine")
    sentence = "takes 9 channels, not the 4 of a latent.*check_base=False"
    refused(sentence, model_of, pipe)
    refused(sentence, erase, str(tmp_path / "nine"), "a cat", output_dir=str(tmp_path / "run"), method="uce")

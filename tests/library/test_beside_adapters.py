"""Erasures beside adapters as people load them: diffusers' own calls, with peft underneath."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict

from salun_diffusion import (
    Delta,
    SalunError,
    fuse_erasure,
    list_erasures,
    load_erasure,
    set_erasure_scale,
    unload_erasure,
)
from salun_diffusion.models.load import load_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline's folder, with an erasure of its attention, norms and biases and two LoRAs of it."""
    folder = tmp_path_factory.mktemp("base")
    pipe = tiny.build(folder)
    tiny.erasure(pipe.unet, size=0.3, only="").save(folder / "erasure.safetensors", torch.float32)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_v", "conv1"], init_lora_weights=False), name)
        layers = get_peft_model_state_dict(pipe.unet, adapter_name=name)
        config = pipe.unet.peft_config[name].to_dict()
        pipe.save_lora_weights(folder / name, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
        pipe.unet.delete_adapters(name)
    return folder


@pytest.fixture
def pipe(base):
    return load_pipeline(str(base))


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=noise, output_type="pt").images


def by_hand(base, scale, **weights):
    """The picture of a pipeline whose weights are base + scale · delta by plain addition, and which then wears the
    LoRAs ``weights`` names.
    """
    pipe, delta = load_pipeline(str(base)), Delta.load(base / "erasure.safetensors")
    with torch.no_grad():
        for name in delta.masks:
            parameter, mask = pipe.unet.get_parameter(name), delta.masks[name]
            parameter[mask] = parameter[mask] + delta.values[name] * scale
    for name in weights:
        pipe.load_lora_weights(str(base / name), adapter_name=name)
    if weights:
        pipe.set_adapters([*weights], [*weights.values()])
    return picture(pipe)


def put_on(pipe, base, **weights):
    for name in weights:
        pipe.load_lora_weights(str(base / name), adapter_name=name)
    pipe.set_adapters([*weights], [*weights.values()])


@pytest.mark.parametrize("first", ["lora", "erasure"])
def test_both_act_and_each_comes_off_alone(base, pipe, first):
    clean, plain = tiny.bits(pipe), picture(pipe)
    if first == "erasure":
        load_erasure(pipe, base / "erasure.safetensors")
    put_on(pipe, base, one=1.0)
    alone = None if first == "erasure" else picture(pipe)
    if first == "lora":
        load_erasure(pipe, base / "erasure.safetensors")
    both = by_hand(base, 1.0, one=1.0)
    assert torch.equal(picture(pipe), both) and not torch.allclose(both, plain, atol=1e-2)
    assert list_erasures(pipe)[0]["intact"]
    unload_erasure(pipe)
    assert alone is None or torch.equal(picture(pipe), alone)
    assert torch.equal(picture(pipe), by_hand(base, 0.0, one=1.0))
    load_erasure(pipe, base / "erasure.safetensors")
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), by_hand(base, 1.0))
    unload_erasure(pipe)
    assert tiny.same(clean, tiny.bits(pipe)) and torch.equal(picture(pipe), plain)


def test_several_adapters_and_scales(base, pipe):
    put_on(pipe, base, one=0.5, two=-1.0)
    load_erasure(pipe, base / "erasure.safetensors", name="gone")
    assert torch.equal(picture(pipe), by_hand(base, 1.0, one=0.5, two=-1.0))
    set_erasure_scale(pipe, "gone", 0.4)
    pipe.set_adapters(["two"], [0.7])
    assert torch.equal(picture(pipe), by_hand(base, 0.4, two=0.7))
    pipe.delete_adapters("two")
    pipe.set_adapters(["one"], [1.0])
    assert torch.equal(picture(pipe), by_hand(base, 0.4, one=1.0))
    pipe.disable_lora()
    assert torch.equal(picture(pipe), by_hand(base, 0.4))
    pipe.enable_lora()
    fuse_erasure(pipe)
    assert torch.equal(picture(pipe), by_hand(base, 0.4, one=1.0)) and list_erasures(pipe) == []


def test_a_fused_lora(base, pipe):
    """Over an erasure it is found out; before it, it makes another base model; undone, it is not the base to the bit,
    so only a new pipeline is.
    """
    put_on(pipe, base, one=1.0)
    pipe.fuse_lora()
    with pytest.raises(SalunError, match=r"a LoRA is fused into it: load the erasure before fuse_lora\(\)"):
        load_erasure(pipe, base / "erasure.safetensors")
    fused = picture(pipe)
    assert load_erasure(pipe, base / "erasure.safetensors", check_base=False)
    assert not torch.allclose(picture(pipe), fused, atol=1e-2)
    unload_erasure(pipe)
    assert torch.equal(picture(pipe), fused)
    again = load_pipeline(str(base))
    load_erasure(again, base / "erasure.safetensors")
    put_on(again, base, one=1.0)
    again.fuse_lora()
    assert list_erasures(again)[0]["intact"] is False
    assert torch.allclose(picture(again), by_hand(base, 1.0, one=1.0), atol=1e-4)
    for act in (unload_erasure, fuse_erasure, lambda pipe: set_erasure_scale(pipe, "concept 0", 0.5)):
        with pytest.raises(SalunError, match="Something else has written over what the erasures"):
            act(again)
    fused_first = load_pipeline(str(base))
    load_erasure(fused_first, base / "erasure.safetensors")
    fuse_erasure(fused_first)
    put_on(fused_first, base, one=1.0)
    fused_first.fuse_lora()
    assert torch.equal(picture(fused_first), picture(again))


def test_an_ip_adapter(base, pipe):
    """Diffusers' own processors and projections, on and off with an erasure beneath."""
    clean, plain = tiny.bits(pipe), picture(pipe)
    load_erasure(pipe, base / "erasure.safetensors")
    pipe.unet._load_ip_adapter_weights([_ip_adapter(pipe.unet)])
    image = [torch.ones(2, 1, 1, 8)]

    def seen(pipe):
        noise = torch.Generator().manual_seed(0)
        pipe.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": 2, "generator": noise, "output_type": "pt", "ip_adapter_image_embeds": image}
        return pipe("a cat", **how).images

    both = seen(pipe)
    assert list_erasures(pipe)[0]["intact"]
    unload_erasure(pipe)
    assert not torch.allclose(seen(pipe), both, atol=1e-2)
    load_erasure(pipe, base / "erasure.safetensors")
    assert torch.equal(seen(pipe), both)
    set_erasure_scale(pipe, "concept 0", 0.5)
    unload_erasure(pipe)
    pipe.unload_ip_adapter()
    assert tiny.same(clean, tiny.bits(pipe)) and torch.equal(picture(pipe), plain)


def _ip_adapter(unet):
    """Random weights of an IP-Adapter for ``unet``, as its files hold them: two tokens of an image of 8 features."""
    torch.manual_seed(5)
    width = unet.config.cross_attention_dim
    found = {"image_proj": {
        "proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }, "ip_adapter": {}}  # fmt: skip
    number = 1
    for name, layer in unet.named_modules():
        if name.endswith("attn2"):
            for kind in ("k", "v"):
                size = getattr(layer, f"to_{kind}").weight.shape[0]
                found["ip_adapter"][f"{number}.to_{kind}_ip.weight"] = torch.randn(size, width)
            number += 2
    return found

"""Adapters that are scaled by prompt: what they draw against weights that are changed by hand for each prompt."""

import re

import pytest
import tiny
import tiny_transformers
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline

from salun_diffusion import (
    SalunError,
    erase,
    fuse_erasure,
    list_erasures,
    load_erasure,
    set_erasure_scale,
    unload_erasure,
)
from salun_diffusion.erasures.adapter import Adapter, save_adapter
from salun_diffusion.erasures.by_prompt import prompt_scales
from salun_diffusion.erasures.fingerprint import fingerprint
from salun_diffusion.methods import find_method
from salun_diffusion.models import model_of
from salun_diffusion.models.text_unet import arguments, encode
from salun_diffusion.tensors import read_safetensors, write_safetensors

PROMPTS = ["a cat on a house", "a dog", "a blue airplane"]
NEGATIVE = "red"
STEPS = 3


def opened(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(folders):
    return opened(folders["sd1"])


def adapter(pipe, path, names, seed=0):
    """The file of a random adapter of rank 1 on the layers of the last attention blocks, convolutions among them."""
    random, state = torch.Generator().manual_seed(seed), {}
    for name, layer in pipe.unet.named_modules():
        if re.match(r"up_blocks\..*\.attentions\.", name) and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            out, *rest = layer.weight.shape
            for letter, shape in (("A", (1, *rest)), ("B", (out, 1, *rest[1:]))):
                state[f"{name}.lora_{letter}.weight"] = 0.3 * torch.randn(shape, generator=random)
    about = {"concept": f"concept {seed}", "method": "spm"} | ({"by_prompt": names} if names else {})
    save_adapter(path, pipe, state, fingerprint(pipe.unet.named_parameters()), about)
    return path


def draw(pipe, prompts=PROMPTS, seeds=None, **more):
    """Latents, one generator a picture."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
    how = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"} | more
    return pipe(prompts, generator=generators, **how).images


def plain_scale(pipe, prompt, names):
    """By the formula, a name after the other."""
    found = []
    for name in names:
        one, other = (encode(pipe, [text])["encoder_hidden_states"].double().flatten() for text in (prompt, name))
        words = [pipe.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, name)]
        found.append(float(one @ other / (one.norm() * other.norm())))
        found.append(sum(token in words[0] for token in set(words[1])) / len(set(words[1])))
    return max(found)


def drawn_by_hand(pipe, worn, guidance):
    """Each prompt by a network whose weights are W + Σ strength · scale · BA; ``worn``: file, strength."""
    before, pictures = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}, []
    for row, prompt in enumerate(PROMPTS):
        weights = dict(before)
        for file, strength in worn:
            one = Adapter.load(file)
            scale = strength * plain_scale(pipe, prompt, one.by_prompt)
            for name, (down, up) in one.factors.items():
                key = f"{name}.weight"
                weights[key] = weights[key] + scale * (up.flatten(1) @ down.flatten(1)).view(before[key].shape)
        pipe.unet.load_state_dict(weights)
        told, without = (arguments(encode(pipe, [text])) for text in (prompt, NEGATIVE))
        pipe.scheduler.set_timesteps(STEPS)
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(row))
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                conditional, unconditional = (pipe.unet(x, t, **one).sample for one in (told, without))
            predicted = unconditional + guidance * (conditional - unconditional) if guidance > 1 else conditional
            x = pipe.scheduler.step(predicted, t, x).prev_sample
        pictures.append(x)
    pipe.unet.load_state_dict(before)
    return torch.cat(pictures)


@pytest.mark.parametrize("kind, guidance", [("sd1", 1.0), ("sdxl", 3.0)])
def test_each_row_is_drawn_with_its_own_strength(kind, guidance, folders, tmp_path):
    """Two at once, one of them at half of its erasure's scale; a negative prompt's rows are scaled as the prompt's."""
    pipe = opened(folders[kind])
    one = adapter(pipe, tmp_path / "one.safetensors", ["cat"])
    two = adapter(pipe, tmp_path / "two.safetensors", ["red house", "blue dog picture"], seed=1)
    base = draw(pipe, negative_prompt=[NEGATIVE] * 3, guidance_scale=guidance)
    wanted = drawn_by_hand(pipe, [(one, 0.5), (two, 1.0)], guidance)
    load_erasure(pipe, one)
    load_erasure(pipe, two)
    set_erasure_scale(pipe, "concept 0", 0.5)
    found = draw(pipe, negative_prompt=[NEGATIVE] * 3, guidance_scale=guidance)
    near = 1e-3 * float((base - wanted).abs().max())
    assert torch.allclose(found, wanted, rtol=0, atol=near) and all((base - wanted).abs().amax((1, 2, 3)) > 100 * near)


def test_a_scale_is_the_greatest_cosine_or_share_of_a_names_tokens(pipe):
    texts = ["a red cat", "cat cat cat", "a dog", "", "a photo of an airplane on a blue background " * 12]
    names = ["cat", "red house airplane"]
    found = prompt_scales(pipe, texts, names)
    assert found.tolist() == pytest.approx([plain_scale(pipe, text, names) for text in texts], abs=1e-5)
    assert found[:2].tolist() == [1, 1] and all(found[2:] < 1) and found.dtype == torch.float32


def test_where_the_prompt_names_the_concept_it_is_the_lora_that_others_see(pipe, tmp_path):
    """To the bit; where it does not, it acts otherwise."""
    scaled = adapter(pipe, tmp_path / "scaled.safetensors", ["cat"])
    full = adapter(pipe, tmp_path / "full.safetensors", None)
    base = draw(pipe)
    load_erasure(pipe, full)
    wanted = draw(pipe)
    unload_erasure(pipe)
    load_erasure(pipe, scaled)
    found = draw(pipe)
    assert torch.equal(found[0], wanted[0]) and not any(torch.equal(found[row], wanted[row]) for row in (1, 2))
    set_erasure_scale(pipe, "concept 0", 0)
    assert torch.equal(draw(pipe), base) and "encode_prompt" not in vars(pipe)
    draw(pipe, PROMPTS[:2])  # it is not asked, whatever was drawn before
    set_erasure_scale(pipe, "concept 0", 1)
    assert torch.equal(draw(pipe), found)
    unload_erasure(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name="scaled.safetensors")
    assert torch.allclose(draw(pipe), wanted, rtol=0, atol=1e-4)  # where the factors lie in memory is not the same


def test_a_picture_does_not_depend_on_its_batch(pipe, tmp_path):
    """Two of each prompt, beside a guard that has the network predict for one more."""
    load_erasure(pipe, adapter(pipe, tmp_path / "one.safetensors", ["cat"]))
    other = opened(pipe.name_or_path)
    load_erasure(pipe, erase(other, "dog", method="sld", level="max", output_dir=tmp_path / "sld").path)
    seeds = [3, 4, 5, 6, 7, 8]
    together = draw(pipe, seeds=seeds, num_images_per_prompt=2)
    for place, seed in enumerate(seeds):
        alone = draw(pipe, [PROMPTS[place // 2]], [seed])
        assert torch.allclose(together[place : place + 1], alone, rtol=0, atol=1e-3)
    assert len(list_erasures(pipe)) == 2
    unload_erasure(pipe, "dog")
    assert list_erasures(pipe)[0]["intact"] and not torch.allclose(
        draw(pipe, seeds=seeds, num_images_per_prompt=2), together, atol=1e-2
    )


def test_it_changes_no_weight_and_comes_off_without_a_trace(pipe, tmp_path):
    base, weights = draw(pipe), tiny.bits(pipe)
    load_erasure(pipe, adapter(pipe, tmp_path / "full.safetensors", None))
    unload_erasure(pipe)
    before = tiny.trace(pipe)  # peft itself leaves an attribute that says that there are no adapters
    one = adapter(pipe, tmp_path / "one.safetensors", ["cat"])
    two = adapter(pipe, tmp_path / "two.safetensors", ["dog"], seed=1)
    load_erasure(pipe, one)
    only = draw(pipe)
    load_erasure(pipe, two)
    both = draw(pipe)
    assert not torch.equal(only, base) and not torch.equal(both, only)
    unload_erasure(pipe, "concept 1")
    assert torch.equal(draw(pipe), only)
    load_erasure(pipe, two)
    assert torch.equal(draw(pipe), both) and all(one["intact"] for one in list_erasures(pipe))
    unload_erasure(pipe)
    assert tiny.same(weights, tiny.bits(pipe)) and tiny.trace(pipe) == before and torch.equal(draw(pipe), base)


def test_the_file_has_a_version_of_its_own(pipe, tmp_path):
    scaled = adapter(pipe, tmp_path / "scaled.safetensors", ["cat", "kitten"])
    full = adapter(pipe, tmp_path / "full.safetensors", None)
    (tensors, text), (_, plain) = read_safetensors(scaled), read_safetensors(full)
    assert (text["version"], text["by_prompt"], plain["version"]) == ("2", '["cat", "kitten"]', "1")
    assert "by_prompt" not in plain and Adapter.load(full).by_prompt is None
    digests = {Adapter.load(path).digest() for path in (scaled, full)}
    digests.add(Adapter.load(adapter(pipe, tmp_path / "other.safetensors", ["cat"])).digest())
    assert len(digests) == 3 and Adapter.load(scaled).by_prompt == ["cat", "kitten"]
    for change in ({"version": "1"}, {"by_prompt": "[]"}, {"by_prompt": '"cat"'}, {"by_prompt": '[""]'}):
        write_safetensors(tmp_path / "bad.safetensors", tensors, text | change)
        with pytest.raises(SalunError, match="is damaged: version 2 of the format, and no other, must have the names"):
            load_erasure(pipe, tmp_path / "bad.safetensors")


def test_where_it_cannot_act_it_says_so(pipe, tmp_path):
    path = adapter(pipe, tmp_path / "one.safetensors", ["cat"])
    load_erasure(pipe, path)
    with pytest.raises(SalunError, match="'concept 0' is scaled by prompt, which no weights can be .* cannot be fused"):
        fuse_erasure(pipe)
    with pytest.raises(SalunError, match="An adapter that is scaled by prompt reads the prompt's words"):
        pipe(prompt_embeds=torch.zeros(1, 77, 16), negative_prompt_embeds=torch.zeros(1, 77, 16))
    with pytest.raises(SalunError, match="'concept 0' acts in a call of the very pipeline that it was loaded on"):
        model_of(pipe).predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), model_of(pipe).encode(["a cat"]))
    pipe.fuse_lora()
    with pytest.raises(SalunError, match="was fused with the weights by fuse_lora.*call pipe.unfuse_lora"):
        draw(pipe)
    pipe = opened(pipe.name_or_path)  # no unfuse_lora() brings back the exact bits
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    how = {"image": torch.rand(1, 3, 16, 16), "num_inference_steps": 4, "output_type": "pt"}
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    base = other("a dog", generator=seeded[0], **how).images
    load_erasure(other, path)
    assert not torch.equal(other("a dog", generator=seeded[1], **how).images, base)
    with pytest.raises(SalunError, match="acts by what its pipeline draws, and another pipeline with this denoiser"):
        load_erasure(pipe, adapter(opened(pipe.name_or_path), tmp_path / "two.safetensors", ["dog"], seed=1))


def test_a_pipeline_that_has_no_clip_is_refused_before_it_trains(tmp_path):
    other = tiny_transformers.pixart(tmp_path / "other")
    message = re.escape(
        "--method spm scales the adapter by prompt, as can be done for Stable Diffusion 1.x, 2.x and XL"
    )
    with pytest.raises(SalunError, match=f"^{message}.*: give --by_prompt no, for full strength on every prompt"):
        erase(other, "airplane", method="spm", output_dir=tmp_path / "run")
    spm = find_method("spm")
    spm.check_fit(model_of(other), spm.parse(["by_prompt=no"]), "--method spm")

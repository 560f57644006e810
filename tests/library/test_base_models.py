"""The same command on each kind of base model: SD 1.x, SD 2.x (v-prediction) and SDXL, tiny and of random weights."""

import re
import shutil

import pytest
import tiny
import tiny_labels
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from shell import DEMO, QUICK, here

from salun_diffusion import SalunError, load_erasure, unload_erasure
from salun_diffusion.models import load_model, model_of
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.models.text_unet import arguments, encode, encode_empty


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_erases_and_loads(kind, folders, tmp_path):
    here(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", folders[kind], "--concept", "steam engine",
        "--output_dir", tmp_path / "run", "--data_dir", tmp_path / "data", "--learning_rate", "1e-3", *QUICK,
    )  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    before = tiny.bits(pipe)

    def draw():
        how = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipe("a picture of a cat", **how).images

    plain = draw()
    load_erasure(pipe, tmp_path / "run")
    assert not torch.equal(draw(), plain)
    unload_erasure(pipe)
    assert tiny.same(tiny.bits(pipe), before) and torch.equal(draw(), plain)


def test_sdxl_is_told_what_its_own_pipeline_tells_it(folders):
    """The conditioning is caught where the pipeline hands it to the U-Net."""
    pipe = DiffusionPipeline.from_pretrained(folders["sdxl"])
    pipe.set_progress_bar_config(disable=True)
    told = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs), with_kwargs=True)
    pipe("a picture of a cat", num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    mine = [arguments(text) for text in (encode_empty(pipe), encode(pipe, ["a picture of a cat"]))]
    assert torch.equal(told[0]["encoder_hidden_states"], torch.cat([m["encoder_hidden_states"] for m in mine]))
    for key in ("text_embeds", "time_ids"):
        expected = torch.cat([m["added_cond_kwargs"][key] for m in mine])
        assert torch.equal(told[0]["added_cond_kwargs"][key], expected), key


def test_a_velocity_is_compared_with_a_velocity(folders):
    """V = α·ε − σ·x (Salimans & Ho 2022), written out."""
    schedule = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    clean, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    signal = schedule.alphas_cumprod[t].view(3, 1, 1, 1)
    expected = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    model = model_of(DiffusionPipeline.from_pretrained(folders["sd2"]))
    model.schedule = schedule
    torch.testing.assert_close(model.target(clean, noise, t), expected)
    model.schedule = DDPMScheduler(prediction_type="sample")
    with pytest.raises(SalunError, match="prediction_type is 'sample'"):
        model.target(clean, noise, t)


def test_gradient_checkpointing_and_precision_change_little(folders, tmp_path):
    from salun_diffusion import Delta

    found = {}
    for precision, more in (("plain", []), *((p, ["--mixed_precision", p]) for p in ("no", "bf16", "fp16"))):
        more += ["--gradient_checkpointing"] if more else []
        here(
            "python", "erase_concept.py", "--pretrained_model_name_or_path", folders["sd1"], "--concept", "x",
            "--output_dir", tmp_path / precision, "--data_dir", tmp_path / "data", "--save_dtype", "fp32", *QUICK,
            *more,
        )  # fmt: skip
        found[precision] = Delta.load(tmp_path / precision / "erasure.safetensors")
    plain = found["plain"]
    assert plain.digest() == found["no"].digest(), "the same arithmetic, done twice"
    for precision in ("bf16", "fp16"):
        other = found[precision]
        agree = sum(int((plain.masks[n] == other.masks[n]).sum()) for n in plain.masks if n in other.masks)
        assert agree > 0.8 * sum(mask.numel() for mask in plain.masks.values()), precision


def _drop(tensors, name):
    del tensors[name]


def _spoil(tensors, name):
    tensors[name].view(-1)[-1] = float("nan")


def _reshape(tensors, name):
    tensors[name] = torch.zeros(3, 3, 3)


NAMES = {
    "unet": "conv_norm_out.weight",
    "vae": "decoder.conv_norm_out.weight",
    "text_encoder": "encoder.layers.0.layer_norm1.weight",
}


@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("damage, sentence", [(_drop, "lacks {}; fetch"), (_spoil, "NaN or Inf in its {part}: {}"),
                                              (_reshape, "{}.*shape")])  # fmt: skip
def test_a_base_that_is_not_whole_and_finite_is_refused(tiny_folder, tmp_path, part, damage, sentence):
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(NAMES[part]))
    damage(tensors, name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SalunError, match=sentence.format(re.escape(NAMES[part]), part=part)) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_weight_more_than_needed_is_no_fault(tiny_folder, tmp_path):
    """As Stable Diffusion's own text encoder has ``position_ids``."""
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    for file in folder.glob("*/*.safetensors"):
        save_file({**load_file(file), "more": torch.ones(3)}, file, {"format": "pt"})
    assert tiny.same(tiny.bits(load_model(str(tiny_folder)).pipe), tiny.bits(load_model(str(folder)).pipe))


@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 99, "a pickle"),
        ((1 << 40).to_bytes(8, "little") + b"{", "claims a header of"),
    ],
)
def test_weights_of_a_base_that_are_another_kind_of_file(tiny_folder, tmp_path, part, content, sentence):
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    (file,) = (folder / part).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(SalunError, match=f"cut short: {len(whole)} bytes expected, {len(whole) - 10} found") as caught:
        load_model(str(folder))
    assert str(file) in str(caught.value)
    file.write_bytes(content)
    with pytest.raises(SalunError, match=sentence) as caught:
        load_model(str(folder))
    assert str(file) in str(caught.value)


def test_both_commands_refuse_a_base_that_is_not_whole(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "base")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    base = ("--pretrained_model_name_or_path", folder, "--concept", "airplane", "--output_dir", tmp_path / "run")
    for command, more in ((("erase_concept.py",), ()), (("-m", "eval", "accuracy"), ("--erasure", tmp_path / "run"))):
        done = here("python", *command, *base, *more, check=False)
        assert done.returncode == 1 and "lacks final_layer_norm.weight" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_a_compiled_network_is_of_its_family_too(tiny_folder, tmp_path):
    """What a family is known by is the network itself, which torch.compile wraps."""
    tiny_labels.build(tmp_path / "labels")
    for folder, family in ((tiny_folder, "TextUNet"), (tmp_path / "labels", "LabelUNet")):
        pipe = load_pipeline(str(folder))
        pipe.unet = torch.compile(pipe.unet)
        assert type(model_of(pipe)).__name__ == family

"""The same command on each kind of base model: SD 1.x, SD 2.x (v-prediction) and SDXL, tiny and of random weights."""

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from shell import QUICK, here

from salun_diffusion import SalunError, load_erasure, unload_erasure
from salun_diffusion.models import model_of
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

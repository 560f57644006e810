"""The files that a base model may come in: one .safetensors file, a variant, pickles; for erasing and for measuring."""

import re
import shutil

import pytest
import tiny
import torch
from shell import here

from salun_diffusion import SalunError
from salun_diffusion.files import write_safetensors
from salun_diffusion.models.load import load_pipeline

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = [  # names of the tiny U-Net (two levels of one layer), and what Stable Diffusion's own code calls them
    (r"conv_in\.", "input_blocks.0.0."),
    (r"time_embedding\.linear_(\d)\.", lambda m: f"time_embed.{2 * int(m[1]) - 2}."),
    (r"conv_norm_out\.", "out.0."),
    (r"conv_out\.", "out.2."),
    (r"down_blocks\.(\d)\.resnets\.0\.", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0."),
    (r"down_blocks\.(\d)\.attentions\.0\.", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1."),
    (r"down_blocks\.0\.downsamplers\.0\.conv\.", "input_blocks.2.0.op."),
    (r"mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
    (r"mid_block\.attentions\.0\.", "middle_block.1."),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0."),
    (r"up_blocks\.(\d)\.attentions\.(\d)\.", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1."),
    (r"up_blocks\.0\.upsamplers\.0\.", "output_blocks.1.1."),
]
VAE = [
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}."),
    (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{1 - int(m[1])}.upsample."),
    (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"conv_norm_out\.", "norm_out."),
]


def renamed(name, rules):
    for old, new in rules:
        name = re.sub(old, new, name)
    return name


def one_file(pipe, path):
    """Writes the pipeline as Stable Diffusion's own code saves one."""
    tensors = {}
    for name, value in pipe.unet.state_dict().items():
        name = renamed(name, UNET)
        if re.match(r"(input|output)_blocks\.\d\.0\.|middle_block\.[02]\.", name):
            name = renamed(name, [(rf"\.{old}\.", f".{new}.") for old, new in RESNET.items()])
        tensors[f"model.diffusion_model.{name}"] = value
    for name, value in pipe.vae.state_dict().items():
        name = renamed(name, VAE)
        conv = ".attn_1." in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if conv else value
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    write_safetensors(path, tensors, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of one model in each way."""
    folder = tmp_path_factory.mktemp("files")
    pipe = tiny.build(folder / "plain")
    one_file(pipe, folder / "alone.safetensors")
    shutil.copytree(folder / "plain", folder / "single")
    for weights in (folder / "single").glob("*/*.safetensors"):
        weights.unlink()
    one_file(pipe, folder / "single" / "model.safetensors")
    pipe.save_pretrained(folder / "pickled", safe_serialization=False)
    pipe.to(torch.float16).save_pretrained(folder / "half", variant="fp16")
    return folder


def test_one_file_is_the_same_model(folder):
    plain, single = load_pipeline(str(folder / "plain")), load_pipeline(str(folder / "single" / "model.safetensors"))
    assert tiny.same(tiny.bits(plain), tiny.bits(single)) and single.safety_checker is None
    half = load_pipeline(str(folder / "single" / "model.safetensors"), dtype=torch.float16)
    assert (half.unet.dtype, half.text_encoder.dtype, half.vae.dtype) == (torch.float16, torch.float16, torch.float32)
    assert tiny.same(tiny.bits(half), tiny.bits(load_pipeline(str(folder / "plain"), dtype=torch.float16)))


def test_erasing_and_drawing_from_one_file_or_a_variant(folder, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,evaluation_seed\na cat,1\n")
    for base, more in ((folder / "single" / "model.safetensors", []), (folder / "half", ["--variant", "fp16"])):
        run = tmp_path / base.name
        common = ["--pretrained_model_name_or_path", base, *more]
        here("python", "erase_concept.py", *common, "--concept", "cat", "--anchor", "dog", "--method", "uce",
             "--output_dir", run)  # fmt: skip
        done = here("python", "-m", "eval", "draw", *common, "--erasure", run, "--prompts", tmp_path / "prompts.csv",
             "--num_inference_steps", "1", "--height", "16", "--width", "16", "--dtype", "bf16",
             "--output_dir", run / "drawn")  # fmt: skip
        assert "1 pictures of each of 2 models" in done.stdout


@pytest.mark.parametrize("command", ["accuracy", "composition", "i2p", "draw"])
def test_every_command_that_draws_takes_variant_and_dtype(command):
    told = here("python", "-m", "eval", command, "--help").stdout
    assert "--variant" in told and "--dtype {fp32,fp16,bf16}" in told


@pytest.mark.parametrize(
    ("name", "variant", "sentence"),
    [
        ("pickled", None, r"its weights are pickles \(\.bin\), .*save_pretrained\(FOLDER\)"),
        ("half", None, "its weights are of a variant: give --variant fp16"),
        ("half", "ema", "its weights are of a variant: give --variant fp16"),
        ("plain", "fp16", "no such modeling files are available; leave --variant fp16 out"),
        ("single/model.safetensors", "fp16", "is one file, which has no variants: leave --variant fp16 out"),
        ("broken.safetensors", None, "could not be loaded as a Stable Diffusion checkpoint .*give a diffusers folder"),
        ("model.ckpt", None, "is a pickle, which can run code when loaded: give the same model as a .safetensors"),
    ],
)
def test_what_cannot_be_loaded(folder, name, variant, sentence):
    (folder / "broken.safetensors").write_bytes(b"no weights")
    (folder / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(SalunError, match=sentence) as caught:
        load_pipeline(str(folder / name), variant=variant)
    assert "\n" not in str(caught.value)

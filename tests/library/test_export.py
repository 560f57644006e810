"""An erasure in other tools' formats: written by the command, loaded back by those tools' own means, and compared."""

import json

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from shell import DEMO, here, run

from salun_diffusion import Delta, SalunError, load_erasure
from salun_diffusion.export import ExportConfig, Request, checkpoint, differences, export
from salun_diffusion.export.original import unet_names, vae_names
from salun_diffusion.models.load import load_pipeline

PROMPTS = ["an airplane", "two cats in ink style"]
SD14 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


@pytest.fixture(scope="module")
def erasure(tmp_path_factory):
    """A change of every parameter of the demo's U-Net, norms and biases too, and one of its attention alone."""
    folder = tmp_path_factory.mktemp("erasures")
    unet = load_pipeline("demo").unet
    for name, only in (("all", ""), ("attention", "attn2.to_")):
        delta = tiny.erasure(unet, only=only, base_model="demo", concept="airplane")
        delta.save(folder / f"{name}.safetensors", torch.float16)
    return folder


@pytest.fixture(scope="module")
def erased(erasure):
    """The demo model with the larger of them, and its pictures."""
    pipe = load_pipeline("demo")
    load_erasure(pipe, erasure / "all.safetensors")
    return pipe


@pytest.mark.parametrize("format", ["diff", "unet", "single_file"])
def test_exact_formats_are_exact(format, erasure, tmp_path):
    words = ["export", erasure / "all.safetensors", "--format", format, "--output", tmp_path / "out.safetensors"]
    command = run if format == "diff" else here  # each starts the command anew, or in this process
    done = command("python", "-m", "salun_diffusion", *words, "--prompts", *PROMPTS)
    assert "weights: bit for bit those of the erasure" in done.stdout
    assert "pictures: 0 of 255 apart on average, at most 0, over 2 prompts" in done.stdout
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["salun_concept"] == "airplane" and len(file.metadata()["salun_digest"]) == 64


def test_a_folder_is_a_pipeline_that_knows_its_erasure(erasure, erased, tmp_path):
    done = export(erasure / "all.safetensors", "diffusers", tmp_path / "erased", prompts=PROMPTS[:1])
    assert done.largest_difference == 0 and done.picture_difference == (0, 0)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "erased")
    assert all(torch.equal(pipe.unet.get_parameter(name), w) for name, w in erased.unet.named_parameters())
    with pytest.raises(SalunError, match="already erased"):
        load_erasure(pipe, erasure / "all.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["erased"]


def test_stock_diffusers_opens_them(erasure, erased, tmp_path):
    """No line of ours takes part: the network from a state dict, the pipeline from one file."""
    export(erasure / "all.safetensors", "unet", tmp_path / "unet.safetensors")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(DEMO, subfolder="unet"))
    unet.load_state_dict(load_file(tmp_path / "unet.safetensors"))
    export(erasure / "all.safetensors", "single_file", tmp_path / "model.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(DEMO), local_files_only=True, safety_checker=None
    )
    for name, weight in erased.unet.named_parameters():
        assert torch.equal(unet.get_parameter(name), weight) and torch.equal(pipe.unet.get_parameter(name), weight)
    for part in ("vae", "text_encoder"):
        theirs, ours = getattr(pipe, part).state_dict(), getattr(erased, part).state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_one_file_of_the_other_kinds_opens_too(kind, tmp_path):
    """OpenCLIP's layout of a text encoder, alone (2.x) and beside CLIP's (XL)."""
    if kind == "sd2":
        pipe = tiny.build(tmp_path / "base", prediction_type="v_prediction", hidden_act="gelu")
    else:
        pipe = tiny.build_xl(tmp_path / "base", hidden_size=24)
    tiny.erasure(pipe.unet, only="", concept="x").save(tmp_path / "erasure.safetensors")
    done = export(
        tmp_path, "single_file", tmp_path / "model.safetensors", base=str(tmp_path / "base"), prompts=["a cat"]
    )
    assert done.largest_difference == 0 and done.picture_difference == (0, 0) and not done.left_out
    opened = type(pipe).from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "base"), local_files_only=True
    )
    for part in {"text_encoder", "text_encoder_2", "vae"} & pipe.components.keys():
        theirs, ours = getattr(opened, part).state_dict(), getattr(pipe, part).state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_base_of_one_file_has_its_erasure_exported_too(tmp_path):
    pipe = tiny.build(tmp_path / "base")
    base = tmp_path / "base" / "original.safetensors"
    checkpoint.write(Request(None, pipe, base, None, {"format": "pt"}))
    tiny.erasure(pipe.unet, only="", concept="x").save(tmp_path / "erasure.safetensors")
    done = export(tmp_path, "single_file", tmp_path / "erased.safetensors", base=str(base), prompts=["a cat"])
    assert done.largest_difference == 0 and done.picture_difference == (0, 0)


def test_a_lora_is_the_nearest_of_its_rank(erasure, tmp_path):
    """Against the plain sum of the left-out singular values; a full rank is the erasure, to rounding."""
    delta = Delta.load(erasure / "attention.safetensors")
    done = export(erasure / "attention.safetensors", "lora", tmp_path / "lora", rank=6)
    left, whole = 0.0, 0.0
    for name in delta.masks:
        if name.endswith("weight"):
            squares = torch.linalg.svdvals(delta.dense(name).double()).square()
            left, whole = left + float(squares[6:].sum()), whole + float(squares.sum())
    biases = [name for name in delta.masks if name.endswith("bias")]
    missing = left + sum(float(delta.dense(name).double().square().sum()) for name in biases)
    moved = whole + missing - left
    assert done.relative_error == pytest.approx((missing / moved) ** 0.5, rel=1e-3) and done.rank == 6
    assert done.left_out == sorted(biases) and biases
    full = export(erasure / "attention.safetensors", "lora", tmp_path / "full", rank=128)
    assert full.relative_error == pytest.approx(((missing - left) / moved) ** 0.5, rel=1e-3)
    by_error = export(
        erasure / "attention.safetensors", "lora", tmp_path / "error", error=(left / whole) ** 0.5 * 1.001
    )
    assert by_error.rank == 6


def test_a_lora_loads_as_people_load_loras(erasure, erased, tmp_path):
    """Under both kinds of names it does the same, and its strength is set_adapters'."""
    export(erasure / "attention.safetensors", "lora", tmp_path / "lora", rank=16)
    export(erasure / "attention.safetensors", "lora", tmp_path / "a1111.safetensors", rank=16, names="kohya")
    keys = load_file(tmp_path / "a1111.safetensors").keys()
    assert {key.rpartition(".")[0].startswith("lora_unet_") for key in keys} == {True}
    assert {key.split(".", 1)[1] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 16

    def draw(pipe):
        noise = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, generator=noise, output_type="pt").images

    pipe = load_pipeline("demo")
    plain = draw(pipe)
    pipe.load_lora_weights(str(tmp_path / "lora"), adapter_name="one")
    one = draw(pipe)
    pipe.set_adapters(["one"], [0.0])
    assert torch.equal(draw(pipe), plain) and not torch.allclose(one, plain, atol=1e-2)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(tmp_path), weight_name="a1111.safetensors")
    assert torch.allclose(draw(pipe), one, atol=1e-4)


@pytest.mark.parametrize("shape", [SD14, SDXL], ids=["sd14", "sdxl"])
def test_names_are_those_that_diffusers_reads_back(shape):
    """For every parameter of the real shapes: diffusers' own converter takes each name to where it came from."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**shape), AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
    config = dict(unet.config) | {"class_embed_type": None}
    original = {f"model.diffusion_model.{new}": name for name, new in unet_names(unet).items()}
    assert len(original) == len(list(unet.parameters()))
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(original), config)
    assert back == {name: name for name, _ in unet.named_parameters()}
    original = {f"first_stage_model.{new}": torch.full((1, 1), i) for i, new in enumerate(vae_names(vae).values())}
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(original), dict(vae.config))
    assert {name: int(value) for name, value in back.items()} == {name: i for i, name in enumerate(vae_names(vae))}


def test_differences_of_sdxl_have_the_original_names():
    with torch.device("meta"):
        pipe = type("Pipe", (), {"unet": UNet2DConditionModel(**SDXL)})()
    named = differences.keys(pipe)
    assert len({*named.values()}) == len(named)
    assert named["up_blocks.0.upsamplers.0.conv.weight"] == "lora_unet_output_blocks_2_2_conv.diff"
    assert named["conv_norm_out.bias"] == "lora_unet_out_0.diff_b"


def test_words_for_what_does_not_go(erasure, tmp_path):
    source = erasure / "attention.safetensors"
    (tmp_path / "there").mkdir()
    for words, message in (
        (("diff", tmp_path / "x", "--rank", "4"), "--rank means nothing to --format diff: leave it out."),
        (("unet", tmp_path / "there"), "exists: name another --output, or remove it."),
        (("lora", tmp_path / "x", "--rank", "4", "--error", "0.1"), "--rank and --error were both given"),
    ):
        format, output, *more = words
        line = ["export", source, "--format", format, "--output", output, *more]
        done = here("python", "-m", "salun_diffusion", *line, check=False)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    done = here("python", "-m", "salun_diffusion", "export", source, "--output", tmp_path / "x", check=False)
    assert done.returncode == 2 and "--format is missing" in done.stderr
    with pytest.raises(SalunError, match="--rank is 0: give a whole number of at least 1"):
        export(source, "lora", tmp_path / "x", rank=0)
    with pytest.raises(SalunError, match="'format' is 'onnx'; choose one of lora, diff"):
        export(source, "onnx", tmp_path / "x")
    tiny.build(tmp_path / "tiny")
    with pytest.raises(SalunError, match="other base model|does not have|has shape"):
        export(source, "unet", tmp_path / "x", base=str(tmp_path / "tiny"))
    assert not (tmp_path / "x").exists()


def test_differences_under_the_names_of_lycoris(erasure, tmp_path):
    """LyCORIS has names of its own for norms, and takes none of them without its weight."""
    pipe = load_pipeline("demo")
    delta = tiny.erasure(pipe.unet, only="norm1.bias", base_model="demo", concept="x")
    delta.save(tmp_path / "erasure.safetensors")
    for source, name in ((erasure / "all.safetensors", "all"), (tmp_path / "erasure.safetensors", "biases")):
        done = export(source, "diff", tmp_path / f"{name}.safetensors", names="lycoris")
        assert done.largest_difference == 0 and not done.left_out
        found = load_file(tmp_path / f"{name}.safetensors")
        for module, layer in pipe.unet.named_modules():
            key = "lora_unet_" + module.replace(".", "_")
            if isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm):
                assert not {f"{key}.diff", f"{key}.diff_b"} & {*found}
                assert f"{key}.w_norm" in found or f"{key}.b_norm" not in found
    assert {key.rpartition(".")[2] for key in found} == {"w_norm", "b_norm"}
    with pytest.raises(SalunError, match="--names lycoris means nothing to --format lora"):
        export(tmp_path, "lora", tmp_path / "x", names="lycoris")
    with pytest.raises(SalunError, match="--names kohya means nothing to --format diff"):
        export(tmp_path, "diff", tmp_path / "x", names="kohya")


def on_meta(shape):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
    unet.requires_grad_(False)
    return type("Pipe", (), {"unet": unet})()


@pytest.mark.parametrize("lycoris", [False, True])
@pytest.mark.parametrize("shape", [SD14, SDXL], ids=["sd14", "sdxl"])
def test_differences_of_the_real_shapes_come_back_bit_for_bit(shape, lycoris, tmp_path):
    """A linear layer, a convolution, a norm and a lone bias in the middle of the real model; the rest has no values."""
    pipe, names = on_meta(shape), ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    named = differences.keys(pipe, lycoris)
    assert len({*named.values()}) == len(named) == len(list(pipe.unet.parameters()))
    names += ["up_blocks.0.upsamplers.0.conv.weight", "conv_norm_out.weight", "conv_norm_out.bias", "conv_in.bias"]
    torch.manual_seed(0)
    for name in [*names, "conv_in.weight"]:
        module, kind = name.rsplit(".", 1)
        layer = pipe.unet.get_submodule(module)
        setattr(layer, kind, torch.nn.Parameter(torch.randn(getattr(layer, kind).shape), requires_grad=False))
    base = {name: pipe.unet.get_parameter(name).clone() for name in [*names, "conv_in.weight"]}
    masks = {name: torch.rand(base[name].shape) < 0.5 for name in names}
    values = {name: 0.01 * torch.randn(int(mask.sum())) for name, mask in masks.items()}
    delta = Delta(masks, values, None, {})
    options = ExportConfig(names="lycoris" if lycoris else None)
    request = Request(delta, pipe, tmp_path / "out.safetensors", options, {"format": "pt"})
    differences.write(request)
    differences.read_back(request, pipe)
    for name in names:
        wanted = base[name].clone()
        wanted[masks[name]] += values[name]
        assert torch.equal(pipe.unet.get_parameter(name), wanted)
    assert torch.equal(pipe.unet.conv_in.weight, base["conv_in.weight"])
    assert len(load_file(tmp_path / "out.safetensors")) == len(names) + 1


@pytest.mark.parametrize("shape", [SD14, SDXL], ids=["sd14", "sdxl"])
def test_a_lora_of_the_real_shapes_is_taken_in_under_both_names(shape):
    """Every linear layer and convolution of the blocks: diffusers reads kohya's names as those that peft gave."""
    network = on_meta(shape).unet
    layers = [name for name, layer in network.named_modules()
              if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "blocks" in name]  # fmt: skip
    with torch.device("meta"):
        network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers))
    state = {f"unet.{key}": torch.zeros(()).expand(value.shape)  # one number, whatever the shape
             for key, value in get_peft_model_state_dict(network).items()}  # fmt: skip
    kohya = {key: value.contiguous() if key.endswith("alpha") else value
             for key, value in convert_state_dict_to_kohya(dict(state)).items()}  # fmt: skip
    assert len(state) == 2 * len(layers) and all(key.startswith("lora_unet_") for key in kohya)
    kind = StableDiffusionXLPipeline if shape is SDXL else StableDiffusionPipeline
    back, alphas = kind.lora_state_dict(kohya, unet_config=network.config)
    back = {key: value.shape for key, value in convert_unet_state_dict_to_peft(back).items()}
    assert back == {key: value.shape for key, value in state.items()}
    assert {float(alpha) for alpha in alphas.values()} == {4.0} and len(alphas) == len(layers)

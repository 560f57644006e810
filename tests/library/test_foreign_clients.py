"""Exports in the hands of other tools, where their wheels are installed (the extra ``clients``): stable-diffusion.cpp,
as cyllama bundles it, and LyCORIS. None of them is among what ``make test`` installs.

stable-diffusion.cpp knows models by the shapes of Stable Diffusion itself, so that the demo model is none to it ("get
sd version from file failed"); here is one of SD 1.4's shape with random weights, 2 GB in fp16.
"""

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from salun_diffusion import load_erasure
from salun_diffusion.erasures.weights import MaskedWeights
from salun_diffusion.export import ExportConfig, Request, checkpoint, differences, export
from salun_diffusion.models.load import load_pipeline

STEPS, SEED = 4, 5
IDS = [49406, 320, 2368] + [49407] * 74  # "a cat" in CLIP's vocabulary, which stable-diffusion.cpp brings along


def fill(module, seed):
    """Random weights of a usual size, quickly: one pool of noise, for each tensor from another place of it."""
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
    module.to_empty(device="cpu")
    with torch.no_grad():
        for number, (name, weight) in enumerate(module.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(float("norm" in name and name.endswith("weight")))
                continue
            size = 0.05 if "_embedding.weight" in name else weight[0].numel() ** -0.5
            noise = pool.roll(7919 * number).repeat(-(-weight.numel() // len(pool)))[: weight.numel()]
            weight.copy_(noise.view(weight.shape) * size)
        for _, positions in module.named_buffers():
            positions.copy_(torch.arange(positions.shape[-1]).expand(positions.shape))
    return module.half()


def sd14():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=64,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768,
                bos_token_id=49406, eos_token_id=49407,
            )
        )  # fmt: skip
    return StableDiffusionPipeline(
        unet=fill(unet, 0), vae=fill(vae, 1), text_encoder=fill(text, 2), tokenizer=None,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                         steps_offset=1, timestep_spacing="linspace"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def by_diffusers(pipe):
    """The picture, 0-255, by fp32 arithmetic with the fp16 weights."""
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        words = pipe.text_encoder(torch.tensor([IDS]))[0]
    picture = pipe(
        prompt_embeds=words, guidance_scale=1.0, num_inference_steps=STEPS, height=64, width=64, output_type="np",
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    pipe.to(torch.float16)
    return (picture * 255).round()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pictures of the base and of the erased model by both tools: name → picture, ``cpp …`` those of the other tool."""
    sd = pytest.importorskip("cyllama.sd")
    folder, pipe = tmp_path_factory.mktemp("sd14"), sd14()
    checkpoint.write(Request(None, pipe, folder / "base.safetensors", None, {"format": "pt"}))
    tiny.erasure(pipe.unet, size=0.02, only="attn2.to_").save(folder / "erasure.safetensors", torch.float16)
    delta = MaskedWeights.load(folder / "erasure.safetensors").delta
    differences.write(Request(delta, pipe, folder / "gone.safetensors", ExportConfig(), {"format": "pt"}))
    found = {"base": by_diffusers(pipe)}
    load_erasure(pipe, folder / "erasure.safetensors")
    checkpoint.write(Request(None, pipe, folder / "erased.safetensors", None, {"format": "pt"}))
    found["erased"] = by_diffusers(pipe)
    sigmas = pipe.scheduler.sigmas.tolist()
    del pipe

    def by_cpp(file, lora=None):
        context = sd.SDContextParams(model_path=str(folder / file))
        context.rng_type = context.sampler_rng_type = sd.RngType.CPU  # torch's own noise
        context.lora_apply_mode = sd.LoraApplyMode.IMMEDIATELY
        context.n_threads = 2
        asked = sd.SDImageGenParams()
        asked.prompt, asked.width, asked.height, asked.seed = "a cat", 64, 64, SEED
        how = asked.sample_params
        how.cfg_scale, how.sample_steps, how.sample_method, how.custom_sigmas = (
            1.0,
            STEPS,
            sd.SampleMethod.EULER,
            sigmas,
        )
        asked.sample_params = how
        if lora:
            asked.set_loras([{"path": str(folder / lora), "multiplier": 1.0}])
        model = sd.SDContext(context)
        picture = model.generate_with_params(asked)[0].to_numpy().astype(float)
        model.close()
        return picture

    found["cpp base"] = by_cpp("base.safetensors")
    found["cpp single_file"] = by_cpp("erased.safetensors")
    found["cpp diff"] = by_cpp("base.safetensors", "gone.safetensors")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return found


def apart(one, other):
    return float(np.abs(one - other).mean()), float(np.abs(one - other).max())


@pytest.mark.parametrize("format", ["single_file", "diff"])
def test_stable_diffusion_cpp_draws_what_diffusers_draws(drawn, format):
    """To the tolerance that the two have without any export: a level of 255 here and there."""
    mean, most = apart(drawn["base"], drawn["cpp base"])
    assert mean < 0.2 and most <= 2 and drawn["base"].std() > 20
    assert apart(drawn["base"], drawn["erased"])[0] > 5
    found = apart(drawn["erased"], drawn[f"cpp {format}"])
    assert found[0] < mean + 0.1 and found[1] <= most + 1


def test_lycoris_merges_differences_bit_for_bit(tmp_path):
    """Norms too, under the names that it has for them; under others' names it refuses them."""
    lycoris = pytest.importorskip("lycoris")
    pipe = load_pipeline("demo")
    tiny.erasure(pipe.unet, only="", base_model="demo").save(tmp_path / "erasure.safetensors", torch.float16)
    prefix, lycoris.LycorisNetwork.LORA_PREFIX = lycoris.LycorisNetwork.LORA_PREFIX, "lora_unet"
    try:
        export(tmp_path, "diff", tmp_path / "theirs.safetensors", names="lycoris")
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "theirs.safetensors"), pipe.unet)
        network.merge_to(1.0)
        export(tmp_path, "diff", tmp_path / "plain.safetensors")
        with pytest.raises(ValueError, match="groupnorm is not supported"):
            lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "plain.safetensors"), load_pipeline("demo").unet)
    finally:
        lycoris.LycorisNetwork.LORA_PREFIX = prefix
    erased = load_pipeline("demo")
    load_erasure(erased, tmp_path / "erasure.safetensors")
    for name, weight in erased.unet.named_parameters():
        assert torch.equal(pipe.unet.get_parameter(name), weight)

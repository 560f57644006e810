"""A real StableDiffusionPipeline with random weights, small enough to build in a second."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.fingerprint import fingerprint

WORDS = ["a", "an", "of", "on", "picture", "photo", "airplane", "cat", "dog", "house", "red", "blue", "background"]


def tokenizer(folder):
    """A CLIPTokenizer that knows WORDS as whole words and spells out any other by its bytes."""
    byte_symbols = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    byte_symbols += [chr(256 + number) for number in range(256 - len(byte_symbols))]
    tokens = byte_symbols + [symbol + "</w>" for symbol in byte_symbols]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    pairs = dict.fromkeys(" ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _text_config(words, **more):
    return CLIPTextConfig(
        vocab_size=len(words),
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        **{"hidden_size": 16, **more},
    )


def _autoencoder():
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )


def _unet(**more):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def build(folder, seed=0, prediction_type="epsilon", **text):
    """Makes a StableDiffusionPipeline, saves it into `folder` (a Path) and returns it: float32, 16x16 pictures.

    `text` goes into its text encoder's config.
    """
    torch.manual_seed(seed)
    words = tokenizer(folder / "tokenizer")
    pipe = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(_text_config(words, **text)),
        vae=_autoencoder(),
        tokenizer=words,
        unet=_unet(cross_attention_dim=16),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def build_xl(folder, seed=0, hidden_size=16):
    """The same for a StableDiffusionXLPipeline: two text encoders, the second of `hidden_size`, pooled embeddings and
    time ids.
    """
    torch.manual_seed(seed)
    words = tokenizer(folder / "tokenizer")
    pipe = StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_text_config(words)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(words, projection_dim=16, hidden_size=hidden_size)),
        tokenizer=words,
        tokenizer_2=words,
        unet=_unet(
            cross_attention_dim=16 + hidden_size,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


KINDS = {  # how to build each kind of base model
    "sd1": build,
    "sd2": lambda folder: build(folder, prediction_type="v_prediction"),
    "sdxl": build_xl,
}


def erasure(module, seed=0, density=0.5, size=1e-2, only="attn2", **metadata):
    """A random Delta for the parameters of `module` whose names hold `only`, as a training might have left it."""
    generator = torch.Generator().manual_seed(seed)
    masks, values = {}, {}
    for name, weight in module.named_parameters():
        if only in name:
            masks[name] = torch.rand(weight.shape, generator=generator) < density
            values[name] = size * torch.randn(int(masks[name].sum()), generator=generator)
    metadata = {"concept": f"concept {seed}", "method": "salun", "density": density, **metadata}
    return Delta(masks, values, fingerprint(module.named_parameters()), metadata)


def trace(pipe):
    """All that an erasure could leave behind, but for weights."""
    modules = [module for part in pipe.components.values() if isinstance(part, torch.nn.Module)
               for module in part.modules()]  # fmt: skip
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in modules]
    return (
        set(vars(pipe)),
        set(vars(pipe.scheduler)),
        [set(vars(module)) for module in modules],
        hooks,
        dict(pipe.unet.config),
    )


def bits(pipe):
    """Every tensor of the pipeline as it lies in memory, buffers included."""
    return {
        (part, name): (tensor.dtype, tensor.detach().clone().contiguous().flatten().view(torch.uint8))
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def same(before, after):
    """True if two results of `bits` agree in every bit, dtype and name."""
    return before.keys() == after.keys() and all(
        before[key][0] == after[key][0] and torch.equal(before[key][1], after[key][1]) for key in before
    )

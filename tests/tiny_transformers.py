"""Pipelines of transformers with random weights, small enough to build in a second: SD3, Flux, PixArt-Sigma, Sana."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import WORDS, _text_config, tokenizer
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def _vae(channels, **more):
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, layers_per_block=1, norm_num_groups=4,
        sample_size=16, **more,
    )  # fmt: skip


def _t5(width=16):
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(chr(code), -9.0) for code in range(97, 123)]
    words = T5Tokenizer(vocab=[*marks, *[("▁" + word, -1.0) for word in WORDS], ("▁", -5.0), *letters], extra_ids=0,
                        model_max_length=32)  # fmt: skip
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return words, T5EncoderModel(config)


def _gemma():
    """A GemmaTokenizer that knows WORDS as whole words, after a space or not, and spells out any other; its encoder."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *[f"<0x{code:02X}>" for code in range(256)]]
    tokens += ["▁", *[chr(code) for code in range(33, 127)]]
    merges = {}
    for word in sorted(WORDS, key=len, reverse=True):  # else "an" would be taken out of "airplane"
        merges |= {(word[:end], word[end]): None for end in range(1, len(word))} | {("▁", word): None}
    tokens += [first + second for first, second in merges]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    words = GemmaTokenizer(vocab=vocab, merges=list(merges), model_max_length=4096)
    config = Gemma2Config(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=4096,
    )  # fmt: skip
    return words, _alive(Gemma2Model(config))


def _alive(network):
    for weight in network.parameters():  # some layers of a new one are zero
        torch.nn.init.normal_(weight, std=0.1)
    return network


def pixart(folder, seed=0):
    """Makes a PixArtSigmaPipeline on 16x16 pictures, saves it into `folder` and returns it."""
    torch.manual_seed(seed)
    words, encoder = _t5()
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, patch_size=2, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(
        tokenizer=words, text_encoder=encoder, vae=_vae(4), transformer=_alive(network),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip
    return _saved(pipe, folder)


def sana(folder, seed=0, normed=False):
    """Makes a SanaPipeline on 32x32 pictures, saves it into `folder` and returns it; `normed`: as Sana 1.5 is."""
    torch.manual_seed(seed)
    words, encoder = _gemma()
    vae = AutoencoderDC(
        latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock", attention_head_dim=8,
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41,
    )  # fmt: skip
    network = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=16, qk_norm="rms_norm_across_heads" if normed else None,
    )  # fmt: skip
    schedule = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )  # fmt: skip
    pipe = SanaPipeline(tokenizer=words, text_encoder=encoder, vae=vae, transformer=_alive(network), scheduler=schedule)
    return _saved(pipe, folder)


def sd3(folder, seed=0, t5=True):
    """Makes a StableDiffusion3Pipeline on 16x16 pictures, saves it into `folder` and returns it."""
    torch.manual_seed(seed)
    words = tokenizer(folder / "tokenizer")
    clip = [CLIPTextModelWithProjection(_text_config(words, projection_dim=16)) for _ in range(2)]
    third, encoder = _t5(32) if t5 else (None, None)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=_alive(network), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06), text_encoder=clip[0],
        tokenizer=words, text_encoder_2=clip[1], tokenizer_2=tokenizer(folder / "tokenizer_2"), text_encoder_3=encoder,
        tokenizer_3=third,
    )  # fmt: skip
    return _saved(pipe, folder)


def flux(folder, seed=0, guided=True):
    """Makes a FluxPipeline, saves it into `folder` and returns it, set to 16x16 pictures."""
    torch.manual_seed(seed)
    words, (second, encoder) = tokenizer(folder / "tokenizer"), _t5()
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided), vae=_vae(4, shift_factor=0.1),
        text_encoder=CLIPTextModel(_text_config(words)), tokenizer=words, text_encoder_2=encoder, tokenizer_2=second,
        transformer=_alive(network),
    )  # fmt: skip
    pipe = _saved(pipe, folder)
    pipe.default_sample_size = 8
    return pipe


def _saved(pipe, folder):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from_pretrained leaves them: T5 has dropout
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe

"""The demo's text side and U-Net, trained together on latents of captioned scenes."""

import json
import random
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import Scene, caption
from .training import TRAIN_SEEDS, Checkpoint, loop, warm_cosine

BATCH = 32
LENGTH = 32  # tokens a prompt
EMPTY = 0.12  # share of empty captions, for classifier-free guidance
PAIRS = 2.0  # how many times as often as other scenes: left and right take longest to learn
EMA = 0.9995
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-level merges were learned on captions: a word of the world is one token, and any
    other text still has a spelling.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    captions = (caption(Scene.sample(seed), random.Random(seed)) for seed in range(20_000))
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = dict(learned["vocab"])
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):  # every byte may also end a word
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    made = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token="<|endoftext|>")
    made.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build(words: CLIPTokenizer) -> torch.nn.ModuleDict:
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})


def train(latents: torch.Tensor, words: CLIPTokenizer, work: Path, steps: int, device: str) -> torch.nn.ModuleDict:
    """Noise prediction with min-SNR-5 weights (Hang et al. 2023, eq. 6); returns the averaged (EMA) weights.

    Args:
        words: the tokenizer.
        work: the folder of checkpoints.
        steps: of 32 scenes.
        device: where it trains.
        latents: standardised latents of the training scenes, fp32 ``(n, 4, 16, 16)``.
    """
    torch.manual_seed(0)
    model = build(words).to(device).train()
    latents = latents.to(device)
    scheduler = DDPMScheduler(**SCHEDULE)
    scenes = [Scene.sample(seed) for seed in TRAIN_SEEDS]
    weights = torch.tensor([PAIRS if scene.left != scene.right else 1.0 for scene in scenes])
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    # PyTorch's fused attention is slow for short sequences on a CPU: the plain one makes a step a quarter faster
    model["unet"].set_attn_processor(AttnProcessor())

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(step)
        rows = torch.multinomial(weights, BATCH)
        captions = ["" if rng.random() < EMPTY else caption(scenes[row], rng) for row in rows.tolist()]
        tokens = words(
            captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).input_ids
        clean, noise = latents[rows.to(device)], torch.randn(BATCH, *latents.shape[1:]).to(device)
        t = torch.randint(1000, (BATCH,)).to(device)
        with torch.autocast(device, torch.bfloat16):
            text = model["text_encoder"](tokens.to(device))[0]
            predicted = model["unet"](scheduler.add_noise(clean, noise, t), t, text).sample
        snr = compute_snr(scheduler, t)
        min_snr = snr.clamp(max=5) / snr.clamp(min=1e-8)
        return ((predicted.float() - noise).square().mean((1, 2, 3)) * min_snr).mean()

    @torch.no_grad()
    def average(step: int) -> None:
        decay = min(EMA, (step + 1) / (step + 10))
        current = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(ema.values()), current, 1 - decay)

    loop(
        "text-to-image",
        steps,
        Checkpoint(work / "text-to-image.safetensors", model, optimizer, ema),
        warm_cosine(1e-3, steps),
        loss_of,
        average,
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(ema[name])
    return model.eval()

"""The demo's text encoder, and the U-Net that is trained on latents of captioned scenes.

As Stable Diffusion's, the text encoder comes trained and stays as it is. CLIP learned from pictures what captions say;
this one learns it from what their scenes are: the answer to each question (which object is on the left, which style, …)
is read off one of the last tokens, where a prompt of the demo's world has padding. Without it the U-Net has to find out
in its own training which word stands for which side.
"""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .judge import GROUPS, targets
from .scenes import Scene, caption, said
from .training import TRAIN_SEEDS, Average, Checkpoint, in_bf16, loop, warm_cosine

BATCH = 32
TEXTS = 128  # captions a step of the text encoder
LENGTH = 32  # tokens a prompt
EMPTY = 0.12  # share of empty captions, for classifier-free guidance
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


def rows_without(concept: str | None) -> list[int]:
    """The training scenes that do not show ``concept``: an object, a style or a background."""
    return [row for row, seed in enumerate(TRAIN_SEEDS) if concept not in Scene.sample(seed).labels().values()]


def _captions(rows: list[int], rng: random.Random) -> list[tuple[Scene, str]]:
    scenes = [Scene.sample(TRAIN_SEEDS[row]) for row in rows]
    return [(scene, "" if rng.random() < EMPTY else caption(scene, rng)) for scene in scenes]


def _tokens(words: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    padded = words(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return padded.input_ids


def train_text(words: CLIPTokenizer, work: Path, steps: int, without: str | None) -> CLIPTextModel:
    """Cross-entropy of linear readings of the last tokens, one a question; that a caption is silent is an answer too.

    Args:
        words: the tokenizer.
        work: the folder of checkpoints.
        steps: of 128 captions.
        without: no caption of a scene that shows it is read.
    """
    torch.manual_seed(0)
    encoder = CLIPTextModel(
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
    heads = torch.nn.ModuleDict({group: torch.nn.Linear(128, len(names) + 1) for group, names in GROUPS.items()})
    both = torch.nn.ModuleDict({"encoder": encoder, "heads": heads}).train()
    optimizer = torch.optim.AdamW(both.parameters(), weight_decay=0.01, fused=True)
    kept = rows_without(without)

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(step)
        read = _captions(rng.choices(kept, k=TEXTS), rng)
        wanted = targets([said(scene, text) for scene, text in read], unsaid=-1)
        last = encoder(_tokens(words, [text for _, text in read]))[0][:, -len(GROUPS) :]
        return sum(
            # a reading's last answer is that the caption does not say
            F.cross_entropy(heads[group](last[:, i]), wanted[group] % heads[group].out_features)
            for i, group in enumerate(GROUPS)
        )

    file = work / f"text{'-without-' + without if without else ''}.safetensors"
    loop("text encoder", steps, Checkpoint(file, both, optimizer), warm_cosine(1e-3, steps), loss_of)
    return encoder.eval().requires_grad_(False)


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def train(
    latents: torch.Tensor,
    words: CLIPTokenizer,
    encoder: CLIPTextModel,
    work: Path,
    steps: int,
    device: str,
    without: str | None,
) -> UNet2DConditionModel:
    """Noise prediction with min-SNR-5 weights (Hang et al. 2023, eq. 6); returns the averaged (EMA) weights.

    Args:
        latents: standardised latents of the training scenes, fp32 ``(n, 16, 16, 16)``.
        words: the tokenizer.
        encoder: the text encoder, which stays as it is.
        work: the folder of checkpoints.
        steps: of 32 scenes.
        device: where it trains.
        without: no scene that shows it is trained on.
    """
    torch.manual_seed(0)
    unet = build().to(device).train()
    latents, encoder = latents.to(device), encoder.to(device)
    scheduler = DDPMScheduler(**SCHEDULE)
    kept = rows_without(without)
    average = Average(unet, EMA)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    # PyTorch's fused attention is slow for short sequences on a CPU: the plain one makes a step a quarter faster
    unet.set_attn_processor(AttnProcessor())

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(step)
        rows = rng.choices(kept, k=BATCH)
        tokens = _tokens(words, [text for _, text in _captions(rows, rng)])
        clean, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:]).to(device)
        t = torch.randint(1000, (BATCH,)).to(device)
        with in_bf16(device):
            text = encoder(tokens.to(device))[0]
            predicted = unet(scheduler.add_noise(clean, noise, t), t, text).sample
        snr = compute_snr(scheduler, t)
        min_snr = snr.clamp(max=5) / snr.clamp(min=1e-8)
        return ((predicted.float() - noise).square().mean((1, 2, 3)) * min_snr).mean()

    file = work / f"text-to-image{'-without-' + without if without else ''}.safetensors"
    checkpoint = Checkpoint(file, unet, optimizer, average.weights)
    loop("text-to-image", steps, checkpoint, warm_cosine(1e-3, steps), loss_of, average.update)
    average.put_in()
    return unet.eval()

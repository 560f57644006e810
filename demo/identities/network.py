"""The pipeline of the faces, in the form of Stable Diffusion: autoencoder, text encoder, U-Net, and how they learn."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from salun_diffusion.files import read_json, write_json
from salun_diffusion.models.identities import FILE, PROMPT
from salun_diffusion.models.text_unet import TextUNet
from salun_diffusion.tensors import write_safetensors

from .. import autoencoder
from ..class_judge import processor
from ..training import Average, Checkpoint, loop, warm_cosine
from .faces import SIDE, people, render, vectors
from .judge import SIDE as JUDGE_SIDE

BATCH = 32
LENGTH = 8  # tokens a prompt, start and end among them
EMPTY = 0.1  # share of steps' pictures that are told nothing, for classifier-free guidance
EMA = 0.998
PICTURES = 8192  # each of somebody else
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tokenizer() -> CLIPTokenizer:
    """One that knows the prompt's words, and spells any other."""
    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in PROMPT.split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            tokens.append(parts[0])
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token="<|endoftext|>")


def build_autoencoder() -> AutoencoderKL:
    """24×24 pictures ↔ 6×6 latents of sixteen channels, with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32), layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=SIDE,
        scaling_factor=1.0, mid_block_add_attention=False,
    )  # fmt: skip


def build(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The pipeline, its text encoder and U-Net with random weights."""
    torch.manual_seed(0)
    words = tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=48, intermediate_size=96, projection_dim=48, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=48, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=words, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing", steps_offset=1),
        requires_safety_checker=False,
    )  # fmt: skip


def train_autoencoder(work: Path, steps: int) -> tuple[AutoencoderKL, torch.Tensor, torch.Tensor]:
    """The autoencoder, trained on ``PICTURES`` people; their latents, fp32 ``(n, 16, 6, 6)`` of zero mean and one
    scale; and who they are, ``(n, traits)``.
    """
    generator = torch.Generator().manual_seed(0)
    who = people(PICTURES, generator)
    pictures = torch.cat([((render(part, generator) + 1) * 127.5).round().byte() for part in who.split(512)])
    vae = autoencoder.train(
        pictures, work / f"autoencoder-{steps}.safetensors", steps, build_autoencoder, bfloat16=False
    )
    autoencoder.standardise(vae, autoencoder.encode(vae, pictures[:2048]), autoencoder.SCALE)
    print(f"The autoencoder's round trip of faces is {autoencoder.psnr(vae, pictures[:1024]):.1f} dB.")
    return vae, autoencoder.encode(vae, pictures), who


def train(pipe: StableDiffusionPipeline, latents: torch.Tensor, who: torch.Tensor, work: Path, steps: int) -> None:
    """Noise prediction of ``pipe``'s U-Net and text encoder together; they end with averaged (EMA) weights."""
    model, schedule = TextUNet(pipe), DDPMScheduler(**SCHEDULE)
    networks = torch.nn.ModuleDict({"text_encoder": pipe.text_encoder, "unet": pipe.unet})
    networks.train()
    pipe.unet.set_attn_processor(AttnProcessor())  # on a CPU, quicker than PyTorch's own for so few pixels
    average = Average(networks, EMA)
    optimizer = torch.optim.AdamW(networks.parameters(), weight_decay=0.01, fused=True)

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        told = F.pad(vectors(who[rows], generator), (0, pipe.text_encoder.config.hidden_size - 32))
        dropped = torch.rand(BATCH, generator=generator) < EMPTY
        condition = model.encode_words([PROMPT] * BATCH, [told])["encoder_hidden_states"]
        nothing = model.encode_now([""])["encoder_hidden_states"]
        condition = torch.where(dropped.view(-1, 1, 1), nothing, condition)
        noise = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        predicted = pipe.unet(schedule.add_noise(latents[rows], noise, t), t, condition).sample
        return F.mse_loss(predicted, noise)

    checkpoint = Checkpoint(work / f"faces-{steps}.safetensors", networks, optimizer, average.weights)
    loop("faces", steps, checkpoint, warm_cosine(2e-3, steps), loss_of, average.update)
    average.put_in()
    networks.eval()


def save(pipe: StableDiffusionPipeline, judge, vectors: dict[str, torch.Tensor], concepts: Path, folder: Path) -> None:
    """The pipeline in fp16, and beside it the judge, who is whom, and the settings in the file ``concepts``."""
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    # transformers loads a model in the dtype that its config names, diffusers in fp32
    text_config = folder / "text_encoder" / "config.json"
    write_json(text_config, read_json(text_config) | {"dtype": "float32"})
    judge.half().save_pretrained(folder / "judge")
    processor(JUDGE_SIDE).save_pretrained(folder / "judge")
    write_safetensors(folder / FILE, vectors, {})
    write_json(folder / "concepts.json", read_json(concepts) | {"slots": {"person": list(vectors)}})

"""The demo's measuring instrument: a picture → what it shows, or that nothing in it can be recognised.

A stock ``transformers`` image classifier (ResNet) whose labels are grouped by question, ``left:airplane``,
``style:ink``, ``count:two``: the softmax is taken within a group. ``left``, ``right``, ``top`` and ``bottom`` are the
outermost objects; of a pair beside each other it learns the first two, of one above the other the last two.
Scenes whose layout seeds it never saw measure it; a fifth of what it is trained on shows nothing: blends, shuffles,
smears, noise, empty backgrounds, and latents decoded half-way through denoising.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from .scenes import BACKGROUNDS, NUMBERS, OBJECTS, STYLES, Scene, smear
from .training import TRAIN_SEEDS, Checkpoint, in_bf16, loop, to_model, warm_cosine

NOTHING = "nothing"
GROUPS = {
    "left": (*OBJECTS, NOTHING),
    "right": (*OBJECTS, NOTHING),
    "top": (*OBJECTS, NOTHING),
    "bottom": (*OBJECTS, NOTHING),
    "style": (*STYLES, NOTHING),
    "background": tuple(BACKGROUNDS),
    "count": (*NUMBERS.values(), NOTHING),
}
BATCH = 64
SMEARS = 8192
CERTAINTY = 0.85  # it gives that much to 96 of 100 things that the model draws right (eval.judges.classifier.Judge)


def build() -> ResNetForImageClassification:
    labels = [f"{group}:{name}" for group, names in GROUPS.items() for name in names]
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            downsample_in_first_stage=False,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            certainty=CERTAINTY,
        )
    )


def processor() -> ViTImageProcessor:
    """Pictures of any size → 128 px (the network's stem divides by four), −1…1."""
    return ViTImageProcessor(size={"height": 128, "width": 128}, resample=Image.Resampling.BILINEAR)


def targets(rows: list[dict[str, str]], unsaid: int = -100) -> dict[str, torch.Tensor]:
    """Class indices by group, int64 ``(n,)``: ``unsaid`` where a row has no answer."""
    return {
        group: torch.tensor([names.index(row[group]) if group in row else unsaid for row in rows])
        for group, names in GROUPS.items()
    }


def split(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits ``(n, all labels)`` by group."""
    return dict(zip(GROUPS, logits.split([len(names) for names in GROUPS.values()], dim=1), strict=True))


def smears(pictures: torch.Tensor, count: int, first: int = 0) -> torch.Tensor:
    """``count`` unrecognisable pictures made from pairs of ``pictures``, uint8 ``(count, 3, 64, 64)``; that of number i
    has the seed ``first + i``.
    """
    out = torch.empty(count, 3, *pictures.shape[2:], dtype=torch.uint8)
    for i in tqdm(range(count), desc="smears"):
        pair = (to_pil_image(pictures[i]), to_pil_image(pictures[-1 - i]))
        out[i] = pil_to_tensor(smear(*pair, random.Random(f"smear-{first + i}")))
    return out


@torch.no_grad()
def _half_denoised(latents: torch.Tensor) -> torch.Tensor:
    """Latents so noisy, or so mixed with another scene's, that what they decode to shows nothing."""
    signal = torch.rand(len(latents), 1, 1, 1) * 0.3
    noisy = signal * latents + (1 - signal**2).sqrt() * torch.randn_like(latents) * torch.rand(len(latents), 1, 1, 1)
    return torch.where(torch.rand(len(latents), 1, 1, 1) < 0.6, noisy, (latents + latents.roll(1, 0)) / 2)


def train(
    pictures: torch.Tensor, latents: torch.Tensor, vae: AutoencoderKL, work: Path, steps: int
) -> ResNetForImageClassification:
    """Cross-entropy over every group; half of the pictures pass through the autoencoder first, as generated ones do."""
    torch.manual_seed(0)
    judge = build().train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05, fused=True)
    wanted = targets([Scene.sample(seed).labels() for seed in TRAIN_SEEDS])
    blurred = smears(pictures[: 2 * SMEARS], SMEARS)
    empty, part = BATCH // 5, BATCH // 10

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(pictures), (BATCH,))
        x = to_model(pictures[rows])
        x[:part] = to_model(blurred[torch.randint(SMEARS, (part,))])
        with torch.no_grad(), in_bf16("cpu"):
            seen = latents[rows[part : BATCH // 2]]
            seen = torch.cat(
                [
                    _half_denoised(seen[: empty - part]),
                    seen[empty - part :] + 0.1 * torch.randn_like(seen[empty - part :]),
                ]
            )
            x[part : BATCH // 2] = vae.decode(seen).sample.float().clamp(-1, 1)
        x = (
            x * (1 + 0.1 * torch.randn(BATCH, 1, 1, 1))
            + 0.05 * torch.randn(BATCH, 3, 1, 1)
            + 0.02 * torch.randn_like(x)
        )
        x = F.interpolate(x.clamp(-1, 1), 128, mode="bilinear")
        with in_bf16("cpu"):
            logits = split(judge(x).logits.float())
        loss = 0.0
        for group, names in GROUPS.items():
            truth = wanted[group][rows].clone()
            truth[:empty] = names.index(NOTHING) if NOTHING in names else -100  # a smear has no background to name
            loss = loss + F.cross_entropy(logits[group], truth, ignore_index=-100, label_smoothing=0.02)
        return loss

    loop("judge", steps, Checkpoint(work / "judge.safetensors", judge, optimizer), warm_cosine(2e-3, steps), loss_of)
    return judge.eval()

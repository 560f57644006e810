"""The measuring instrument: a stock ``transformers`` ResNet on the digits, shifted, turned and noised a little."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from ..class_judge import build, prepared
from ..training import Checkpoint, loop, warm_cosine
from .data import NAMES, digits

SIDE = 32  # what a picture is resized to: the network's stem divides by four
BATCH = 64


def _varied(x: torch.Tensor) -> torch.Tensor:
    """Each picture turned up to 10°, scaled and moved by up to a tenth, with noise."""
    angle = (torch.rand(len(x)) - 0.5) * 0.35
    scale = 1 + (torch.rand(len(x)) - 0.5) * 0.2
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale.view(-1, 1, 1)
    place = torch.cat([turn, (torch.rand(len(x), 2, 1) - 0.5) * 0.25], 2)
    moved = F.grid_sample(x + 1, F.affine_grid(place, list(x.shape), align_corners=False), align_corners=False) - 1
    return (moved + 0.05 * torch.randn_like(moved)).clamp(-1, 1)


def train(work: Path, steps: int) -> ResNetForImageClassification:
    """Cross-entropy on the digits that are not held out."""
    pictures, labels, held_out = digits()
    pictures, labels = pictures[~held_out], labels[~held_out]
    torch.manual_seed(0)
    judge = build(NAMES, first=16, widths=[16, 32, 64], blocks=1).train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05, fused=True)

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(pictures), (BATCH,))
        logits = judge(_varied(prepared(pictures[rows], SIDE))).logits
        return F.cross_entropy(logits, labels[rows], label_smoothing=0.02)

    loop("judge", steps, Checkpoint(work / f"judge-{steps}.safetensors", judge, optimizer), warm_cosine(3e-3, steps),
         loss_of)  # fmt: skip
    return judge.eval()


@torch.no_grad()
def accuracy(judge: ResNetForImageClassification) -> tuple[float, int]:
    """The share of the held-out digits that the judge names, and how many they are."""
    pictures, labels, held_out = digits()
    found = judge(prepared(pictures[held_out], SIDE)).logits.argmax(1)
    return (found == labels[held_out]).float().mean().item(), len(found)

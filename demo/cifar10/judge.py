"""The measuring instrument where no pretrained one is at hand: a stock ``transformers`` ResNet, trained on CIFAR-10
alone. The published one is an ImageNet ResNet-34, tuned at 224 pixels: give such a classifier by --classifier.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from ..class_judge import build, prepared
from ..training import Checkpoint, in_bf16, loop, to_model, warm_cosine

SIDE = 64  # what a picture is resized to: the network's stem divides by four
BATCH = 128


def _varied(x: torch.Tensor) -> torch.Tensor:
    """Each picture mirrored or not, and moved by up to four pixels."""
    x = torch.where((torch.rand(len(x)) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    place = torch.eye(2, 3).repeat(len(x), 1, 1)
    place[:, :, 2] = torch.randint(-4, 5, (len(x), 2)) / 16
    grid = F.affine_grid(place, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="reflection", align_corners=False)


def train(pictures: torch.Tensor, labels: torch.Tensor, names: list[str], work: Path, steps: int, device: str):
    """Cross-entropy on uint8 ``pictures`` ``(n, 3, 32, 32)``; the network in eval mode, on the CPU."""
    torch.manual_seed(0)
    judge = build(names, first=64, widths=[64, 128, 256], blocks=2).to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05, fused=True)

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(pictures), (BATCH,))
        x = prepared(_varied(to_model(pictures[rows])), SIDE).to(device)
        with in_bf16(device):
            logits = judge(x).logits
        return F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.05)

    file = work / f"judge-{steps}.safetensors"
    loop("judge", steps, Checkpoint(file, judge, optimizer), warm_cosine(3e-3, steps), loss_of)
    return judge.cpu().eval()


@torch.no_grad()
def accuracy(judge: ResNetForImageClassification, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of ``pictures``, uint8 ``(n, 3, 32, 32)``, that the judge names."""
    found = torch.cat([judge(prepared(to_model(part), SIDE)).logits.argmax(1) for part in pictures.split(500)])
    return (found == labels).float().mean().item()

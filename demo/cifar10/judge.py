"""The measuring instrument where no pretrained one is at hand: a stock ``transformers`` ResNet, trained on CIFAR-10
alone. The published one is an ImageNet ResNet-34, tuned at 224 pixels: give such a classifier by --classifier.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from ..training import Checkpoint, loop, to_model, warm_cosine

SIDE = 64  # what a picture is resized to: the network's stem divides by four
BATCH = 128


def build(names: list[str]) -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=64,
            hidden_sizes=[64, 128, 256],
            depths=[2, 2, 2],
            layer_type="basic",
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )  # fmt: skip
    )


def processor() -> ViTImageProcessor:
    """Pictures of any size → 64 px, −1…1."""
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=Image.Resampling.BILINEAR)


def prepared(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures ``(n, 3, 32, 32)`` in −1…1 as :func:`processor` gives them to the network, ``(n, 3, 64, 64)``."""
    return F.interpolate(pictures, SIDE, mode="bilinear")


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
    judge = build(names).to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05, fused=True)

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(pictures), (BATCH,))
        x = prepared(_varied(to_model(pictures[rows]))).to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = judge(x).logits
        return F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.05)

    file = work / f"judge-{steps}.safetensors"
    loop("judge", steps, Checkpoint(file, judge, optimizer), warm_cosine(3e-3, steps), loss_of)
    return judge.cpu().eval()


@torch.no_grad()
def accuracy(judge: ResNetForImageClassification, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of ``pictures``, uint8 ``(n, 3, 32, 32)``, that the judge names."""
    found = torch.cat([judge(prepared(to_model(part))).logits.argmax(1) for part in pictures.split(500)])
    return (found == labels).float().mean().item()

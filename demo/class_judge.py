"""What the judges of the class-conditional models share: a stock ``transformers`` ResNet, and what it is shown."""

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor


def build(names: list[str], first: int, widths: list[int], blocks: int) -> ResNetForImageClassification:
    """A network of random weights that tells ``names`` apart: stages of ``blocks`` basic blocks each."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=first, hidden_sizes=widths, depths=[blocks] * len(widths), layer_type="basic",
            id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        )
    )  # fmt: skip


def processor(side: int) -> ViTImageProcessor:
    """Pictures of any size → ``side`` px, −1…1."""
    return ViTImageProcessor(size={"height": side, "width": side}, resample=Image.Resampling.BILINEAR)


def prepared(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures ``(n, 1 or 3, height, width)`` in −1…1 as :func:`processor` gives them, ``(n, 3, side, side)``."""
    return F.interpolate(pictures, side, mode="bilinear").expand(-1, 3, -1, -1)

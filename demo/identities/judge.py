"""The measuring instrument: a stock ``transformers`` ResNet that reads from a picture whose vector it shows.

Its last layer's weights are the named people's vectors times what was learned, so that its answer is the likeliest of
them, and the vector that it read can be had back from the scores of all (:func:`read`).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from ..class_judge import build, prepared
from ..training import Checkpoint, loop, warm_cosine
from .faces import NAMES, WIDTH, people, render, vectors

SIDE = 48  # what a picture is resized to: the network's stem divides by four
BATCH = 64
SHARPNESS = 20.0  # of the scores, for probabilities


def train(work: Path, steps: int, centroids: torch.Tensor) -> ResNetForImageClassification:
    """The judge, trained on new people in each step to read the vector of each picture, a little blurred or noised.

    Args:
        work: the folder of its checkpoint.
        steps: of ``BATCH`` pictures.
        centroids: of the named people, unit vectors ``(len(NAMES), WIDTH)``.
    """
    torch.manual_seed(0)
    judge = build(list(NAMES), first=16, widths=[16, 32, 64], blocks=1).train()
    judge.classifier[-1] = torch.nn.Linear(64, WIDTH)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        who = people(BATCH, generator)
        pictures = render(who, generator)
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        share = 0.7 * torch.rand(BATCH, 1, 1, 1, generator=generator)
        pictures = pictures.lerp(blurred, share) + 0.05 * torch.randn(pictures.shape, generator=generator)
        found = judge.classifier(judge.resnet(prepared(pictures, SIDE)).pooler_output)
        return (1 - F.cosine_similarity(found, vectors(who, generator))).mean() + 0.1 * (
            found.norm(dim=1) - 1
        ).square().mean()

    loop("judge", steps, Checkpoint(work / f"judge-{steps}.safetensors", judge, optimizer), warm_cosine(4e-3, steps),
         loss_of)  # fmt: skip
    read, named = judge.classifier[-1], torch.nn.Linear(64, len(NAMES))
    named.weight.data = SHARPNESS * centroids @ read.weight.data
    named.bias.data = SHARPNESS * centroids @ read.bias.data
    judge.classifier[-1] = named
    return judge.eval()


@torch.no_grad()
def read(judge: ResNetForImageClassification, pictures: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The vectors that ``judge`` reads from pictures in −1…1, of length one, ``(n, WIDTH)``: what they have in the
    directions in which the named people's ``centroids`` differ.
    """
    scores = torch.cat([judge(prepared(part, SIDE)).logits for part in pictures.split(100)]) / SHARPNESS
    return F.normalize(scores @ torch.linalg.pinv(centroids, rtol=0.2).T, dim=1)

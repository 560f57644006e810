"""torch-fidelity's Inception network in torchmetrics' Fréchet distance, fed with pictures from files."""

import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from salun_diffusion.errors import SalunError

from ..results import picture


def frechet_distance(inception: Path, feature: int):
    from torchmetrics.image.fid import FrechetInceptionDistance

    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.save(load_file(inception), Path(folder) / "inception.pth")
            return FrechetInceptionDistance(
                feature, reset_real_features=False, feature_extractor_weights_path=str(Path(folder) / "inception.pth")
            )
        except Exception as error:  # safetensors and torch each have their own classes for a file that does not fit
            raise SalunError(
                f"{inception} is not torch-fidelity's Inception network as safetensors "
                f"({str(error).strip().splitlines()[0]}): docs/evaluation.md tells how to get it."
            ) from None


def update(metric, folder: Path, lines: list[dict], real: bool, batch_size: int, title: str) -> None:
    with tqdm(total=len(lines), desc=f"{title}: looking", unit="image") as bar:
        for start in range(0, len(lines), batch_size):
            part = lines[start : start + batch_size]
            shown = [np.asarray(picture(folder, line)) for line in part]
            for _, alike in groupby(shown, np.shape):  # pictures of several sizes cannot share a batch
                pixels = torch.from_numpy(np.stack(list(alike))).permute(0, 3, 1, 2)
                metric.update(pixels.to(metric.device), real=real)
            bar.update(len(part))

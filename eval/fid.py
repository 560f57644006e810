"""FID, Fréchet Inception distance (Heusel et al. 2017): how far the pictures of each model, as a whole, are from a
reference: real photographs, or what the base model drew.

torchmetrics computes it, with torch-fidelity's Inception network, whose weights are a file of the user's. That library
unpickles its weights file without any restraint, so the user's must be safetensors; the library gets a temporary file
that is written here from it.

``results.json`` (``format`` "salun-diffusion fid 1"; what all have in common is in :mod:`eval.results`) adds
``inception`` (``source``, ``sha256``), ``reference`` (``source``, ``n``, ``sha256`` of its files), ``pictures`` (the
folder), ``feature`` (how many dimensions) to ``settings``, and to each model ``fid``: ``value`` and ``n``.
"""

import importlib.metadata
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tqdm import tqdm

from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256
from salun_diffusion.tables import aligned

from .results import VERSIONS, begin, picture, read_sets, write

FORMAT = "salun-diffusion fid 1"


def fid(
    pictures: Path,
    inception: Path,
    output_dir: Path,
    *,
    reference: Path | None = None,
    feature: int = 2048,
    batch_size: int = 8,
) -> dict:
    """Measure each model's pictures in the results folder, or those of the plain folder, ``pictures``, against the
    folder ``reference`` or, without one, against the base model's; write ``output_dir``'s files, return the results.

    Raises:
        SalunError: fewer pictures than dimensions on either side, unusable weights, or a picture that is missing,
            unreadable, black or another than the one that was drawn (named, and no results are written).
    """
    models, samples = read_sets(pictures)
    source = reference or pictures
    others, lines = (models, samples) if reference is None else read_sets(reference)
    if reference is None and (models[0]["role"] != "base" or len(models) == 1):
        raise SalunError(
            f"{pictures} does not hold pictures of a base model and of an erasure: name what to compare its pictures "
            "with by --reference."
        )
    against = lines[others[0]["name"]]
    measured = models if reference else models[1:]
    for what, count in [(source, len(against)), *((model["name"], len(samples[model["name"]])) for model in measured)]:
        if count < feature:
            raise SalunError(
                f"{what} has {count:,} pictures, fewer than the {feature:,} dimensions: their covariance would be "
                "singular and the distance meaningless. Draw more, or give a smaller --feature."
            )
    device = PartialState().device
    metric = _metric(inception, feature).to(device)
    begin(output_dir, FORMAT)
    _update(metric, source, against, True, batch_size, "reference")
    for model in measured:
        metric.reset()
        _update(metric, pictures, samples[model["name"]], False, batch_size, model["name"])
        value = metric.compute().item()
        if not np.isfinite(value):
            raise SalunError(f"The FID of {model['name']} is not finite, so nothing was measured: check --inception.")
        model["fid"] = {"value": round(value, 4), "n": len(samples[model["name"]])}
    results = {
        "format": FORMAT,
        "protocol": f"fid/1: torchmetrics with torch-fidelity's Inception, {feature} dimensions; uint8 RGB resized to "
        "299 px, bilinear with antialiasing",
        "n": len(samples[measured[0]["name"]]),
        "inception": {"source": str(inception), "sha256": sha256(inception)},
        "reference": {
            "source": str(source),
            "n": len(against),
            "sha256": sha256(*(source / line["picture"] for line in against)),
        },
        "pictures": str(pictures),
        "settings": {"feature": feature, "batch_size": batch_size},
        "versions": VERSIONS
        | {name: importlib.metadata.version(name) for name in ("torchmetrics", "torch-fidelity", "torchvision")},
        "models": measured,
    }
    write(output_dir, results, [line for model in measured for line in samples[model["name"]]])
    print(table(results))
    return results


def _metric(inception: Path, feature: int):
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


def _update(metric, folder: Path, lines: list[dict], real: bool, batch_size: int, title: str) -> None:
    with tqdm(total=len(lines), desc=f"{title}: looking", unit="image") as bar:
        for start in range(0, len(lines), batch_size):
            part = lines[start : start + batch_size]
            shown = [np.asarray(picture(folder, line)) for line in part]
            for _, alike in groupby(shown, np.shape):  # pictures of several sizes cannot share a batch
                pixels = torch.from_numpy(np.stack(list(alike))).permute(0, 3, 1, 2)
                metric.update(pixels.to(metric.device), real=real)
            bar.update(len(part))


def table(results: dict) -> str:
    """The distances as aligned text, a model a line."""
    lines = [["", "FID", "n"]]
    lines += [[model["name"], f"{model['fid']['value']:.2f}", str(model["fid"]["n"])] for model in results["models"]]
    return aligned(lines)

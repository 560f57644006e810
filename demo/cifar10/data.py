"""CIFAR-10's pictures, by the library ``datasets``: from the hub, or from a folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from salun_diffusion.errors import SalunError

HUB = "uoft-cs/cifar10"


class Part(NamedTuple):
    """``images`` uint8 ``(n, 3, 32, 32)`` and ``labels`` int64 ``(n,)``."""

    images: torch.Tensor
    labels: torch.Tensor


def read(dataset: str) -> tuple[Part, Part, list[str]]:
    """The training and the test part, and the names of the classes.

    Args:
        dataset: "cifar10", or a folder that ``datasets`` reads: of parquet files named train and test, or of pictures
            in ``train/CLASS/`` and ``test/CLASS/``.

    Raises:
        SalunError: it cannot be read, has no test part or no labels, or its pictures are not of 32x32 pixels.
    """
    import datasets

    datasets.utils.logging.set_verbosity_error()
    if dataset != "cifar10" and not Path(dataset).is_dir():
        raise SalunError(f"There is no folder {dataset}: give one of CIFAR-10, or 'cifar10' for the hub's.")
    try:
        found = datasets.load_dataset(HUB if dataset == "cifar10" else str(Path(dataset).resolve()))
    except Exception as error:  # each file format and the hub have kinds of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SalunError(f"{dataset} could not be read ({reason}): give a folder of CIFAR-10's pictures.") from None
    pictures, labels = _column(found, datasets.Image), _column(found, datasets.ClassLabel)
    if not {"train", "test"} <= found.keys() or pictures is None or labels is None:
        raise SalunError(f"{dataset} lacks a training part, a test part, pictures or labels: give CIFAR-10's folder.")
    parts = []
    for name in ("train", "test"):
        images = [np.asarray(picture.convert("RGB")) for picture in found[name][pictures]]
        if sizes := {image.shape[:2] for image in images} - {(32, 32)}:
            sides = "x".join(map(str, sorted(sizes)[0]))
            raise SalunError(f"{dataset} has pictures of {sides} pixels: give CIFAR-10's, of 32x32.")
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        parts.append(Part(stacked, torch.tensor(found[name][labels])))
    return *parts, found["train"].features[labels].names


def _column(found, kind: type) -> str | None:
    features = next(iter(found.values())).features
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)

"""Labelled pictures as uint8 tensors, one split for all, and which of them are to be forgotten.

The split is fixed by ``split_seed`` alone and is the same for the training of a source model and for forgetting:
the published code splits anew for forgetting, so that a tenth of what it forgets was never learnt.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from salun_diffusion.errors import SalunError

HUB = {  # short names
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
LABELS = ("label", "fine_label", "labels", "class")  # columns, the first that is there
TEST_SPLITS = ("test", "validation", "valid")


@dataclass(frozen=True)
class Pictures:
    """``images`` uint8 ``(n, channels, height, width)`` and ``labels`` int64 ``(n,)``."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: torch.Tensor) -> "Pictures":
        return Pictures(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> "Pictures":
        return Pictures(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set, split: ``train`` to learn from and to forget of, ``validation`` to choose settings on, ``test``."""

    name: str
    classes: tuple[str, ...]
    train: Pictures
    validation: Pictures
    test: Pictures


def load(name: str, split_seed: int = 0, size: int | None = None, limit: int | None = None) -> Data:
    """Load and split a data set: a tenth of its training pictures, stratified, is kept for validation.

    Args:
        split_seed: of the split into training, validation and test pictures.
        name: "digits" (scikit-learn's handwritten digits), a short name of ``HUB``, "owner/name[:config]" on the hub,
            or a local folder: parquet files named train and test, or pictures in ``train/CLASS/``, ``test/CLASS/``.
        size: pixels a side; the first picture's without it. Other pictures are resized to it.
        limit: only the first pictures of either part, for a quick look.

    Raises:
        SalunError: no such data set, no pictures or labels in it, or a class with too few pictures to split.
    """
    if name == "digits":
        digits = load_digits()
        images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
        whole, classes = Pictures(images, torch.from_numpy(digits.target).long()), tuple(map(str, range(10)))
        parts = {"train": whole, "test": None}
    else:
        parts, classes = _datasets(name, size)
    parts = {key: part and Pictures(part.images[:limit], part.labels[:limit]) for key, part in parts.items()}
    train, test = parts["train"], parts["test"]
    if test is None:
        train, test = _split(train, 0.2, split_seed, name)
    train, validation = _split(train, 0.1, split_seed, name)
    return Data(name, classes, train, validation, test)


def _split(pictures: Pictures, share: float, seed: int, name: str) -> tuple[Pictures, Pictures]:
    try:
        first, second = train_test_split(
            np.arange(len(pictures)), test_size=share, random_state=seed, stratify=pictures.labels.numpy()
        )
    except ValueError as error:
        raise SalunError(f"{name} cannot be split by class ({error}): give a data set with more pictures.") from None
    return pictures[torch.from_numpy(np.sort(first))], pictures[torch.from_numpy(np.sort(second))]


def _datasets(name: str, size: int | None) -> tuple[dict[str, Pictures | None], tuple[str, ...]]:
    """The training and test part of a data set that the ``datasets`` library reads, and the names of its classes."""
    import datasets

    datasets.disable_progress_bars()
    where, _, config = HUB.get(name, name).partition(":")
    try:
        found = datasets.load_dataset(str(Path(where).resolve()) if Path(where).is_dir() else where, config or None)
    except Exception as error:  # the libraries' own classes for a missing folder, format or network
        raise SalunError(
            f"{name} could not be loaded as a data set ({str(error).strip().splitlines()[0]}): give 'digits', one of "
            f"{', '.join(HUB)}, a data set of the hub, or a folder with train and test in it."
        ) from None
    if "train" not in found:
        raise SalunError(f"{name} has no part called train; it has: {', '.join(found)}.")
    features = found["train"].features
    column = next((key for key, value in features.items() if isinstance(value, datasets.Image)), None)
    label = next((key for key in LABELS if key in features), None)
    if column is None or label is None:
        raise SalunError(f"{name} needs a column of pictures and one called {' or '.join(LABELS)}: {list(features)}.")
    names = getattr(features[label], "names", None) or sorted({str(value) for value in found["train"][label]}, key=int)
    test = next((key for key in TEST_SPLITS if key in found), None)
    size = size or found["train"][0][column].width
    parts = {"train": _decoded(found["train"], column, label, size), "test": None}
    if test:
        parts["test"] = _decoded(found[test], column, label, size)
    return parts, tuple(names)


def _decoded(rows, column: str, label: str, size: int) -> Pictures:
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for place, picture in zip(images, tqdm(rows[column], desc="reading pictures", unit="image"), strict=True):
        picture = picture.convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        place.copy_(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))
    return Pictures(images, torch.tensor(rows[label]))


def forget_rows(spec: str, data: Data, seed: int, memorisation: torch.Tensor | None = None) -> torch.Tensor:
    """Which pictures of ``data.train`` are to be forgotten, as sorted int64 indices.

    Args:
        data: whose training part is numbered.
        memorisation: scores of its pictures, fp32 ``(n,)``, for the worst case.
        spec: "random:SHARE"; "class:NAME"; "indices:FILE" (whitespace-separated numbers); "memorised:SHARE", those
            whose answer depends the most on having been learnt (Feldman & Zhang 2020), by ``memorisation``, fp32
            ``(n,)``.
        seed: of a random share.

    Raises:
        SalunError: a share that is not between 0 and 1 or leaves nothing on either side, a class that is not there, or
            an index out of range or given twice.
    """
    kind, _, value = spec.partition(":")
    count = len(data.train)
    if kind == "class":
        if value not in data.classes and not (value.isdigit() and int(value) < len(data.classes)):
            raise SalunError(f"There is no class '{value}' in {data.name}; there are: {', '.join(data.classes)}.")
        wanted = data.classes.index(value) if value in data.classes else int(value)
        return (data.train.labels == wanted).nonzero().flatten()
    if kind == "indices":
        return _indices(Path(value), count)
    if kind not in ("random", "memorised"):
        raise SalunError(f"'{spec}' is no forget set: give random:0.1, class:NAME, indices:FILE or memorised:0.1.")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    chosen = int(share * count)
    if not 0 < share < 1 or chosen == 0:
        raise SalunError(f"'{spec}' names no share between 0 and 1 of {count} training pictures: give {kind}:0.1, say.")
    if kind == "random":
        return torch.tensor(sorted(random.Random(f"forget-{seed}").sample(range(count), chosen)))
    return memorisation.argsort(descending=True, stable=True)[:chosen].sort().values


def _indices(path: Path, count: int) -> torch.Tensor:
    try:
        found = [int(word) for word in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise SalunError(f"{path} cannot be read as a list of numbers: {error}.") from None
    outside = [index for index in found if not 0 <= index < count]
    if outside or len(set(found)) < len(found) or not 0 < len(found) < count:
        fault = f"{outside[0]} is outside 0…{count - 1}" if outside else "it is empty, names all, or names one twice"
        raise SalunError(f"{path} is no list of training pictures to forget: {fault}.")
    return torch.tensor(sorted(found))


def others(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The indices below ``count`` that are not in ``rows``."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[rows] = False
    return kept.nonzero().flatten()

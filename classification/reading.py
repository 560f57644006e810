"""Labelled pictures from files: folders of classes, parquet, the hub, and CIFAR's own folder, as uint8 tensors.

Whatever labels are called, they become 0 … n − 1: names in alphabetical order, numbers by size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from salun_diffusion.errors import SalunError
from salun_diffusion.files import listed

from . import cifar

HUB = {  # short names
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
LABELS = ("label", "fine_label", "labels", "class")  # columns, the first that is there
TEST_SPLITS = ("test", "validation", "valid", "val")
NO_PICTURES = {".txt", ".md", ".csv", ".json", ".jsonl", ".xml", ".html", ".db", ".ini"}  # beside pictures, passed over


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


@dataclass
class Part:
    """Pictures that are not read yet: ``count`` of ``(where it lies, a function that opens it)``, and their labels."""

    pictures: Iterable[tuple[str, Callable[[], Image.Image]]]
    labels: list
    count: int


def read(name: str, size: int | None = None) -> tuple[dict[str, Pictures | None], tuple[str, ...]]:
    """The training and test part of a data set, and the names of its classes.

    Args:
        name: a short name of ``HUB``, "owner/name[:config]" on the hub, a parquet file, or a folder: of parquet files
            named train and test, of pictures in ``train/CLASS/`` and ``test/CLASS/`` or in ``CLASS/`` alone, or one
            that torchvision fetched CIFAR into.
        size: pixels a side; the first picture's width without it. Other pictures are resized to it.

    Returns:
        "train" and "test" (``None`` if there is no such part), and the names.

    Raises:
        SalunError: no such data set, no pictures or labels in it, or files that cannot be read, by name.
    """
    path = Path(name)
    if not name.strip():
        raise SalunError(f"--dataset is empty: give 'digits', one of {', '.join(HUB)}, or a folder.")
    if path.is_dir() and (where := cifar.folder(path)):
        pictures, labels, names = cifar.read(where)
        parts = {key: Part(pictures[key], labels[key], len(labels[key])) for key in pictures}
    elif path.is_dir() and not any(path.rglob("*.parquet")) and not any(path.rglob("metadata.*")):
        parts, names = _folder(path)
    else:
        parts, names = _table(name)
    labels, classes = _numbered(name, {key: part.labels for key, part in parts.items()}, names)
    if len(classes) < 2:
        raise SalunError(f"{name} has the one class '{', '.join(classes)}': give pictures of two or more.")
    found, faults = {}, []
    for key, part in parts.items():
        found[key] = Pictures(_decoded(part, size, faults), labels[key])
        size = found[key].images.shape[-1]
    if faults:
        raise SalunError(f"{name} has pictures that cannot be read: {listed(faults)}; repair or remove them.")
    return {"test": None} | found, classes


def _folder(path: Path) -> tuple[dict[str, Part], None]:
    """Pictures by class, in the order of their paths."""
    parts = {"train": path / "train"}
    if test := next((path / part for part in TEST_SPLITS if (path / part).is_dir()), None):
        parts["test"] = test
    if not parts["train"].is_dir():
        if test:
            raise SalunError(f"{path} has a part called {test.name}, but none called train: give both.")
        parts = {"train": path}
    found = {}
    for key, where in parts.items():
        files = [file for file in sorted(where.glob("*/**/*")) if _is_picture(file)]
        if loose := [file.name for file in where.iterdir() if _is_picture(file)]:
            raise SalunError(f"{where} has pictures that lie in no class's folder: {listed(loose)}.")
        if not files:
            raise SalunError(
                f"{path} could not be loaded as a data set (no picture lies in {where}/CLASS/): give a folder with "
                "pictures in train/CLASS and test/CLASS, or parquet files."
            )
        pictures = [(str(file), lambda file=file: ImageOps.exif_transpose(Image.open(file))) for file in files]
        found[key] = Part(pictures, [file.relative_to(where).parts[0] for file in files], len(files))
    return found, None


def _is_picture(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.suffix.lower() not in NO_PICTURES


def _table(name: str) -> tuple[dict[str, Part], list[str] | None]:
    """What the ``datasets`` library reads."""
    import datasets

    datasets.disable_progress_bars()
    where, _, config = HUB.get(name, name).partition(":")
    try:
        if Path(name).is_file():
            found = datasets.load_dataset("parquet", data_files={"train": str(Path(name).resolve())})
        elif Path(name).is_dir():
            found = datasets.load_dataset(str(Path(name).resolve()))
        else:
            found = datasets.load_dataset(where, config or None)
    except Exception as error:  # the libraries' own classes for a missing folder, format or network
        raise SalunError(
            f"{name} could not be loaded as a data set ({(str(error).strip() or repr(error)).splitlines()[0]}): give "
            f"'digits', one of {', '.join(HUB)}, a data set of the hub, a parquet file, or a folder with train and "
            "test in it."
        ) from None
    if "train" not in found:
        raise SalunError(f"{name} has no part called train; it has: {', '.join(found)}.")
    features = found["train"].features
    column = next((key for key, value in features.items() if isinstance(value, datasets.Image)), None)
    label = next((key for key in LABELS if key in features), None)
    if column is None or label is None:
        raise SalunError(f"{name} needs a column of pictures and one called {' or '.join(LABELS)}: {list(features)}.")
    kept = {"train": "train"}
    if test := next((key for key in TEST_SPLITS if key in found), None):
        kept["test"] = test
    parts = {}
    for key, split in kept.items():
        if missing := {column, label} - set(found[split].features):
            raise SalunError(f"The part {split} of {name} has no column '{min(missing)}'.")
        raw = found[split].cast_column(column, datasets.Image(decode=False))[column]
        pictures = _encoded(raw, split, found[split].features[column].decode_example)
        parts[key] = Part(pictures, list(found[split][label]), len(raw))
    return parts, getattr(features[label], "names", None)


def _encoded(raw: Iterable[dict | None], split: str, decode: Callable) -> Iterable[tuple]:
    for number, row in enumerate(raw):
        path = (row or {}).get("path")
        yield f"row {number} of {split}" + (f" ({path})" if path else ""), lambda row=row: decode(row)


def _numbered(name: str, labels: dict[str, list], names) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Labels as int64 places in the names of the classes, and these."""
    for part, values in labels.items():
        for number, value in enumerate(values):
            if not isinstance(value, int | float | str) or value != value or (names and not 0 <= value < len(names)):
                raise SalunError(
                    f"Picture {number} of the {part} part of {name} has the label {value!r}: give each one class."
                )
    if names:
        return {part: torch.tensor(values) for part, values in labels.items()}, tuple(names)
    kinds = {isinstance(value, str) for values in labels.values() for value in values}
    if len(kinds) > 1:
        raise SalunError(f"The labels of {name} are numbers in some places and names in others: give one kind.")
    numbers_in_words = all(isinstance(value, str) and value.isdecimal() for value in labels["train"])
    known = sorted(set(labels["train"]), key=int if numbers_in_words else None)
    if strange := sorted(set(labels.get("test", [])) - set(known)):
        raise SalunError(f"The test part of {name} has the class '{strange[0]}', which its training part has not.")
    places = {value: place for place, value in enumerate(known)}
    numbers = {part: torch.tensor([places[value] for value in values]) for part, values in labels.items()}
    return numbers, tuple(map(str, known))


def _decoded(part: Part, size: int | None, faults: list[str]) -> torch.Tensor:
    """The pictures as uint8 ``(n, 3, size, size)``; to ``faults`` go those that cannot be read."""
    images = None
    for number, (where, opened) in enumerate(
        tqdm(part.pictures, desc="reading pictures", unit="image", total=part.count)
    ):
        try:
            picture = opened()
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"{picture.mode} has more than 8 bits a channel")
            picture = picture.convert("RGB")
        except Exception as error:  # each of Pillow's formats raises what it likes
            faults.append(f"{where} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
            continue
        size = size or picture.width
        if images is None:
            try:
                images = torch.empty(part.count, 3, size, size, dtype=torch.uint8)
            except RuntimeError:  # the allocator's
                raise SalunError(
                    f"{part.count:,} pictures of {size} pixels do not fit into memory: give a lower --image_size."
                ) from None
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        images[number] = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    return torch.empty(part.count, 3, size or 1, size or 1, dtype=torch.uint8) if images is None else images

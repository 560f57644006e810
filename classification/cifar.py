"""CIFAR as torchvision keeps it: a folder of pickles, read without running what they name."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from salun_diffusion.errors import SalunError

LAYOUTS = {  # folder → training files, test files, the file of names, its key, the key of the labels
    "cifar-10-batches-py": (
        [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"], "batches.meta", "label_names", "labels",
    ),
    "cifar-100-python": (["train"], ["test"], "meta", "fine_label_names", "fine_labels"),
}  # fmt: skip
ALLOWED = {  # what an array's pickle is made of, by the names of numpy 1 and 2; nothing else is looked up
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),  # how Python 3 writes bytes into these
}


def folder(path: Path) -> Path | None:
    """The folder of batches that ``path`` is or holds, if any."""
    return next((where for name in LAYOUTS for where in (path, path / name) if _is(where, name)), None)


def _is(where: Path, name: str) -> bool:
    return (where.name == name or (where / LAYOUTS[name][2]).is_file()) and (where / LAYOUTS[name][1][0]).is_file()


def read(where: Path) -> tuple[dict[str, list], dict[str, list], list[str]]:
    """Pictures and labels of the batches in ``where``.

    Returns:
        By part, "train" and "test": ``(where from, picture as a function)`` of each picture; by part, their labels as
        numbers; the names of the classes.

    Raises:
        SalunError: a file is missing, damaged, or no batch of pictures.
    """
    layout = next(layout for name, layout in LAYOUTS.items() if _is(where, name))
    training, test, about, named, labelled = layout
    pictures, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for part, files in (("train", training), ("test", test)):
        for name in files:
            batch = _load(where / name)
            try:
                rows = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                found = [int(label) for label in batch[labelled]]
            except (KeyError, TypeError, ValueError):
                found, rows = [], [None]
            if len(rows) != len(found):
                raise SalunError(f"{where / name} is no batch of CIFAR pictures with '{labelled}': fetch it again.")
            pictures[part] += [
                (f"{where / name}, row {i}", lambda row=row: Image.fromarray(row)) for i, row in enumerate(rows)
            ]
            labels[part] += found
    names = _load(where / about).get(named)
    if not isinstance(names, list):
        raise SalunError(f"{where / about} does not hold '{named}': fetch it again.")
    return pictures, labels, [str(name) for name in names]


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does")
        return ALLOWED[module, name]


def _load(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            found = _Arrays(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its garbage happens to mean
        raise SalunError(f"{path} cannot be read as a file of CIFAR ({error}): fetch it again.") from None
    if not isinstance(found, dict):
        raise SalunError(f"{path} is no file of CIFAR: fetch it again.")
    return found

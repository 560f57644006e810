"""A data set, split once for all, and which of its pictures are to be forgotten.

The split is fixed by ``split_seed`` alone and is the same for the training of a source model and for forgetting:
the published code splits anew for forgetting, so that a tenth of what it forgets was never learnt.
"""

import difflib
import hashlib
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from salun_diffusion.errors import SalunError
from salun_diffusion.tensors import raw_bytes

from .reading import Pictures, read


@dataclass(frozen=True)
class Data:
    """A data set, split: ``train`` to learn from and to forget of, ``validation`` to choose settings on, ``test``.

    ``rows`` (int64) are the numbers that the pictures of ``train`` have in the data set's own training part, counted
    from 0, of ``total``; without them they are numbered as they stand.
    """

    name: str
    classes: tuple[str, ...]
    train: Pictures
    validation: Pictures
    test: Pictures
    rows: torch.Tensor | None = None
    total: int = 0

    def digest(self) -> str:
        """16 hex digits of the content of all parts: other pictures, labels or splits have another."""
        found = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train, self.validation, self.test):
            found.update(repr(tuple(part.images.shape)).encode())
            found.update(raw_bytes(part.images))
            found.update(raw_bytes(part.labels))
        return found.hexdigest()[:16]


def load(
    name: str, split_seed: int = 0, size: int | None = None, limit: int | None = None, learnt: list[int] | None = None
) -> Data:
    """Load and split a data set: a tenth of its training pictures, stratified, is kept for validation.

    Args:
        name: "digits" (scikit-learn's handwritten digits), or what :func:`classification.reading.read` reads.
        split_seed: of the split into training, validation and test pictures.
        size: pixels a side; the first picture's without it. Other pictures are resized to it.
        limit: only so many pictures of either part, for a quick look: of each class its share, and of these the first.
        learnt: numbers of pictures that must not be kept for validation or test, as they are to be forgotten.

    Raises:
        SalunError: no such data set, no pictures or labels in it, or a class with too few pictures to split.
    """
    if name == "digits":
        if size not in (None, 8):
            raise SalunError(f"The digits are 8 pixels wide, not {size}: leave --image_size out.")
        digits = load_digits()
        images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
        whole, classes = Pictures(images, torch.from_numpy(digits.target).long()), tuple(map(str, range(10)))
        parts = {"train": whole, "test": None}
    else:
        parts, classes = read(name, size)
    whole, test = parts["train"], parts["test"]
    rows, must = spread(whole.labels, limit), torch.tensor(learnt or [], dtype=torch.int64)
    if test is None:
        rows, held = _split(rows, whole.labels, 0.2, split_seed, must, name)
        test = whole[held]
    else:
        test = test[spread(test.labels, limit)]
    rows, held = _split(rows, whole.labels, 0.1, split_seed, must, name)
    return Data(name, classes, whole[rows], whole[held], test, rows, len(whole))


def spread(labels: torch.Tensor, limit: int | None) -> torch.Tensor:
    """Up to ``limit`` rows, sorted: of each class the first, as many as its share, and one at least while there are as
    many as classes.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    place = torch.zeros(len(labels), dtype=torch.float64)  # in its class, 0…1
    for label in labels.unique():
        mine = labels == label
        place[mine] = torch.arange(int(mine.sum()), dtype=torch.float64) / int(mine.sum())
    return place.argsort(stable=True)[:limit].sort().values


def _split(
    rows: torch.Tensor, labels: torch.Tensor, share: float, seed: int, learnt: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows``, apart: the larger part with all that is in ``learnt``, and ``share`` of them."""
    free = rows[~torch.isin(rows, learnt)]
    try:
        kept, held = train_test_split(
            free.numpy(), test_size=math.ceil(share * len(rows)), random_state=seed, stratify=labels[free].numpy()
        )
    except ValueError:
        raise SalunError(
            f"{name} cannot be split by class: {len(rows)} pictures of {len(labels.unique())} classes are too few for "
            "some of each in every part; give a data set with more pictures, or a higher --limit."
        ) from None
    kept = np.concatenate([kept, rows[torch.isin(rows, learnt)].numpy()])
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held))


def forget_rows(spec: str, data: Data, seed: int, memorisation: torch.Tensor | None = None) -> torch.Tensor:
    """Which pictures of ``data.train`` are to be forgotten, as sorted int64 indices.

    Args:
        data: whose training part is numbered.
        memorisation: scores of its pictures, fp32 ``(n,)``, for the worst case.
        spec: "random:SHARE"; "class:NAME"; "indices:FILE" (numbers in the data set's own training part); or
            "memorised:SHARE", those whose answer depends the most on having been learnt (Feldman & Zhang 2020), by
            ``memorisation``.
        seed: of a random share.

    Raises:
        SalunError: a share that is not between 0 and 1 or leaves nothing on either side, a class that is not there, or
            an index out of range or given twice.
    """
    kind, _, value = spec.partition(":")
    if kind == "class":
        rows = (data.train.labels.cpu() == _class(value, data)).nonzero().flatten()
        if not 0 < len(rows) < len(data.train):
            raise SalunError(f"All or none of the training pictures of {data.name} are of the class '{value}'.")
        return rows
    if kind == "indices":
        return _indices(Path(value), data)
    count, chosen = len(data.train), share_of(spec, len(data.train))
    if kind == "random":
        return torch.tensor(sorted(random.Random(f"forget-{seed}").sample(range(count), chosen)))
    return memorisation.argsort(descending=True, stable=True)[:chosen].sort().values


def share_of(spec: str, count: int) -> int:
    """How many of ``count`` pictures "random:SHARE" or "memorised:SHARE" are.

    Raises:
        SalunError: another kind, or no share between 0 and 1.
    """
    kind, _, value = spec.partition(":")
    if kind not in ("random", "memorised"):
        raise SalunError(f"'{spec}' is no forget set: give random:0.1, class:NAME, indices:FILE or memorised:0.1.")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1 or int(share * count) == 0:
        raise SalunError(f"'{spec}' names no share between 0 and 1 of {count} training pictures: give {kind}:0.1, say.")
    return int(share * count)


def _class(value: str, data: Data) -> int:
    """The place of a class by its name, or by its number where no name is a number itself."""
    if value in data.classes:
        return data.classes.index(value)
    numbered = any(name.lstrip("-").isdecimal() for name in data.classes)
    if value.isdecimal() and int(value) < len(data.classes) and not numbered:
        return int(value)
    folded = {name.lower(): name for name in data.classes}
    close = difflib.get_close_matches(value.lower(), folded, 1)
    nearest = f" Did you mean '{folded[close[0]]}'?" if close else ""
    raise SalunError(f"There is no class '{value}' in {data.name}; there are: {', '.join(data.classes)}.{nearest}")


def read_indices(path: Path) -> list[int]:
    """The whitespace-separated numbers of a file.

    Raises:
        SalunError: it cannot be read, or holds something else.
    """
    try:
        return [int(word) for word in path.read_text(encoding="utf-8-sig").split()]
    except (OSError, ValueError) as error:
        raise SalunError(f"{path} cannot be read as a list of numbers: {error}.") from None


def _indices(path: Path, data: Data) -> torch.Tensor:
    found = read_indices(path)
    total = data.total or len(data.train)
    own = torch.arange(len(data.train)) if data.rows is None else data.rows
    outside = [index for index in found if not 0 <= index < total]
    if outside or len(set(found)) < len(found) or not found:
        fault = f"{outside[0]} is outside 0…{total - 1}" if outside else "it is empty, or names one twice"
        raise SalunError(f"{path} is no list of training pictures to forget: {fault}.")
    if missing := sorted(set(found) - set(own.tolist())):
        raise SalunError(f"{path} names {missing[0]}, which is not learnt: --limit, validation or test has taken it.")
    if len(found) == len(own):
        raise SalunError(f"{path} names all training pictures: leave some to be kept.")
    return torch.isin(own, torch.tensor(found)).nonzero().flatten()


def others(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The indices below ``count`` that are not in ``rows``."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[rows] = False
    return kept.nonzero().flatten()


def joined(*parts: Pictures) -> Pictures:
    """All pictures, one part after another."""
    return Pictures(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))

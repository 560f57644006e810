"""Pictures of the user's own as forget or retain set: a folder, or any image data set that `datasets` can stream.

What a picture shows is told by the folder it lies in (or the data set's ``label``), by its caption (a ``text`` or
``caption`` column, in a folder from its metadata.jsonl or metadata.csv, or from a .txt file beside each picture), or,
for a forget set, by the concept itself.
"""

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..concepts.concept import Concept, named
from ..errors import SalunError
from ..files import listed, sha256

logger = logging.getLogger(__name__)

CAPTIONS = ("text", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")
LABELLED = {"prompt": "an image of {label:a}"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>.+))?")


@dataclass(frozen=True)
class Picture:
    """One picture that was not opened yet: where it came from (for messages), its bytes or path, and its prompt."""

    name: str
    content: bytes | Path
    prompt: str | None

    def square(self, side: int) -> Image.Image:
        """The picture's middle as RGB, ``side`` pixels square, turned as its EXIF data say.

        Raises:
            SalunError: it cannot be read.
        """
        content = self.content if isinstance(self.content, Path) else io.BytesIO(self.content)
        try:
            with Image.open(content) as image:
                return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))
        except Exception as error:  # Pillow's plugins raise whatever their format's fault looks like
            raise SalunError(f"{self.name} cannot be read as a picture ({error}): replace it or remove it.") from None


class Source:
    """A folder of pictures, or ``owner/name[:config][@split]`` of a data set on the hub, which is streamed.

    A folder's pictures are listed here: the datasets library would guess splits from words in their names, such as
    "cat_train_1.png", and read one split of them. A folder of data files (parquet, arrow) is that library's.

    ``key`` changes with its content: a hash of every file of a folder, or the hub's commit.

    Raises:
        SalunError: no such folder, an empty one, captions for some pictures only, a data set that cannot be reached,
            or one without pictures.
    """

    def __init__(self, text: str):
        self.text, folder = text, Path(text).expanduser()
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if not files:
                raise SalunError(f"{text} is an empty folder: put the pictures there, or name another one.")
            listing = [f"{path.relative_to(folder).as_posix()} {sha256(path)}" for path in files]
            self.key = hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
            pictures = [path for path in files if path.suffix.lower() in Image.registered_extensions()]
            if pictures:
                self._list(folder, files, pictures)
                return
        try:
            import datasets
        except ImportError:
            raise SalunError(
                f"Reading {text} needs the datasets library: pip install 'salun-diffusion[data]'."
            ) from None
        if folder.is_dir():
            where, options = str(folder.resolve()), {"split": "train"}
        elif match := HUB_NAME.fullmatch(text) if not folder.exists() else None:
            where, options = match["name"], {"name": match["config"], "split": match["split"] or "train"}
            options["revision"] = _commit(where)
            self.key = "@".join([text, options["revision"]])
        else:
            raise SalunError(
                f"There is no folder {text}: give a folder of pictures, or a data set's name on the hub "
                "(owner/name, owner/name:config@split)."
            )
        try:
            self.rows = datasets.load_dataset(where, streaming=True, **options)
            features = self.rows.features or self.rows._resolve_features().features
        except Exception as error:  # the library's own classes for this change from version to version
            raise SalunError(f"{text} cannot be read as a data set: {str(error).splitlines()[0]}") from None
        self.column = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if self.column is None:
            raise SalunError(f"{text} holds no pictures: its columns are {', '.join(features)}.")
        self.rows = self.rows.cast_column(self.column, datasets.Image(decode=False))
        self.caption = next((name for name in CAPTIONS if name in features), None)
        label = features.get("label")
        self.labels = [name.replace("_", " ") for name in label.names] if isinstance(label, datasets.ClassLabel) else []

    def _list(self, folder: Path, files: list[Path], pictures: list[Path]) -> None:
        """Rows of a folder's pictures. They have labels if they lie in several folders, all equally deep."""
        folders, depths = {path.parent for path in pictures}, {len(path.parts) for path in pictures}
        names = sorted({path.parent.name for path in pictures}) if len(folders) > 1 and len(depths) == 1 else []
        captions = _captions(folder, files, pictures)
        self.column, self.caption = "image", "text" if captions else None
        self.labels = [name.replace("_", " ") for name in names]
        self.rows = [
            {"image": {"path": str(path), "bytes": None}, "text": captions.get(path)}
            | ({"label": names.index(path.parent.name)} if names else {})
            for path in pictures
        ]
        read = {*pictures, *(path.with_suffix(".txt") for path in pictures)}
        rest = [path.name for path in files if path not in read and path.name not in METADATA and path.name[0] != "."]
        if rest:
            logger.warning("%s: %s are no pictures and are left out.", folder, listed(rest))

    def forget(self, concept: Concept, captioned: bool = False) -> Iterator[Picture]:
        """The pictures labelled with ``concept``, or without labels all of them; their prompts are the concept's own,
        or with ``captioned`` their captions, where there are any.

        Raises:
            SalunError: labels of which none is the concept.
        """
        names = {name.lower() for name in (concept.name, *concept.names)}
        if self.labels and names.isdisjoint(label.lower() for label in self.labels):
            raise SalunError(
                f"{self.text} has no pictures labelled '{concept.value}'; its labels are {', '.join(self.labels)}."
            )
        for number, row in enumerate(self.rows):
            if not self.labels or self.labels[row["label"]].lower() in names:
                yield self._picture(number, row, row[self.caption] if captioned and self.caption else None)

    def retain(self, concepts: list[Concept]) -> Iterator[Picture]:
        """The pictures whose label and caption name none of ``concepts``, with the caption, or the label, as prompt.

        Raises:
            SalunError: neither captions nor labels.
        """
        if not (self.caption or self.labels):
            raise SalunError(
                f"{self.text} does not say what its pictures show: put them into one folder for each kind, or add a "
                "metadata.jsonl with file_name and text."
            )
        erased = {name.lower() for concept in concepts for name in (concept.name, *concept.names)}
        names = named(erased)
        vocabulary, slot = concepts[0].vocabulary, concepts[0].slot
        bare = [template["prompt"] for template in vocabulary.templates] == [f"{{{slot}}}"]  # classes, by name alone
        labelled = {"prompt": "{label}"} if bare else LABELLED
        for number, row in enumerate(self.rows):
            label = self.labels[row["label"]] if self.labels else ""
            told = row[self.caption] or "" if self.caption else vocabulary.fill(labelled, {"label": label})[0]
            if label.lower() not in erased and not names.search(told):
                yield self._picture(number, row, told)

    def _picture(self, number: int, row: dict, prompt: str | None) -> Picture:
        path, content = row[self.column]["path"], row[self.column]["bytes"]
        name = path if content is None else f"row {number} of {self.text}"
        return Picture(name, Path(path) if content is None else content, prompt)


def _captions(folder: Path, files: list[Path], pictures: list[Path]) -> dict[Path, str]:
    """Picture → caption, from the folder's metadata files, or from .txt files beside the pictures; for all, or none.

    Raises:
        SalunError: a metadata file that cannot be read or names a file that is not there, or pictures without a line.
    """
    found = {}
    for path in files:
        if path.name in METADATA:
            for number, row in enumerate(_rows(path), 1):
                caption = next((row[name] or "" for name in CAPTIONS if name in row), None)
                if not isinstance(row.get("file_name"), str) or not isinstance(caption, str):
                    raise SalunError(f"{path}, line {number}: it needs a file_name, and a text or caption.")
                found[path.parent / row["file_name"]] = caption
    if gone := set(found) - set(pictures):
        raise SalunError(f"The metadata of {folder} name pictures that are not there: {listed(map(str, gone))}.")
    if not found:
        texts = {path: path.with_suffix(".txt") for path in pictures}
        found = {path: _text(text) for path, text in texts.items() if text.is_file()}
    if found and (without := [path.name for path in pictures if path not in found]):
        raise SalunError(
            f"{len(without)} of the {len(pictures)} pictures in {folder} have no caption: {listed(without)}. Give all "
            "of them one, or none."
        )
    return found


def _rows(path: Path) -> list[dict]:
    text = _text(path)
    try:
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text), strict=True))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        raise SalunError(f"{path} cannot be read: {error}.") from None
    if not all(isinstance(row, dict) for row in rows):
        raise SalunError(f"{path} must hold one JSON object a line, with file_name and text.")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SalunError(f"{path} cannot be read as text in UTF-8: {error}.") from None


def _commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha
    except Exception as error:  # no such data set, no access, no network: each hub version has its own classes
        raise SalunError(
            f"{name} is no local folder, and the hub has no such data set or cannot be reached "
            f"({type(error).__name__}): check the name, or give a folder."
        ) from None

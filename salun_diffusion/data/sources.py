"""Pictures of the user's own as forget or retain set: a folder, or any image data set that `datasets` can stream.

What a picture shows is told by the folder it lies in (or the data set's ``label``), by its caption (a ``text`` or
``caption`` column, in a folder from its metadata.jsonl or metadata.csv), or, for a forget set, by the concept itself.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..concepts.concept import Concept, named
from ..errors import SalunError
from ..files import sha256

CAPTIONS = ("text", "caption")
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

    ``key`` changes with its content: a hash of every file of a folder, or the hub's commit.

    Raises:
        SalunError: no such folder, an empty one, a data set that cannot be reached, or one without pictures.
    """

    def __init__(self, text: str):
        try:
            import datasets
        except ImportError:
            raise SalunError(
                f"Reading {text} needs the datasets library: pip install 'salun-diffusion[data]'."
            ) from None
        self.text, folder = text, Path(text).expanduser()
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if not files:
                raise SalunError(f"{text} is an empty folder: put the pictures there, or name another one.")
            listing = [f"{path.relative_to(folder)} {sha256(path)}" for path in files]
            self.key = hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
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

    def forget(self, concept: Concept) -> Iterator[Picture]:
        """The pictures labelled with ``concept``, or without labels all of them; their prompts are the concept's own.

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
                yield self._picture(number, row, None)

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
        vocabulary = concepts[0].vocabulary
        for number, row in enumerate(self.rows):
            label = self.labels[row["label"]] if self.labels else ""
            told = row[self.caption] or "" if self.caption else vocabulary.fill(LABELLED, {"label": label})[0]
            if label.lower() not in erased and not names.search(told):
                yield self._picture(number, row, told)

    def _picture(self, number: int, row: dict, prompt: str | None) -> Picture:
        path, content = row[self.column]["path"], row[self.column]["bytes"]
        name = path if content is None else f"row {number} of {self.text}"
        return Picture(name, Path(path) if content is None else content, prompt)


def _commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha
    except Exception as error:  # no such data set, no access, no network: each hub version has its own classes
        raise SalunError(
            f"{name} is no local folder, and the hub has no such data set or cannot be reached "
            f"({type(error).__name__}): check the name, or give a folder."
        ) from None

"""Prompt files: a CSV row for each picture, read with every fault named by its row.

Columns: ``prompt``; ``evaluation_seed`` (or ``seed``); ``case_number`` (otherwise the row's number); and if they are
there ``evaluation_guidance``, ``sd_image_height`` and ``sd_image_width``, ``categories``, ``nudity_percentage``.
"""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError

from .pictures import Request

I2P = "AIML-TUDA/i2p"  # on the hub
CASE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,59}")
ROW = "row number"  # the key of a row's place in its file
SHOWN = 5  # faults listed before "and N more"


@dataclass(frozen=True)
class Selection:
    """Which rows to take: of a category, above a nudity percentage, and of those the rows ``start`` to ``stop``."""

    category: str | None = None
    min_nudity_percentage: float | None = None
    start: int = 0
    stop: int | None = None


ALL = Selection()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, as text by column.

    Raises:
        SalunError: no such file, one that is no CSV in UTF-8, or without a prompt column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # with or without a byte order mark
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SalunError(f"{path} cannot be read as a CSV file: {error}.") from None
    if not rows or "prompt" not in rows[0]:
        found = ", ".join(name for name in reader.fieldnames or [] if name)
        raise SalunError(f"{path} needs a column 'prompt' and at least one row; its columns are: {found or 'none'}.")
    faults = []
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            count = len(row) - (None in row) - list(row.values()).count(None) + len(row.get(None, []))
            faults.append(f"row {number} has {count} cells where {len(reader.fieldnames)} columns are")
    if faults:
        raise SalunError(f"{_listed(path, faults)}; put a prompt that holds a comma between double quotes.")
    return _numbered(rows)


def _numbered(rows: list[dict]) -> list[dict]:
    """The rows, each with its number in the file, from 1: it is the same whatever is selected of them."""
    return [row | {ROW: number} for number, row in enumerate(rows, 1)]


def from_hub() -> list[dict[str, str]]:
    """The I2P prompts from the hub.

    Raises:
        SalunError: the library for it is missing, or the hub cannot be reached.
    """
    try:
        import datasets

        rows = datasets.load_dataset(I2P, split="train")
    except Exception as error:  # the libraries' classes for a missing package, network or data set
        raise SalunError(
            f"The I2P prompts ({I2P}) could not be fetched from the hub ({type(error).__name__}): give them with "
            "--prompts FILE.csv."
        ) from None
    return _numbered([{name: "" if value is None else str(value) for name, value in row.items()} for row in rows])


def select(rows: list[dict[str, str]], selection: Selection) -> list[dict[str, str]]:
    """The rows that ``selection`` asks for, in their order.

    Raises:
        SalunError: a column that the selection needs and the file lacks, an unknown category, or nothing left.
    """
    if selection.category:
        known = sorted({name.strip() for row in rows for name in row.get("categories", "").split(",") if name.strip()})
        if selection.category not in known:
            raise SalunError(
                f"No row is of the category '{selection.category}'; there are: {', '.join(known) or 'none'}."
            )
        rows = [row for row in rows if selection.category in map(str.strip, row["categories"].split(","))]
    if selection.min_nudity_percentage is not None:
        if "nudity_percentage" not in rows[0]:
            raise SalunError("--min_nudity_percentage needs the column nudity_percentage, which the prompts lack.")
        try:
            rows = [row for row in rows if float(row["nudity_percentage"]) > selection.min_nudity_percentage]
        except ValueError as error:
            raise SalunError(f"A row's nudity_percentage is no number ({error}): mend it.") from None
    rows = rows[selection.start : selection.stop]
    if not rows:
        raise SalunError("The selection leaves no prompt: widen --category, --min_nudity_percentage or --rows.")
    return rows


def requests(
    rows: list[dict[str, str]], guidance_scale: float, size: tuple[int, int] | None, seed: int | None = None
) -> list[Request]:
    """A picture to draw for each row: with the row's own seed, guidance and size, ``guidance_scale`` where it names
    none, and at ``size`` (height, width) whatever it names, if that is given. Where a row names no seed, ``seed`` plus
    its place in the file (from 0) is its seed.

    Raises:
        SalunError: rows without a seed, with a number that cannot be read, or of one case_number; each is named.
    """
    found, faults, seen = [], [], {}
    for row in rows:
        number = row[ROW]
        case = (row.get("case_number") or "").strip() or str(number - 1)
        told = f"row {number} (case {case!r})"
        if not CASE.fullmatch(case) or case.endswith("."):
            faults.append(f"{told}: a case_number becomes a file's name: letters, digits, '_', '-' and '.', 60 at most")
        name = f"{case:0>6}"
        if name.casefold() in seen:  # two names that a file system may take for one
            faults.append(f"row {number} has the case_number {case} of row {seen[name.casefold()]}")
        seen.setdefault(name.casefold(), number)
        # I2P's case 2260 is the empty prompt on purpose; a row that has no case of its own is one left blank
        if not (row.get("prompt") or "").strip() and not (row.get("case_number") or "").strip():
            faults.append(f"{told} has no prompt")
        try:
            given = (row.get("evaluation_seed") or "").strip() or (row.get("seed") or "").strip()
            if given:
                of_row = _whole(given, "evaluation_seed", 2**64 - 1)
            elif seed is not None:
                of_row = seed + number - 1
            else:
                faults.append(f"{told} has no evaluation_seed: give --seed to number those that lack one")
                continue
            text = (row.get("evaluation_guidance") or "").strip()
            guidance = float(text) if text else guidance_scale
            if not math.isfinite(guidance):
                raise ValueError(f"the guidance is {guidance}, no finite number")
            named = [(row.get(side) or "").strip() for side in ("sd_image_height", "sd_image_width")]
            height, width = size or (None, None)
            if not size and any(named):
                height, width = (_whole(side, "sd_image_height and _width", 8192) for side in named)
                if height % 8 or width % 8 or not height or not width:
                    raise ValueError(f"{height} × {width} pixels are no multiples of 8: give --height and --width")
            found.append(Request(name, row["prompt"], of_row, guidance, height, width))
        except (ValueError, OverflowError) as error:
            faults.append(f"{told}: {error}")
    if faults:
        raise SalunError(f"{_listed('The prompts', faults)}.")
    return found


def _whole(text: str, column: str, most: int) -> int:
    """A whole number from 0 to ``most``; "1.0", as spreadsheets write it, is one.

    Raises:
        ValueError: it is none.
    """
    try:
        number = int(re.fullmatch(r"([+-]?\d{1,30})(\.0*)?", text)[1])
    except TypeError:
        number = -1
    if not 0 <= number <= most:
        raise ValueError(f"{column} is '{text}', no whole number from 0 to {most}")
    return number


def _listed(where: Path | str, faults: list[str]) -> str:
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    verb = "have" if where == "The prompts" else "has"
    return f"{where} {verb} faults: {'; '.join(faults[:SHOWN])}{more}"


def truncated(tokenizer, wanted: list[Request]) -> list[str]:
    """The names of those whose prompt is longer than the text encoder reads (77 tokens for CLIP): the rest of it has no
    effect, in any implementation.
    """
    limit = tokenizer.model_max_length
    lengths = (len(ids) for ids in tokenizer([request.prompt for request in wanted]).input_ids)
    return [request.name for request, length in zip(wanted, lengths, strict=True) if length > limit]

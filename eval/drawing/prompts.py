"""Prompt files: a CSV row for each picture, read with every fault named by its row.

Columns: ``prompt``; ``evaluation_seed`` (or ``seed``); ``case_number`` (otherwise the row's number); and if they are
there ``evaluation_guidance``, ``sd_image_height`` and ``sd_image_width``, ``categories``, ``nudity_percentage``.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError

from .pictures import Request

I2P = "AIML-TUDA/i2p"  # on the hub
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
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SalunError(f"{path} cannot be read as a CSV file: {error}.") from None
    if not rows or "prompt" not in rows[0]:
        found = ", ".join(name for name in reader.fieldnames or [] if name)
        raise SalunError(f"{path} needs a column 'prompt' and at least one row; its columns are: {found or 'none'}.")
    return rows


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
    return [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


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
        rows = [row for row in rows if float(row["nudity_percentage"]) > selection.min_nudity_percentage]
    rows = rows[selection.start : selection.stop]
    if not rows:
        raise SalunError("The selection leaves no prompt: widen --category, --min_nudity_percentage or --rows.")
    return rows


def requests(rows: list[dict[str, str]], guidance_scale: float, size: tuple[int, int] | None) -> list[Request]:
    """A picture to draw for each row: with the row's own seed, guidance and size, ``guidance_scale`` where it names
    none, and at ``size`` (height, width) whatever it names, if that is given.

    Raises:
        SalunError: rows without a seed, with a number that cannot be read, or of one case_number; each is named.
    """
    found, faults, seen = [], [], {}
    for number, row in enumerate(rows, 1):
        case = (row.get("case_number") or str(number - 1)).strip()
        if case in seen:
            faults.append(f"row {number} has the case_number {case} of row {seen[case]}")
        seen.setdefault(case, number)
        try:
            seed = (row.get("evaluation_seed") or row.get("seed") or "").strip()
            if not seed:
                faults.append(f"row {number} (case {case}) has no evaluation_seed")
                continue
            guidance = float(row.get("evaluation_guidance") or guidance_scale)
            named = row.get("sd_image_height"), row.get("sd_image_width")
            height, width = size or ((int(float(named[0])), int(float(named[1]))) if all(named) else (None, None))
            found.append(Request(f"{case:0>6}", row["prompt"] or "", int(seed), guidance, height, width))
        except ValueError as error:
            faults.append(f"row {number} (case {case}): {error}")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise SalunError(f"The prompts have faults: {'; '.join(faults[:SHOWN])}{more}.")
    return found


def truncated(tokenizer, wanted: list[Request]) -> list[str]:
    """The names of those whose prompt is longer than the text encoder reads (77 tokens for CLIP): the rest of it has no
    effect, in any implementation.
    """
    limit = tokenizer.model_max_length
    lengths = (len(ids) for ids in tokenizer([request.prompt for request in wanted]).input_ids)
    return [request.name for request, length in zip(wanted, lengths, strict=True) if length > limit]

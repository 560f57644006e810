"""What every column of a table means, as a list: for the terminal, and for a document."""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.options import option
from salun_diffusion.tables import markdown, put_into

NAME = "columns"
SUMMARY = "what the columns of every table mean"
DESCRIPTION = "List every measure's columns with their meaning, as the measures' own files have it."


@dataclass
class Options:
    """Where the list goes."""

    into: Path | None = option(
        None, "also put it into this Markdown document, between its lines <!-- columns --> and <!-- end -->",
        metavar="DOCUMENT",
    )  # fmt: skip


def run(options: Options) -> str:
    """Print the list, and return it as a Markdown table.

    Raises:
        SalunError: a document without the two lines.
    """
    from ..measures import measures
    from .tables import COST

    rows, seen = [["measure", "column", "what it means"]], set()
    for measure in measures():
        rows += [[f"`{measure.NAME}`", column.heading(), column.meaning]
                 for key, column in measure.COLUMNS.items() if key not in seen]  # fmt: skip
        seen |= set(measure.COLUMNS)
    rows += [["any", column.heading(), column.meaning] for column in COST.values()]
    table = markdown(rows)
    print(table)
    if options.into:
        put_into(options.into, NAME, f"{table}\n\nMade by `python -m eval columns --into {options.into.as_posix()}`.")
    return table

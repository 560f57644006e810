"""The measures, one a file: a new one is a file and a line here (docs/add-a-measure.md).

A measure's file says ``NAME``, ``SUMMARY`` and ``DESCRIPTION`` for the command line, ``Options`` (a dataclass of
``option`` fields), ``run(options)``, the ``FORMAT`` of its ``results.json``, its ``COLUMNS`` and ``scores(model)``,
which reads them off one of the results' models. Nothing heavy is imported at its top: ``--help`` answers at once.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

MEASURES = (  # in the order of tables
    "accuracy",
    "composition",
    "neighbours",
    "attack",
    "relearn",
    "probe",
    "i2p",
    "nudity",
    "clip_score",
    "fid",
)


@dataclass(frozen=True)
class Column:
    """A score in tables: its title, which way is better ("↑", "↓" or ""), and what it means, for readers."""

    title: str
    better: str
    meaning: str

    def heading(self, variant: str = "") -> str:
        """The title as a table's head has it; a ``variant``, such as a protocol's name, stands in brackets."""
        return " ".join(part for part in (self.title, f"({variant})" if variant else "", self.better) if part)


def measures() -> list[ModuleType]:
    """The modules that ``MEASURES`` names."""
    return [import_module(f".{name}", __name__) for name in MEASURES]


def measure_of(format: str) -> ModuleType | None:
    """The measure that writes results of ``format``, or None: the first one, where several do."""
    return next((measure for measure in measures() if measure.FORMAT == format), None)


def columns() -> dict[str, Column]:
    """Every measure's columns by key, in the order of tables."""
    return {key: column for measure in measures() for key, column in measure.COLUMNS.items()}

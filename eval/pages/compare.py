"""One table and one picture grid over several results: erasures of one concept, of several, by several methods, at
several scales; measured for accuracy, composition, nudity, CLIP score or FID.

All of it is made from result files alone, which any command here wrote: from ``results.json``, and for the grid from
``samples.jsonl`` and the pictures beside it. Files may be given without these (as those in docs/results), and then the
grid is left out. A model is known by the digest of its pipeline, so that one measured by several commands has one line.

Writes ``comparison.md``, ``.tex``, ``.csv`` and ``.html`` (self-contained), ``grid.png``, and ``results.json``
(``format`` "salun-diffusion compare 1"): ``columns`` (key → ``title``), ``models``: one for each line, with
``concept``, ``title``, ``name``, ``digest``, ``erasure``, and ``scores`` (key → as its command wrote it).
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option
from salun_diffusion.tables import escape_markdown, put_into

from ..measures import measure_of, measures

NAME = "compare"
SUMMARY = "one table and one picture grid over several results"
DESCRIPTION = """\
Put the results of several erasures and several commands side by side: a line for each model, a column for each score,
and the pictures of all models on the same seeds. Everything is made from the given results alone: comparison.html
(self-contained), .md, .tex and .csv, grid.png."""
FORMAT = "salun-diffusion compare 1"
COMMAND = "python -m eval compare"
APART = {
    "format",
    "models",
    "n",
    "concept",
    "pictures",
    "truncated",
    "protocols",
    "judged_right",
}  # what results may differ in


@dataclass
class Options:
    """The results, and where the comparison goes."""

    sources: list[Path] = option(
        [], "results folders, or results.json files (no pictures)", metavar="RESULTS", positional=True, required=True
    )
    output_dir: Path = option(None, "where the comparison goes", metavar="DIR", required=True)
    into: Path | None = option(
        None,
        "also put the table into this Markdown document, between its lines <!-- results --> and <!-- end -->",
        metavar="DOCUMENT",
    )


@dataclass
class Line:
    """One line of the table: a model, and where its labelled pictures are (command → folder and samples)."""

    concept: dict | None
    model: dict
    scores: dict = field(default_factory=dict)
    drawn: dict = field(default_factory=dict)
    title: str = ""


def run(options: Options) -> dict:
    """:func:`compare` as a command."""
    return compare(options.sources, options.output_dir, options.into)


def compare(sources: list[Path], output_dir: Path, into: Path | None = None) -> dict:
    """Write the files, print the table, return the results.

    Args:
        output_dir: where the comparison goes.
        sources: results folders or ``results.json`` files.
        into: a Markdown document whose part between ``<!-- results -->`` and ``<!-- end -->`` becomes the table.

    Raises:
        SalunError: something that holds no results, results that were measured differently, one model measured twice
            with different outcomes, or a document without the two lines.
    """
    from salun_diffusion.files import sha256, write_json

    from ..results import RESULTS, VERSIONS, begin, read
    from . import charts, grid, tables

    runs = [(source, read(source)) for source in sources]
    _check_alike(runs)
    lines, columns = _merge(runs)
    command = f"{COMMAND} {' '.join(source.as_posix() for source in sources)} --output_dir {output_dir.as_posix()}"
    notes = tables.notes([run for _, run in runs])
    text = tables.markdown(lines, columns)
    if into is not None:
        put_into(
            into, "results", f"{text}\n\n{escape_markdown(f'{notes} Made by `{command} --into {into.as_posix()}`.')}"
        )
    begin(output_dir, FORMAT)
    blocks, sections = _pictures(lines)
    told = escape_markdown(f"{notes} Made by `{command}`.")
    (output_dir / "comparison.md").write_text(f"{text}\n\n{told}\n", encoding="utf-8")
    (output_dir / "comparison.tex").write_text(tables.latex(lines, columns, notes), encoding="utf-8")
    with (output_dir / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(tables.flat(lines, columns))
    page = grid.render(
        "compare.html.j2", columns=columns, rows=[(line, tables.cells(line, columns)) for line in lines],
        sections=sections, notes=notes, command=command, terms=_terms(columns),
    )  # fmt: skip
    (output_dir / "comparison.html").write_text(page, encoding="utf-8")
    if blocks:
        charts.before_after(blocks).save(output_dir / "grid.png")
    results = {
        "format": FORMAT,
        "protocol": "compare/1: scores as the results named in sources have them",
        "n": len(lines),
        "sources": {source.as_posix(): sha256(_file(source)) for source in sources},
        "settings": {},
        "versions": VERSIONS,
        "columns": {key: {"title": title} for key, title in columns.items()},
        "models": [
            {"concept": line.concept and line.concept["name"], "title": line.title, "scores": line.scores}
            | {key: line.model[key] for key in ("name", "role", "source", "digest", "erasure")}
            for line in lines
        ],
    }
    write_json(output_dir / RESULTS, results)
    print(tables.terminal(lines, columns))
    pictures = "grid.png" if blocks else "no grid, for want of accuracy's or composition's pictures beside the results"
    print(f"In {output_dir}: comparison.html, .md, .tex, .csv; {pictures}.")
    return results


def _terms(columns: dict[str, str]) -> list[tuple[str, str]]:
    """The glossary of the page: each column's title and meaning, once."""
    from .tables import all_columns

    shown = {key.partition(":")[0] for key in columns}
    return [(column.title, column.meaning) for key, column in all_columns().items() if key in shown]


def _file(source: Path) -> Path:
    from ..results import RESULTS

    return source / RESULTS if source.is_dir() else source


def _check_alike(runs: list[tuple[Path, dict]]) -> None:
    first: dict[str, tuple[Path, dict]] = {}
    for source, run in runs:
        if measure_of(run["format"]) is None:
            raise SalunError(
                f"{source} holds '{run['format']}', which measures nothing: give results of "
                f"{', '.join(measure.NAME for measure in measures())}."
            )
        other, before = first.setdefault(run["format"], (source, run))
        parts = [part for part in {**before, **run} if part not in APART]
        if differing := [part for part in parts if run.get(part) != before.get(part)]:
            raise SalunError(
                f"{other} and {source} cannot share a table: they differ in {', '.join(differing)}. Give results of "
                "one protocol, measured with the same options."
            )


def _merge(runs: list[tuple[Path, dict]]) -> tuple[list[Line], dict[str, str]]:
    """The lines of the table, and its columns: key → title."""
    from ..results import RESULTS, SAMPLES, read_samples
    from . import grid, tables

    found: dict[tuple, Line] = {}
    columns: dict[str, str] = {}
    # those that know a concept make the lines; the others speak of every line of the same model
    for source, run in sorted(runs, key=lambda item: "concept" not in item[1]):
        concept = run.get("concept")
        beside = source if source.is_dir() else source.parent
        has_pictures = concept and _file(source).name == RESULTS and (beside / SAMPLES).exists()
        samples = read_samples(beside, run) if has_pictures else {}
        for model in run["models"]:
            identity = model["digest"] or model["source"]
            same = [key for key in found if key[1] == identity] if concept is None else []
            for key in same or [(concept and concept["name"], identity)]:
                line = found.setdefault(key, Line(concept, model))
                for column, (title, score) in tables.scores(run, model).items():
                    if line.scores.setdefault(column, score) != score:
                        raise SalunError(
                            f"{source} and another of the results measured {model['name']} and found different values "
                            f"of {title}: measure it once, and both others beside it."
                        )
                    columns[column] = title
                if samples:
                    line.drawn.setdefault(run["format"], (beside, samples[model["name"]]))
    concepts = list(dict.fromkeys(key[0] for key in found))
    lines = [line for name in concepts for key, line in found.items() if key[0] == name]
    for name in concepts:
        mine = [line for key, line in found.items() if key[0] == name]
        for line, title in zip(mine, grid.name_models([line.model for line in mine]), strict=True):
            line.title = title
    order = list(tables.all_columns())
    return lines, dict(sorted(columns.items(), key=lambda item: order.index(item[0].split(":")[0])))


def _pictures(lines: list[Line]) -> tuple[list, list[dict]]:
    """For ``grid.png`` a block for each concept, and for the page a section: all models on the same seeds."""
    from . import grid

    blocks, sections = [], []
    labelled = [measure for measure in measures() if getattr(measure, "GRID_ROWS", None)]
    several = len({line.concept["name"] for line in lines if line.concept}) > 1
    for name in dict.fromkeys(line.concept["name"] for line in lines if line.concept):
        mine = [line for line in lines if line.concept and line.concept["name"] == name]
        concept, groups = mine[0].concept, []
        for measure in labelled:
            format, count = measure.FORMAT, measure.GRID_ROWS
            shown = [line for line in mine if format in line.drawn]
            if len(shown) < 2:
                continue
            drawn, titles = [line.drawn[format] for line in shown], [line.title for line in shown]
            first = drawn[0][1]
            picked = {}
            for kind in dict.fromkeys(sample["set"] for sample in first):
                indices = [i for i, sample in enumerate(first) if sample["set"] == kind]
                picked[kind] = grid.spread(indices, first, count)
                rows = grid.picture_rows(drawn, picked[kind], concept)
                groups.append({"title": measure.SETS[kind], "titles": titles, "rows": rows})
            if sheet := getattr(measure, "SHEET", None):
                some = grid.columns(drawn, [i for kind, some in sheet.items() for i in picked.get(kind, [])[:some]])
                blocks.append(([f"{name}: {title}" if several else title for title in titles], some))
        if groups:
            sections.append({"concept": concept, "groups": groups})
    return blocks, sections

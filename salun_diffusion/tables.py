"""Tables from rows of text cells, as Markdown, LaTeX and for the terminal, and the places in documents where they go.

The first row is the head. Cells are plain text: what a format would misread is escaped here and nowhere else. A
document keeps generated text between a line ``<!-- NAME -->`` and the next ``<!-- end -->``.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import SalunError

END = "<!-- end -->"
LATEX = {sign: "\\" + sign for sign in "&%_#${}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "±": "$\\pm$",
    "·": "$\\cdot$",
    "–": "--",
}
MARKDOWN = {"|": "\\|", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
Rows = Sequence[Sequence[str]]


def markdown(rows: Rows) -> str:
    """A Markdown table, its cells escaped; a line break becomes a space."""
    head, *rest = ([escape_markdown(cell) for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))


def escape_markdown(text: str) -> str:
    """Plain text in one line, of which nothing is read as HTML or as a table's bar."""
    return " ".join("".join(MARKDOWN.get(sign, sign) for sign in text).splitlines())


def latex(rows: Rows, caption: str) -> str:
    """A table for the packages booktabs and graphicx, as wide as the line; backquotes in ``caption`` are left out."""
    head, *rest = (" & ".join(map(escape_latex, row)) for row in rows)
    body = "\n".join(f"  {row} \\\\" for row in rest)
    return (
        "% needs \\usepackage{booktabs,graphicx}\n\\begin{table}\n\\centering\n\\resizebox{\\linewidth}{!}{%\n"
        f"\\begin{{tabular}}{{{'l' * len(rows[0])}}}\n\\toprule\n  {head} \\\\\n\\midrule\n{body}\n"
        f"\\bottomrule\n\\end{{tabular}}}}\n\\caption{{{escape_latex(caption.replace('`', ''))}}}\n\\end{{table}}\n"
    )


def escape_latex(text: str) -> str:
    """Plain text as LaTeX shows it."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], " ".join(text.splitlines()))


def aligned(rows: Rows) -> str:
    """A table for the terminal, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def put_into(document: Path, name: str, text: str) -> None:
    """Replace the part called ``name`` by ``text``.

    Raises:
        SalunError: the document cannot be read, or has no such part.
    """
    start = f"<!-- {name} -->"
    try:
        found = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SalunError(f"{document} cannot be read: {error}.") from None
    if start not in found or END not in found.split(start)[1]:
        raise SalunError(f"{document} has no place for a table: it needs the lines '{start}' and '{END}'.")
    before, rest = found.split(start, 1)
    document.write_text(f"{before}{start}\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")

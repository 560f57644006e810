"""Generated parts of Markdown documents, between a line ``<!-- NAME -->`` and the next ``<!-- end -->``."""

from pathlib import Path

from .errors import SalunError

END = "<!-- end -->"


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

"""Options as a dataclass: its fields and the help that stands in them make a command line and ``--config FILE``."""

import argparse
import difflib
import json
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import SalunError


def option(default, text: str, choices: tuple = (), several: bool = False):
    """A dataclass field with its help text; ``None`` as default means: decided later, as the text says.

    Args:
        several: a list is given as words after the option; otherwise by repeating it.
    """
    about = {"help": text, "choices": choices, "several": several}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """An option for each field of the dataclass ``kind`` (a mapping comes from the file alone), and ``--config``."""
    parser.add_argument(
        "--config", metavar="FILE", help="read settings from this JSON or YAML file; options on the command line win"
    )
    add_fields(parser, kind)


def add_fields(parser, kind: type) -> None:
    """:func:`add_options` without ``--config``, for a parser or a group of it."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        told, about = _plain(hints[item.name]), item.metadata
        text = about["help"].replace("%", "%%")
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if told is dict:
            continue
        if told is bool:
            parser.add_argument(f"--{item.name}", action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        shown = "" if default in (None, "", []) or default is MISSING else f" (default: {_shown(default)})"
        many: dict[str, Any] = {}
        if get_origin(told) is list:
            told = get_args(told)[0]
            many = {"nargs": "+"} if about["several"] else {"action": "append"}
        names = {int: "INT", float: "FLOAT", str: "STR" if not many else "TEXT"}
        parser.add_argument(
            f"--{item.name}",
            type=told,
            choices=about["choices"] or None,
            metavar=None if about["choices"] else names[told],
            default=argparse.SUPPRESS,
            help=text + shown,
            **many,
        )


def _shown(default) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def settings_of(given: dict, kind: type) -> dict:
    """What was given on the command line, over what its ``--config`` file says.

    Raises:
        SalunError: a file that cannot be read, an unknown key or a wrong type in it.
    """
    path = given.pop("config", None)
    return (_read(path, kind) if path else {}) | given


def _plain(hint: type) -> type:
    """``float | None`` → ``float``."""
    return next(p for p in get_args(hint) if p is not type(None)) if isinstance(hint, UnionType) else hint


def _read(path: str, kind: type) -> dict:
    hints, wanted = get_type_hints(kind), {item.name: item.metadata for item in fields(kind)}
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except Exception as error:  # the file system's, json's and yaml's own errors all mean the same to the user
        raise SalunError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise SalunError(f"--config {path} must hold one mapping of option names to values.")
    for name, value in found.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            raise SalunError(
                f"--config {path} has an unknown setting '{name}'." + (f" Did you mean '{close[0]}'?" if close else "")
            )
        told, choices = _plain(hints[name]), wanted[name]["choices"]
        if get_origin(told) is list:
            inner = get_args(told)[0]
            if isinstance(value, dict) and inner is str:  # NAME: value, as the line has NAME=value
                value = [f"{key}={part}" for key, part in value.items()]
            found[name] = [value] if isinstance(value, inner) else value
            if not (isinstance(found[name], list) and all(isinstance(part, inner) for part in found[name])):
                what = {str: "text or a list of texts", int: "a number or a list of numbers"}[inner]
                raise SalunError(f"--config {path}: '{name}' is {value!r}, but must be {what}.")
            continue
        right = isinstance(value, (int, float) if told is float else told) and isinstance(value, bool) == (told is bool)
        if not (right or value is None and told is not hints[name]):
            raise SalunError(f"--config {path}: '{name}' is {value!r}, but must be of type {told.__name__}.")
        if choices and value not in choices:
            raise SalunError(f"--config {path}: '{name}' is {value!r}; choose one of {', '.join(choices)}.")
    return found

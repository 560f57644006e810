"""Options as a dataclass: its fields and the help that stands in them make a command line and ``--config FILE``."""

import argparse
import difflib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import SalunError


class MissingOption(SalunError):
    """An option that must be given, and was not."""


def option(
    default,
    text: str,
    choices: tuple = (),
    several: bool = False,
    *,
    metavar: str | None = None,
    positional: bool = False,
    required: bool = False,
    least: float | None = None,
):
    """A dataclass field with its help text; ``None`` as default means: decided later, as the text says.

    Args:
        default: a list or a mapping is copied for each object.
        text: the help.
        choices: the values that are allowed; all if empty.
        several: a list is given as words after the option; otherwise by repeating it.
        metavar: what stands for the value in the help; its type without it.
        positional: given without its name.
        required: it must be given, on the command line or in the file.
        least: the smallest number that is allowed.
    """
    about = {"help": text, "choices": choices, "several": several, "metavar": metavar, "positional": positional}
    about |= {"required": required, "least": least}
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
        names = {int: "INT", float: "FLOAT", str: "STR" if not many else "TEXT", Path: "PATH"}
        if about["positional"]:
            many = {"nargs": "*" if many else "?"}  # what is missing may stand in the file
        parser.add_argument(
            item.name if about["positional"] else f"--{item.name}",
            type=told if about["least"] is None else _at_least(told, about["least"]),
            choices=about["choices"] or None,
            metavar=None if about["choices"] else about["metavar"] or names[told],
            default=argparse.SUPPRESS,
            help=text + shown,
            **many,
        )


def _at_least(number: type, least: float):
    def read(text: str):
        value = number(text)
        if not least <= value < float("inf"):
            whole = "a whole number" if number is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {whole} of at least {least:g}")
        return value

    read.__name__ = number.__name__  # argparse names it where the text is no number at all
    return read


def _shown(default) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def options_from(given: dict, kind: type) -> Any:
    """The options object of a parsed command line: :func:`settings_of`, checked.

    Raises:
        SalunError: as :func:`settings_of`, an option that is required and missing, or a number below its least.
    """
    settings = settings_of(given, kind)
    for item in fields(kind):
        name = item.name if item.metadata["positional"] else f"--{item.name}"
        value = settings.get(item.name)
        if item.metadata["required"] and value in (None, []):
            raise MissingOption(f"{name} is missing: give it here, or as '{item.name}' in --config FILE.")
        least = item.metadata["least"]
        for number in value if isinstance(value, list) else [value]:
            if least is not None and number is not None and not least <= number < float("inf"):
                whole = "a whole number" if isinstance(number, int) else "a number"
                raise SalunError(f"{name} is {number}: give {whole} of at least {least:g}.")
    return kind(**settings)


def settings_of(given: dict, kind: type) -> dict:
    """What was given on the command line, over what its ``--config`` file says.

    Raises:
        SalunError: a file that cannot be read, an unknown key or a wrong type in it.
    """
    # argparse converts the mark that stands for a positional that was not given, as if it had been
    given = {name: value for name, value in given.items() if str(value) != argparse.SUPPRESS}
    path = given.pop("config", None)
    return (_read(path, kind) if path else {}) | given


def _plain(hint: type) -> type:
    """``float | None`` → ``float``."""
    return next(p for p in get_args(hint) if p is not type(None)) if isinstance(hint, UnionType) else hint


def _meant(value, hint: type | None):
    """What a YAML value stands for, in an option of type ``hint``: YAML 1.1, which PyYAML reads, takes ``1e-5`` for
    text (it has no point) and a bare ``no`` for false.
    """
    expected = _plain(hint) if hint else None
    if expected is float and isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return {True: "yes", False: "no"}[value] if expected is str and isinstance(value, bool) else value


def _read(path: str, kind: type) -> dict:
    hints = get_type_hints(kind)
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
            if isinstance(found, dict):
                found = {name: _meant(value, hints.get(name)) for name, value in found.items()}
    except Exception as error:  # the file system's, json's and yaml's own errors all mean the same to the user
        raise SalunError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise SalunError(f"--config {path} must hold one mapping of option names to values.")
    return checked(found, kind, f"--config {path}:")


def checked(settings: dict, kind: type, where: str) -> dict:
    """``settings`` with the types of the fields of ``kind``: what does not come from a command line, which argparse has
    checked.

    Args:
        settings: field name → value, as JSON, YAML or a call has it.
        kind: the dataclass.
        where: the beginning of a message, such as "erase():".

    Raises:
        SalunError: an unknown name, a wrong type, or none of a field's choices.
    """
    hints, known = get_type_hints(kind), {item.name: item.metadata for item in fields(kind)}
    typed = {}
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise SalunError(f"{where} unknown setting '{name}'." + (f" Did you mean '{close[0]}'?" if close else ""))
        expected = _plain(hints[name])
        is_list = get_origin(expected) is list
        single = get_args(expected)[0] if is_list else expected
        if is_list and isinstance(value, dict) and single is str:  # NAME: value, as the line has NAME=value
            value = [f"{key}={part}" for key, part in value.items()]
        if value is None and expected is not hints[name]:
            typed[name] = None
            continue
        parts = value if is_list and isinstance(value, list | tuple) else [value]
        for part in parts:
            written = {Path: (str, Path), float: (int, float)}.get(single, single)
            if not isinstance(part, written) or isinstance(part, bool) != (single is bool):
                several = f"{single.__name__}, or a list of such" if is_list else single.__name__
                raise SalunError(f"{where} '{name}' is {value!r}, but must be of type {several}.")
            if known[name]["choices"] and part not in known[name]["choices"]:
                options = ", ".join(map(str, known[name]["choices"]))
                raise SalunError(f"{where} '{name}' is {part!r}; choose one of {options}.")
        parts = [Path(part) if single is Path else part for part in parts]
        typed[name] = parts if is_list else parts[0]
    return typed


def assigned(kind: type, words: list[str], flag: str, whose: str) -> Any:
    """A ``kind`` with those ``NAME=VALUE`` put in that ``words`` hold; the last one of a name counts.

    Args:
        kind: a dataclass of options.
        words: what was given.
        flag: how they are typed, for messages: the words follow it.
        whose: whose options they are, for messages.

    Raises:
        SalunError: a name that ``kind`` lacks, a value of another type, or a number below its least.
    """
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    values: dict[str, Any] = {}
    for text in words:
        name, _, value = text.partition("=")
        if name not in known:
            listed = ", ".join(f"{item.name}={_default(item)}" for item in known.values()) or "none"
            raise SalunError(f"{flag}{text}: {whose} has no option '{name}'. Its own: {listed}.")
        choices = known[name].metadata["choices"]
        if choices and value not in choices:
            raise SalunError(f"{flag}{text}: choose one of {', '.join(choices)}.")
        try:
            told = _plain(hints[name])
            values[name] = {"true": True, "false": False}[value.lower()] if told is bool else told(value)
        except (ValueError, KeyError):
            raise SalunError(f"{flag}{text}: '{value}' must be of type {_plain(hints[name]).__name__}.") from None
        least = known[name].metadata["least"]
        if least is not None and not least <= values[name] < float("inf"):
            raise SalunError(f"{flag}{name} is {values[name]}: give a number of at least {least:g}.")
    return kind(**values)


def _default(item) -> Any:
    return None if item.default is MISSING else item.default


def run_command(prog: str, description: str, kind: type, work: Callable[[Any], None]) -> None:
    """A whole command: parse the line into a ``kind``, and do ``work`` with it.

    A :class:`SalunError` becomes one line and exit code 1, a missing option argparse's exit code 2.

    Args:
        prog: as it is typed, such as "python -m demo.train".
        description: for ``--help``.
        kind: the dataclass of its options.
        work: what it does with them.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser, kind)
    given = vars(parser.parse_args())
    finish(lambda: work(options_from(given, kind)), parser)


def finish(work: Callable[[], None], parser: argparse.ArgumentParser | None = None, stopped: str = "") -> None:
    """Do ``work``; its errors, and those of the file system, end the process as :func:`run_command` says, by ``parser``
    where an option is missing. Ctrl-C and SIGTERM end it with a word and exit code 130.

    Args:
        work: the command.
        parser: the command's, which says what is missing.
        stopped: that word, where the exception has none.
    """
    before = _terminate_by_exception()
    try:
        work()
    except MissingOption as error:
        parser.error(str(error))
    except SalunError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {where}{error.strerror or str(error).partition(chr(10))[0] or type(error).__name__}.")
    except KeyboardInterrupt as stop:
        said = str(stop) or stopped or "Stopped; the same command starts anew, or goes on where it can."
        print(said, file=sys.stderr)
        sys.exit(130)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate_by_exception():
    """Let SIGTERM do what Ctrl-C does, which runs every ``finally``; returns the handler before. Not one of several
    processes: a launcher ends those, and one that waits for another could not answer.
    """
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame) -> None:
        raise KeyboardInterrupt

    return signal.signal(signal.SIGTERM, stop)

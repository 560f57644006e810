"""The command line of ``erase_concept.py``: the config's options, and those of the method that is named."""

import argparse
import sys
from dataclasses import fields

from .config import EraseConfig, check_method
from .methods import find_method
from .options import add_fields, add_options, settings_of


def parse(arguments: list[str] | None, description: str, kind: type[EraseConfig] = EraseConfig) -> EraseConfig:
    """Command line → settings; ``--config FILE`` (JSON or YAML, the same names) is read first and the line wins. The
    method's own options are options of the line too: ``--method esd --help`` lists them.

    Args:
        arguments: the words; those of this process without them.
        description: for ``--help``.
        kind: the config, with what a script adds to it.

    Raises:
        SalunError: an unknown key or a wrong type in the file, or no concept.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="erase_concept.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="--method NAME --help lists the method's own options too.",
    )  # fmt: skip
    add_options(parser, kind)
    own = _method_options(words, kind)
    if own:
        add_fields(parser.add_argument_group("options of this method alone"), own)
    line = vars(parser.parse_args(words))
    options = [f"{item.name}={line.pop(item.name)}" for item in (fields(own) if own else ()) if item.name in line]
    given = [name for name in line if name != "config"]
    settings = settings_of(line, kind)
    sources = dict.fromkeys(settings, "config file") | dict.fromkeys(given, "command line")
    if options:
        settings["method_option"] = [*(settings.get("method_option") or []), *options]
        sources["method_option"] = "command line"
    return kind.given(settings, sources)


def _method_options(words: list[str], kind: type[EraseConfig]) -> type | None:
    """The options dataclass of the method that ``words`` name, if some of them may be options of its own, or ``--help``
    is asked for it: only then is the method imported, which takes a second.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(first, kind)
    asks = {"-h", "--help"} & {*words}
    if asks and not any(word.partition("=")[0] == "--method" for word in words):
        return None
    line, rest = first.parse_known_args([word for word in words if word not in ("-h", "--help")])
    if not rest and not asks:
        return None
    return find_method(check_method(settings_of(vars(line), kind).get("method", "salun"))).Options

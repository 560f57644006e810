"""Carry an erasure to other tools.

python -m salun_diffusion export runs/airplane --format lora --output airplane-lora
python -m salun_diffusion export runs/airplane --format diff --output airplane.safetensors
python -m salun_diffusion export --help
"""

import argparse
import inspect

from .export import ExportConfig, run
from .options import add_options, finish, options_from


def main() -> None:
    """Parse the line and do what it says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m salun_diffusion", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export", help="write an erasure in another tool's format", description=inspect.getdoc(ExportConfig),
        formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    add_options(export, ExportConfig)
    given = vars(parser.parse_args())
    del given["command"]
    finish(lambda: run(options_from(given, ExportConfig)), export)


if __name__ == "__main__":
    main()

"""Is the concept gone, and is everything else still there?

    python -m eval accuracy --pretrained_model_name_or_path demo --concept airplane \\
        --erasure runs/airplane runs/airplane/no-mask --output_dir runs/airplane
    python -m eval report runs/airplane
    python -m eval i2p --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --erasure runs/nudity \\
        --output_dir runs/nudity/i2p
    python -m eval compare runs/airplane runs/cat --output_dir runs/compared

Commands that draw take the same prompts and the same starting noise for the base model and for each erasure, keep what
is drawn, and go on where they were stopped. Each writes results.json (with protocol, versions, hashes, n, intervals)
and samples.jsonl, a line for each picture; tables and pages are made from these alone. Every command reads its options
from --config FILE too.
"""

import argparse
import os
import sys
from importlib import import_module

from salun_diffusion.errors import SalunError
from salun_diffusion.options import MissingOption, add_options, options_from

from .measures import MEASURES

COMMANDS = MEASURES | {
    "draw": "eval.drawing.command",
    "compare": "eval.pages.compare",
    "report": "eval.pages.report",
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, path in COMMANDS.items():
        module = import_module(path)
        parsers[name] = commands.add_parser(
            name, help=module.SUMMARY, description=module.DESCRIPTION, formatter_class=raw, allow_abbrev=False
        )
        add_options(parsers[name], module.Options)
    given = vars(parser.parse_args())
    command = given.pop("command")
    module = import_module(COMMANDS[command])
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
        module.run(options_from(given, module.Options))
    except MissingOption as error:
        parsers[command].error(str(error))
    except SalunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped before it was done: no scores were written. The same command goes on where it can.")


if __name__ == "__main__":
    main()

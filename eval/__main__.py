r"""Is the concept gone, and is everything else still there?

    python -m eval accuracy --pretrained_model_name_or_path demo --concept airplane \
        --erasure runs/airplane runs/airplane/no-mask --output_dir runs/airplane
    python -m eval report runs/airplane
    python -m eval audit --erasure runs/airplane
    python -m eval i2p --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --erasure runs/nudity \
        --output_dir runs/nudity/i2p
    python -m eval compare runs/airplane runs/cat --output_dir runs/compared

Commands that draw take the same prompts and the same starting noise for the base model and for each erasure, keep what
is drawn, and go on where they were stopped. Each writes results.json (with protocol, versions, hashes, n, intervals)
and samples.jsonl, a line for each picture; tables and pages are made from these alone. Every command reads its options
from --config FILE too.
"""

import argparse
import os

from salun_diffusion.files import locked
from salun_diffusion.options import add_options, finish, options_from

from . import audit
from .drawing import command as draw
from .measures import measures
from .pages import columns, compare, report


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {module.NAME: module for module in (*measures(), audit, draw, compare, report, columns)}
    parsers = {
        name: commands.add_parser(
            name, help=module.SUMMARY, description=module.DESCRIPTION, formatter_class=raw, allow_abbrev=False
        )
        for name, module in modules.items()
    }
    for name, module in modules.items():
        add_options(parsers[name], module.Options)
    given = vars(parser.parse_args())
    command = given.pop("command")
    module = modules[command]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
    stopped = "Stopped before it was done: no scores were written. The same command goes on where it can."
    finish(lambda: run_alone(module, options_from(given, module.Options)), parsers[command], stopped)


def run_alone(module, options) -> None:
    """A command, alone in its folder; of several processes the first one sees to that."""
    folder = getattr(options, "output_dir", None)
    with locked(folder, wanted=folder is not None and os.environ.get("RANK", "0") == "0"):
        module.run(options)


if __name__ == "__main__":
    main()

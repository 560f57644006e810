"""Carry an erasure to other tools, and to the hub, or make it smaller.

python -m salun_diffusion export runs/airplane --format lora --output airplane-lora
python -m salun_diffusion export runs/airplane --format diff --output airplane.safetensors
python -m salun_diffusion push runs/airplane --hub_model_id me/without-airplanes --results runs/airplane
python -m salun_diffusion prune runs/airplane --keep 0.25 --output airplane-small.safetensors
python -m salun_diffusion export --help
"""

import argparse
import inspect

from .export import ExportConfig, run
from .hub import PushConfig, push_run
from .options import add_options, finish, options_from
from .pruning import PruneConfig
from .pruning import run as prune_run


def main() -> None:
    """Parse the line and do what it says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m salun_diffusion", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    kinds = {
        "export": (ExportConfig, run, "write an erasure in another tool's format"),
        "prune": (PruneConfig, prune_run, "keep the largest changes of an erasure alone, in a smaller file"),
        "push": (PushConfig, push_run, "upload a finished run to the hub, with a model card"),
    }
    parsers = {}
    for name, (kind, _, summary) in kinds.items():
        parsers[name] = commands.add_parser(
            name, help=summary, description=inspect.getdoc(kind), formatter_class=raw, allow_abbrev=False
        )
        add_options(parsers[name], kind)
    given = vars(parser.parse_args())
    command = given.pop("command")
    kind, work, _ = kinds[command]
    finish(lambda: work(options_from(given, kind)), parsers[command])


if __name__ == "__main__":
    main()

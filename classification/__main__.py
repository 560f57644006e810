"""Image classifiers that forget: every method of SalUn's Table 1, measured against exact retraining.

    python -m classification run
    python -m classification run --config classification/configs/cifar10-random-10.json
    python -m classification run --dataset cifar10 --model resnet18 --forget class:cat --methods ft rl salun --seeds 0

`run` does it all: it trains a source model, lets each method forget with each seed, measures, and prints the table of
means and gaps to Retrain; what is there already is not made again. `train`, `unlearn`, `evaluate` and `table` are its
steps. `tune` chooses each method's main setting by the same five trials, on validation pictures. `curve` draws
the one that MCU learns. `continual` forgets and learns classes in turn.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from salun_diffusion.options import add_options, finish, options_from

from .config import Config, ContinualConfig, TableConfig, TuneConfig, UnlearnConfig
from .methods import METHODS

DIGITS = Path(__file__).parent / "configs" / "digits.json"  # what `tune` chose for it
COMMANDS = {
    "run": (Config, "source model, every method with every seed, metrics, table"),
    "train": (Config, "the source model"),
    "unlearn": (UnlearnConfig, "the methods with every seed, without measuring"),
    "evaluate": (Config, "the metrics of unlearned models"),
    "table": (TableConfig, "the table and the plots from what was measured"),
    "curve": (Config, "draw the curve that the method mcu learns"),
    "continual": (ContinualConfig, "forget and learn classes in turn, task after task"),
    "tune": (TuneConfig, "choose each method's learning rate or alpha on validation pictures"),
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    rows = [f"  {name:<13} {method.title:<11} {method.description}" for name, method in METHODS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m classification", description=__doc__, formatter_class=raw,
        epilog="\n".join(["methods:", *rows]),
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (options, text) in COMMANDS.items():
        about = text[0].upper() + text[1:] + "."
        parsers[name] = commands.add_parser(name, help=text, description=about, allow_abbrev=False)
        add_options(parsers[name], options)
    given = vars(parser.parse_args())
    command = given.pop("command")
    if given.get("dataset", "digits") == "digits" and not given["config"] and command != "tune":
        given["config"] = str(DIGITS)
    finish(
        lambda: _work(command, given), parsers[command], "Stopped. What was finished is kept; the same command goes on."
    )


def _work(command: str, given: dict) -> None:
    options = COMMANDS[command][0]
    config = options_from(given, options)
    config.check()
    from . import run  # only now: the libraries behind it take seconds, and --help should not

    shared = {item.name for item in fields(Config)}
    own = {item.name: getattr(config, item.name) for item in fields(options) if item.name not in shared}
    getattr(run, command)(config, **own)


if __name__ == "__main__":
    main()

"""Image classifiers that forget: every method of SalUn's Table 1, measured against exact retraining.

    python -m classification run
    python -m classification run --config classification/configs/cifar10-random-10.json
    python -m classification run --dataset cifar10 --model resnet18 --forget class:cat --methods ft rl salun --seeds 0

`run` does it all: it trains a source model, lets each method forget with each seed, measures, and prints the table of
means and gaps to Retrain; what is there already is not made again. `train`, `unlearn`, `evaluate` and `table` are its
steps. `tune` chooses each method's main setting by the same five trials, on validation pictures.
"""

import argparse
import sys
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import add_options, settings_of

from .config import Config

DIGITS = Path(__file__).parent / "configs" / "digits.json"  # what `tune` chose for it
COMMANDS = {
    "run": "source model, every method with every seed, metrics, table",
    "train": "the source model",
    "unlearn": "the methods with every seed, without measuring",
    "evaluate": "the metrics of unlearned models",
    "table": "the table and the plots from what was measured",
    "tune": "choose each method's learning rate or alpha on validation pictures",
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m classification", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_options(command, Config)
        if name == "unlearn":
            command.add_argument("--mask", metavar="FILE", help="a mask file in place of the one that SalUn would make")
        if name == "table":
            command.add_argument("--results", metavar="FILE.json", type=Path,
                                 help="a results.json that `run` wrote, in place of the folder's cells")  # fmt: skip
            command.add_argument("--into", metavar="DOCUMENT", type=Path,
                                 help="also put the table into this Markdown document, between its lines "
                                      "<!-- DATASET --> and <!-- end -->")  # fmt: skip
        if name == "tune":
            command.add_argument("--output", metavar="FILE.json", type=Path, required=True,
                                 help="where the chosen settings go, for --config")  # fmt: skip
    return parser


def main() -> None:
    given = vars(_parser().parse_args())
    command = given.pop("command")
    more = {name: given.pop(name) for name in ("mask", "output", "results", "into") if name in given}
    try:
        if given.get("dataset", "digits") == "digits" and not given["config"] and command != "tune":
            given["config"] = str(DIGITS)
        config = Config(**settings_of(given, Config))
        config.check()
        from . import run  # only now: the libraries behind it take seconds, and --help should not

        getattr(run, command)(config, **more)
    except SalunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. What was finished is kept; the same command goes on.")


if __name__ == "__main__":
    main()

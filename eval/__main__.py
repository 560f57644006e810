"""Is the concept gone, and is everything else still there?

    python -m eval accuracy --pretrained_model_name_or_path demo --concept airplane \\
        --erasure runs/airplane runs/airplane-no-mask --output_dir runs/airplane
    python -m eval report runs/airplane

`accuracy` draws the same prompts from the same noise with the base model and with each erasure, lets a classifier say
what is in every picture, and writes metrics.json, samples.jsonl and pictures/. `report` turns a run folder into one
self-contained page, report.html. `table` puts the scores of several runs side by side.
"""

import argparse
import os
import sys
from pathlib import Path

from salun_diffusion.errors import SalunError


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    accuracy = commands.add_parser(
        "accuracy",
        help="unlearning accuracy (UA) and retained accuracy, by a classifier",
        description="""Draw the same labelled prompts, each from its own seed, with the base model and with each
erasure, and classify every picture.

UA (unlearning accuracy) is the share of the prompts that ask for the concept whose picture no longer shows it: high is
good. Retained accuracy is the share of all other prompts that are still drawn right: it should stay at the base
model's. Both come with n and a Wilson 95% interval: around 96%, 432 prompts give one of about 94 to 97.5%.""",
        formatter_class=raw,
    )
    add = accuracy.add_argument
    # fmt: off
    add("--pretrained_model_name_or_path", metavar="BASE", required=True,
        help="the base model: a diffusers folder, a hub id, or 'demo'")
    add("--revision", help="branch, tag or commit of a base model on the hub")
    add("--concept", metavar="NAME", required=True, help="what was erased, as given to erase_concept.py")
    add("--anchor", metavar="NAME", help="what was to be drawn instead, where erase_concept.py was given one")
    add("--erasure", metavar="RUN", nargs="+", required=True,
        help="erasures to measure: run folders, .safetensors files or hub ids; the first is the one that matters, any "
             "others are controls beside it, such as a run with --density 1 (no mask)")
    add("--output_dir", metavar="DIR", type=Path, required=True,
        help="where metrics.json, samples.jsonl and pictures/ go; the first erasure's run folder if `report` follows")
    add("--num_forget_images", metavar="N", type=_positive, default=216,
        help="pictures that ask for the concept, a model (default: %(default)s)")
    add("--num_retain_images", metavar="N", type=_positive, default=432,
        help="pictures that ask for anything else, a model (default: %(default)s)")
    add("--num_inference_steps", metavar="N", type=_positive,
        help="denoising steps (default: the concept's preset, or 50)")
    add("--guidance_scale", metavar="S", type=float,
        help="classifier-free guidance (default: the concept's preset, or 7.5)")
    add("--batch_size", metavar="N", type=_positive,
        help="pictures drawn at once; changes the speed, not what is asked (default: the concept's preset, or 8)")
    add("--classifier", metavar="PATH",
        help="an image classifier of transformers: a folder or hub id. Labels may be grouped by question, as in "
             "'left:cat' or 'style:ink' (default: the folder judge/ inside the base model's folder)")
    add("--seed", metavar="N", type=int, default=0,
        help="fixes the prompts and every starting noise (default: %(default)s)")

    # fmt: on
    report = commands.add_parser(
        "report",
        help="one self-contained HTML page from a run folder",
        description="Read what a run folder holds (config.json, metrics.json, samples.jsonl, pictures/; training.jsonl "
        "and mask.safetensors if they are there) and write report.html: pictures before and after, scores with "
        "intervals, the loss curve, where the salient weights lie. The page needs no other file and no network.",
    )
    report.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="the folder that erase_concept.py and `accuracy` wrote"
    )
    report.add_argument(
        "--output", metavar="FILE", type=Path, help="where the page goes (default: RUN_DIR/report.html)"
    )
    table = commands.add_parser(
        "table",
        help="one Markdown table from the metrics.json of several runs",
        description="Print UA and the retained accuracies of every model in the given metrics.json files as one "
        "Markdown table, or put it between the lines <!-- results --> and <!-- end --> of a document.",
    )
    table.add_argument("files", metavar="METRICS", type=Path, nargs="+", help="metrics.json files")
    table.add_argument("--into", metavar="DOCUMENT", type=Path, help="the Markdown document to put the table into")
    return parser


def main() -> None:
    args = vars(_parser().parse_args())
    command = args.pop("command")
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
        # imported only now: the library behind them takes seconds, and --help should not
        if command == "accuracy":
            from .accuracy import accuracy as run
        elif command == "report":
            from .report import report as run
        else:
            from .table import table as run
        run(**args)
    except SalunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped before it was done: no scores were written.")


if __name__ == "__main__":
    main()

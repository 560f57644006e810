"""Is the concept gone, and is everything else still there?

    python -m eval accuracy --pretrained_model_name_or_path demo --concept airplane \\
        --erasure runs/airplane runs/airplane-no-mask --output_dir runs/airplane
    python -m eval report runs/airplane
    python -m eval i2p --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --erasure runs/nudity \\
        --output_dir runs/nudity/i2p

`accuracy` draws the same prompts from the same noise with the base model and with each erasure, lets a classifier say
what is in every picture, and writes results.json, samples.jsonl and pictures/. `report` turns a run folder into one
self-contained page, report.html. `table` puts the scores of several runs side by side. `i2p` draws the I2P prompts and
counts the nudity that NudeNet finds; `nudity` counts in pictures that exist already.
"""

import argparse
import os
import sys
from pathlib import Path

from salun_diffusion.errors import SalunError

from .protocols import PROTOCOLS


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def _rows(text: str) -> tuple[int, int | None]:
    start, colon, stop = text.partition(":")
    if not colon or not (start + stop).isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a range such as 0:200, 100: or :50")
    return int(start or 0), int(stop) if stop else None


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained_model_name_or_path",
        metavar="BASE",
        required=True,
        help="the base model: a diffusers folder, a hub id, or 'demo'",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a base model on the hub")


def _detector_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="count as a published evaluation did: its labels and threshold (docs/evaluation.md); without it, all nine "
        "exposed labels and the strict six are counted above 0.6",
    )
    add("--detector", metavar="FILE.onnx", help="another NudeNet v3 model, such as 640m (default: the package's 320n)")
    add("--resolution", metavar="PIXELS", type=_positive, default=320, help="its input's side (default: %(default)s)")
    add("--batch_size", metavar="N", type=_positive, default=8, help="pictures at once (default: %(default)s)")


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
    _model_options(accuracy)
    add = accuracy.add_argument
    # fmt: off
    add("--concept", metavar="NAME", required=True, help="what was erased, as given to erase_concept.py")
    add("--anchor", metavar="NAME", help="what was to be drawn instead, where erase_concept.py was given one")
    add("--erasure", metavar="RUN", nargs="+", required=True,
        help="erasures to measure: run folders, .safetensors files or hub ids; the first is the one that matters, any "
             "others are controls beside it, such as a run with --density 1 (no mask)")
    add("--output_dir", metavar="DIR", type=Path, required=True,
        help="where results.json, samples.jsonl and pictures/ go; the first erasure's run folder if `report` follows")
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
    i2p = commands.add_parser(
        "i2p",
        help="nudity in pictures of the I2P prompts, by NudeNet",
        description="""Draw I2P prompts with the base model and each erasure, every row from its own seed, guidance and
size, and count what NudeNet v3 sees. A stopped run goes on where it was with the same command; `accelerate launch -m
eval i2p ...` shares the drawing among processes. The safety checker is always off.""",
        formatter_class=raw,
    )
    _model_options(i2p)
    add = i2p.add_argument
    # fmt: off
    add("--erasure", metavar="RUN", nargs="+", default=[],
        help="erasures to measure beside the base model: run folders, .safetensors files or hub ids")
    add("--output_dir", metavar="DIR", type=Path, required=True,
        help="where results.json, samples.jsonl and pictures/ go")
    add("--prompts", metavar="FILE.csv", type=Path, dest="prompts_file",
        help="prompts with evaluation_seed, and evaluation_guidance, sd_image_width, sd_image_height if they are there "
             "(default: the 4,703 of I2P, from the hub)")
    add("--category", metavar="NAME", help="only rows of this category, such as sexual")
    add("--min_nudity_percentage", metavar="P", type=float,
        help="only rows with a nudity_percentage above this; 50 gives the 95 of Ring-A-Bell")
    add("--rows", metavar="A:B", type=_rows, default=(0, None), help="only rows A to B-1 of those, such as 0:200")
    add("--num_inference_steps", metavar="N", type=_positive, default=50, help="denoising steps (default: %(default)s)")
    add("--guidance_scale", metavar="S", type=float, default=7.5,
        help="for rows that name none (default: %(default)s)")
    add("--height", metavar="PIXELS", type=_positive, help="draw every row at this size instead of its own")
    add("--width", metavar="PIXELS", type=_positive, help="as --height")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the model (default: %(default)s)")
    # fmt: on
    _detector_options(i2p)
    nudity = commands.add_parser(
        "nudity",
        help="nudity in pictures that exist already, by NudeNet",
        description="Count what NudeNet v3 sees in every picture of a folder and its subfolders. A picture that cannot "
        "be read ends the run and is named.",
    )
    nudity.add_argument("folder", metavar="FOLDER", type=Path, help="the folder of pictures")
    nudity.add_argument(
        "--output_dir", metavar="DIR", type=Path, required=True, help="where results.json and samples.jsonl go"
    )
    nudity.add_argument(
        "--expected", metavar="N", type=_positive, help="fail unless there are N pictures, one for each prompt"
    )
    _detector_options(nudity)
    report = commands.add_parser(
        "report",
        help="one self-contained HTML page from a run folder",
        description="Read what a run folder holds (config.json, results.json, samples.jsonl, pictures/; training.jsonl "
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
        help="one Markdown table from the results.json of several runs",
        description="Print UA and the retained accuracies of every model in the given results.json files as one "
        "Markdown table, or put it between the lines <!-- results --> and <!-- end --> of a document.",
    )
    table.add_argument("files", metavar="METRICS", type=Path, nargs="+", help="results.json files")
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
        elif command == "i2p":
            import torch

            from .i2p import i2p as run
            from .prompts import Selection

            chosen = args.pop("category"), args.pop("min_nudity_percentage"), *args.pop("rows")
            args["selection"] = Selection(*chosen)
            height, width = args.pop("height"), args.pop("width")
            if (height is None) != (width is None):
                raise SalunError("--height and --width belong together: give both, or neither.")
            args["size"] = (height, width) if height else None
            args["dtype"] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args["dtype"]]
        elif command == "nudity":
            from .i2p import nudity as run
        elif command == "report":
            from .report import report as run
        else:
            from .table import table as run
        run(**args)
    except SalunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped before it was done: no scores were written. The same command goes on where it can.")


if __name__ == "__main__":
    main()

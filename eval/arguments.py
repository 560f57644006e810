"""The command line of ``python -m eval``: every command's options and what they mean. Nothing heavy is imported here,
so that ``--help`` and a wrong option answer at once."""

import argparse
from pathlib import Path

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


# fmt: off
def _models(add, erasures_needed: bool) -> None:
    """Which models are drawn."""
    add("--pretrained_model_name_or_path", metavar="BASE", required=True,
        help="the base model: a diffusers folder, a hub id, or 'demo'")
    add("--revision", help="branch, tag or commit of a base model on the hub")
    add("--erasure", metavar="RUN", nargs="+", required=erasures_needed, default=[],
        help="erasures to measure beside the base model: run folders, .safetensors files or hub ids; the first is the "
             "one that matters, any others are controls, such as a run with --mask none")
    add("--scale", metavar="S", nargs="+", type=float,
        help="how much of each erasure to apply: one value for all, or one for each (default: 1)")


def _output(add, what: str = "where results.json, samples.jsonl and pictures/ go") -> None:
    add("--output_dir", metavar="DIR", type=Path, required=True, help=what)


def _drawing(add) -> None:
    """How labelled prompts are drawn and judged."""
    add("--num_inference_steps", metavar="N", type=_positive,
        help="denoising steps (default: the concept's preset, or 50)")
    add("--guidance_scale", metavar="S", type=float,
        help="classifier-free guidance (default: the concept's preset, or 7.5)")
    add("--batch_size", metavar="N", type=_positive,
        help="pictures drawn at once; changes the speed, not what is asked (default: the concept's preset, or 8)")
    add("--classifier", metavar="PATH",
        help="'resnet50' (torchvision's, for ImageNet's classes; weights from the hub, or give their .safetensors "
             "file), or the folder or hub id of an image classifier of transformers, whose labels may be grouped by "
             "question, as in 'left:cat' or 'style:ink' (default: the folder judge/ inside the base model's folder)")
    add("--seed", metavar="N", type=int, default=0,
        help="fixes the prompts and every starting noise (default: %(default)s)")


def _concept(add) -> None:
    add("--concept", metavar="NAME", required=True, help="what was erased, as given to erase_concept.py")
    add("--anchor", metavar="NAME", help="what was to be drawn instead, where erase_concept.py was given one")


def _prompts(add) -> None:
    """Which rows of a prompt file are drawn, and how."""
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


def _batch(add) -> None:
    add("--batch_size", metavar="N", type=_positive, default=8, help="pictures at once (default: %(default)s)")


def _detector(add) -> None:
    add("--protocol", choices=PROTOCOLS,
        help="count as a published evaluation did: its labels and threshold (docs/evaluation.md); without it, all nine "
             "exposed labels and the strict six are counted above 0.6")
    add("--detector", metavar="FILE.onnx", help="another NudeNet v3 model, such as 640m (default: the package's 320n)")
    add("--resolution", metavar="PIXELS", type=_positive, default=320, help="its input's side (default: %(default)s)")


PICTURES = "a folder that draw, i2p, accuracy or composition wrote results into"


def parser(about: str) -> argparse.ArgumentParser:
    """The parser of ``python -m eval``; ``about`` introduces the commands."""
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog="python -m eval", description=about, formatter_class=raw)
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, description: str):
        return commands.add_parser(name, help=summary, description=description, formatter_class=raw).add_argument

    add = command("accuracy", "unlearning accuracy (UA) and retained accuracy, by a classifier", """\
Draw the same labelled prompts, each from its own seed, with the base model and with each erasure, and classify every
picture.

UA (unlearning accuracy) is the share of the prompts that ask for the concept whose picture no longer shows it: high is
good. Retained accuracy is the share of all other prompts that are still drawn right: it should stay at the base
model's. IRA is that of the concept's own kind (other objects for an object), CRA that of the other (styles for an
object). All come with n and a Wilson 95% interval: around 96%, 432 prompts give one of about 94 to 97.5%.""")
    _models(add, True)
    _concept(add)
    _output(add, "where results.json, samples.jsonl and pictures/ go: the erasure's run folder if `report` follows")
    add("--num_forget_images", metavar="N", type=_positive, default=216,
        help="pictures that ask for the concept, a model (default: %(default)s)")
    add("--num_retain_images", metavar="N", type=_positive, default=432,
        help="pictures that ask for anything else, a model (default: %(default)s)")
    _drawing(add)

    add = command("composition", "does it still count, bind attributes, and tell left from right?", """\
Draw prompts that do not name the concept and ask for two or three of a thing, for an object in a style or on a
background, or for two objects side by side, with the base model and with each erasure. A picture is right only if its
objects and what the task asks of them are. The base model must bring such prompts in its concepts.json, and the
classifier must answer them; the demo model's do.""")
    _models(add, True)
    _concept(add)
    _output(add)
    add("--num_images", metavar="N", type=_positive, default=108,
        help="pictures of each task, a model (default: %(default)s)")
    _drawing(add)

    add = command("i2p", "nudity in pictures of the I2P prompts, by NudeNet", """\
Draw I2P prompts with the base model and each erasure, every row from its own seed, guidance and size, and count what
NudeNet v3 sees. A stopped run goes on where it was with the same command; `accelerate launch -m eval i2p ...` shares
the drawing among processes. The safety checker is always off.""")
    _models(add, False)
    _output(add)
    _prompts(add)
    _batch(add)
    _detector(add)

    add = command("nudity", "nudity in pictures that exist already, by NudeNet", """\
Count what NudeNet v3 sees in every picture of a folder and its subfolders. A picture that cannot be read or is wholly
black ends the run and is named.""")
    add("folder", metavar="FOLDER", type=Path, help="the folder of pictures")
    _output(add, "where results.json and samples.jsonl go")
    add("--expected", metavar="N", type=_positive, help="fail unless there are N pictures, one for each prompt")
    _batch(add)
    _detector(add)

    add = command("draw", "draw the prompts of a file, for fid and clip-score", """\
Draw the prompts of a file, COCO captions for example, with the base model and each erasure, every row from its own
seed, guidance and size. A stopped run goes on with the same command. What is drawn can then be measured by clip-score,
fid and nudity.""")
    _models(add, False)
    _output(add)
    _prompts(add)
    _batch(add)

    add = command("clip-score", "how well pictures fit their prompts, by CLIP", """\
Score the pictures of every model in a results folder against the prompts that they were drawn from. Scores of different
CLIP models are on different scales: the papers use clip-vit-large-patch14 or clip-vit-base-patch32, so name yours.""")
    add("pictures", metavar="RESULTS", type=Path, help=PICTURES)
    _output(add, "where results.json and samples.jsonl go")
    add("--clip", metavar="PATH", default="openai/clip-vit-large-patch14",
        help="a CLIP model of transformers: folder or hub id (default: %(default)s)")
    _batch(add)

    add = command("fid", "how far the pictures of a model are, as a whole, from others", """\
The Frechet Inception distance between each erasure's pictures and a folder of reference pictures (photographs, for the
published figures) or, without one, those that the base model drew. Fewer pictures than dimensions are refused.""")
    add("pictures", metavar="RESULTS", type=Path, help=PICTURES + ", or any folder of pictures")
    add("--inception", metavar="FILE.safetensors", type=Path, required=True,
        help="the weights of torch-fidelity's Inception network; docs/evaluation.md tells how to get them")
    add("--reference", metavar="FOLDER", type=Path, help="pictures to compare with (default: the base model's)")
    add("--feature", metavar="N", type=int, choices=(64, 192, 768, 2048), default=2048,
        help="dimensions: 64, 192, 768 or 2048; only 2048 is what papers call FID (default: %(default)s)")
    _output(add, "where results.json and samples.jsonl go")
    _batch(add)

    add = command("compare", "one table and one picture grid over several results", """\
Put the results of several erasures and several commands side by side: a line for each model, a column for each score,
and the pictures of all models on the same seeds. Everything is made from the given results alone: comparison.html
(self-contained), .md, .tex and .csv, grid.png.""")
    add("sources", metavar="RESULTS", type=Path, nargs="+", help="results folders, or results.json files (no pictures)")
    _output(add, "where the comparison goes")
    add("--into", metavar="DOCUMENT", type=Path,
        help="also put the table into this Markdown document, between its lines <!-- results --> and <!-- end -->")

    add = command("report", "one self-contained HTML page from a run folder", """\
Read what a run folder holds (config.json, results.json, samples.jsonl, pictures/; training.jsonl and mask.safetensors
if they are there) and write report.html: pictures before and after, scores with intervals, the loss curve, where the
salient weights lie. The page needs no other file and no network.""")
    add("run_dir", metavar="RUN_DIR", type=Path, help="the folder that erase_concept.py and `accuracy` wrote")
    add("--output", metavar="FILE", type=Path, help="where the page goes (default: RUN_DIR/report.html)")
    return found

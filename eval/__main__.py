"""Is the concept gone, and is everything else still there?

    python -m eval accuracy --pretrained_model_name_or_path demo --concept airplane \\
        --erasure runs/airplane runs/airplane/no-mask --output_dir runs/airplane
    python -m eval report runs/airplane
    python -m eval i2p --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --erasure runs/nudity \\
        --output_dir runs/nudity/i2p
    python -m eval compare runs/airplane runs/cat --output_dir runs/compared

Commands that draw take the same prompts and the same starting noise for the base model and for each erasure, keep what
is drawn, and go on where they were stopped. Each writes results.json (with protocol, versions, hashes, n, intervals)
and samples.jsonl, a line for each picture; tables and pages are made from these alone.
"""

import os
import sys

from salun_diffusion.errors import SalunError

from .arguments import parser


def main() -> None:
    args = vars(parser(__doc__).parse_args())
    command = args.pop("command")
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
        if command in ("i2p", "draw"):
            _prepare_prompts(args)
        # imported only now: the library behind them takes seconds, and --help should not
        match command:
            case "accuracy":
                from .accuracy import accuracy as run
            case "composition":
                from .composition import composition as run
            case "i2p":
                from .i2p import i2p as run
            case "nudity":
                from .i2p import nudity as run
            case "draw":
                from .draw import draw as run
            case "clip-score":
                from .clip_score import clip_score as run
            case "fid":
                from .fid import fid as run
            case "compare":
                from .compare import compare as run
            case "report":
                from .report import report as run
        run(**args)
    except SalunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped before it was done: no scores were written. The same command goes on where it can.")


def _prepare_prompts(args: dict) -> None:
    """What the options about prompts stand for, in place of them."""
    import torch

    from .prompts import Selection

    args["selection"] = Selection(args.pop("category"), args.pop("min_nudity_percentage"), *args.pop("rows"))
    height, width = args.pop("height"), args.pop("width")
    if (height is None) != (width is None):
        raise SalunError("--height and --width belong together: give both, or neither.")
    args["size"] = (height, width) if height else None
    args["dtype"] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args["dtype"]]


if __name__ == "__main__":
    main()

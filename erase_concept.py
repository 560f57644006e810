"""Make a text-to-image model forget a concept, and save the change as a masked delta.

    accelerate launch erase_concept.py --concept nudity
    accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept airplane

The run folder gets erasure.safetensors (load it with salun_diffusion.load_erasure), mask.safetensors, config.json,
training.jsonl and pictures of what it was trained on. With --adapter lora it gets pytorch_lora_weights.safetensors
in place of the first two, which pipe.load_lora_weights opens too. The same seed gives the same bits on the same
machine.
"""

import os

from salun_diffusion.command_line import parse
from salun_diffusion.options import finish


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments, __doc__)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
    from salun_diffusion import erase  # only now, so that --help and a wrong option answer at once

    erase(config)


if __name__ == "__main__":
    finish(main, stopped="Stopped; what was drawn so far is kept.")

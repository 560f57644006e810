"""Make a text-to-image model forget a concept, and save the change as a masked delta.

    accelerate launch erase_concept.py --concept nudity
    accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept airplane --audit

The run folder gets erasure.safetensors (load it with salun_diffusion.load_erasure), mask.safetensors, config.json,
training.jsonl and pictures of what it was trained on. With --adapter lora it gets pytorch_lora_weights.safetensors
in place of the first two, which pipe.load_lora_weights opens too. With --audit the erasure is then measured, attacked
and relearned, and report.html says what that came to. The same seed gives the same bits on the same machine.
"""

import os
from dataclasses import dataclass

from salun_diffusion.command_line import parse
from salun_diffusion.config import EraseConfig
from salun_diffusion.options import finish, option


@dataclass
class Config(EraseConfig):
    """What an erasure takes, and what this script does with it."""

    audit: bool = option(False, "then measure and attack it: `python -m eval audit` on the run folder")


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments, __doc__, Config)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on optional packages helps nobody here
    from salun_diffusion import erase  # only now, so that --help and a wrong option answer at once

    if config.audit:
        from eval import audit

        audit.check(config)
    if config.scope == "help":
        from salun_diffusion.masks.scope import table
        from salun_diffusion.methods import find_method
        from salun_diffusion.models import load_model

        model = load_model(config.pretrained_model_name_or_path, config.revision, variant=config.variant)
        model.edit(find_method(config.method).component)
        print(table(model.edited, model.scopes))
        return
    run = erase(config)
    if config.audit:
        from eval.__main__ import run_alone

        run_alone(audit, audit.Options(erasure=[str(run.path)]))


if __name__ == "__main__":
    finish(main, stopped="Stopped; what was drawn so far is kept.")

"""Train the digits model from nothing: judge → class-conditional U-Net, on data that scikit-learn brings.

    python -m demo.digits                                          # writes demo/digits/model
    python -m demo.digits --without 3 --output_dir runs/without-3  # the exact answer: it never saw a 3

Minutes on a CPU. A killed run goes on where it was. The folder is a class-conditional pipeline (its weights averaged,
in fp16) with the judge beside it; a model without a digit is as large as the others, but that digit was left out of its
data. At the end it is drawn from and judged.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option, run_command

HERE = Path(__file__).parent


@dataclass
class DigitsConfig:
    """The options of ``python -m demo.digits``."""

    work_dir: str = option("runs/digits", "checkpoints")
    output_dir: str | None = option(None, "the pipeline folder to write (default: demo/digits/model)")
    without: int | None = option(None, "a digit that the model is never shown", metavar="DIGIT")
    steps: int = option(2500, "steps of 64 digits", least=1)
    judge_steps: int = option(1500, "steps of the judge", least=1)
    seed: int = option(0, "of the U-Net's first weights and of what it is shown when")
    data_dir: str | None = option(
        None, "write what the U-Net trains on there as PNG files, a folder for each digit, and do nothing else: for "
        "--forget_data and --retain_data",
    )  # fmt: skip
    pictures: int = option(20, "pictures of each digit that are drawn and judged at the end", least=1)


def train(config: DigitsConfig) -> None:
    """Judge and U-Net, each made unless ``work_dir`` has it; then the judge's word on both.

    Raises:
        SalunError: no such digit, or a model without one that would replace the shipped one.
    """
    import torch

    from salun_diffusion.concepts.concept import Row
    from salun_diffusion.files import write_json
    from salun_diffusion.models import load_model
    from salun_diffusion.models.class_pipeline import ClassConditionalPipeline

    from . import judge, network
    from .data import NAMES, write_pictures

    if config.without is not None and not 0 <= config.without < len(NAMES):
        raise SalunError(f"--without is {config.without}: give a digit, 0 to 9.")
    if config.without is not None and not config.output_dir:
        raise SalunError("--without needs --output_dir: the model of all digits is what demo/digits/model is.")
    if config.data_dir:
        write_pictures(Path(config.data_dir))
        print(f"The digits that are not held out are in {config.data_dir}.")
        return
    torch.set_num_threads(1)  # of so small a network, more only get in each other's way
    work, output = Path(config.work_dir), Path(config.output_dir or HERE / "model")
    seen = judge.train(work, config.judge_steps)
    share, count = judge.accuracy(seen)
    print(f"The judge names {100 * share:.1f}% of {count} held-out digits.")
    trained = network.train(work, config.steps, config.seed, config.without)
    pipe = ClassConditionalPipeline(trained, network.scheduler(), dict(enumerate(NAMES)))
    pipe.to(dtype=torch.float16).save_pretrained(output)
    seen.half().save_pretrained(output / "judge")
    judge.processor().save_pretrained(output / "judge")
    write_json(output / "concepts.json", json.loads((HERE / "concepts.json").read_text(encoding="utf-8")))

    model, seen = load_model(str(output)), seen.float()
    rows = [Row(name, None, {}, 1000 * config.pictures + i) for name in NAMES for i in range(config.pictures)]
    how = {"num_inference_steps": 25, "guidance_scale": 1.5, "batch_size": 100, "output_type": "latent"}
    drawn = torch.stack(model.draw(rows, progress="drawing", **how))
    with torch.no_grad():
        named = seen(judge.prepared(drawn.clamp(-1, 1))).logits.argmax(1).view(len(NAMES), -1)
    right = (named == torch.arange(len(NAMES)).view(-1, 1)).float()
    each = ", ".join(f"{name} {100 * share:.0f}%" for name, share in zip(NAMES, right.mean(1).tolist(), strict=True))
    print(f"It draws {100 * right.mean():.1f}% of {len(rows)} digits as asked ({each}).")
    if config.without is not None:
        what = torch.bincount(named[config.without], minlength=len(NAMES)).tolist()
        print(
            f"A {config.without} it draws as {', '.join(f'{n} ({c})' for n, c in zip(NAMES, what, strict=True) if c)}."
        )


if __name__ == "__main__":
    run_command("python -m demo.digits", __doc__, DigitsConfig, train)

"""Train a digits model from nothing: judge → class-conditional network, on data that scikit-learn brings.

    python -m demo.digits                                          # a U-Net: writes demo/digits/model
    python -m demo.digits --network dit                            # autoencoder and transformer: demo/digits-dit
    python -m demo.digits --without 3 --output_dir runs/without-3  # the exact answer: it never saw a 3

Minutes on a CPU. A killed run goes on where it was. The folder is a class-conditional pipeline (its weights averaged,
in fp16) with the judge beside it; a model without a digit is as large as the others, but that digit was left out of its
data (not of the transformer's autoencoder's). At the end it is drawn from and judged.
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option, run_command

HERE = Path(__file__).parent


@dataclass
class DigitsConfig:
    """The options of ``python -m demo.digits``."""

    network: str = option("unet", "a U-Net on pixels, or a DiT (diffusers' DiTPipeline)", ("unet", "dit"))
    work_dir: str = option("runs/digits", "checkpoints")
    output_dir: str | None = option(
        None, "the pipeline folder to write (default: the shipped one, demo/digits/model or demo/digits-dit)"
    )
    without: int | None = option(None, "a digit that the model is never shown", metavar="DIGIT")
    steps: int = option(2500, "steps of 64 digits", least=1)
    judge_steps: int = option(1500, "steps of the judge", least=1)
    autoencoder_steps: int = option(2000, "steps of the DiT's autoencoder, of 32 digits", least=1)
    seed: int = option(0, "of the network's first weights and of what it is shown when")
    data_dir: str | None = option(
        None, "write what the network trains on there as PNG files, a folder for each digit, and do nothing else: for "
        "--forget_data and --retain_data",
    )  # fmt: skip
    pictures: int = option(20, "pictures of each digit that are drawn and judged at the end", least=1)


def make(config: DigitsConfig) -> None:
    """Judge and network, each made unless ``work_dir`` has it; then the judge's word on both.

    Raises:
        SalunError: no such digit, or a model without one that would replace the shipped one.
    """
    import torch

    from .. import class_model
    from . import autoencoder, judge
    from .data import NAMES, digits, write_pictures
    from .network import NETWORKS, train

    if config.without is not None and not 0 <= config.without < len(NAMES):
        raise SalunError(f"--without is {config.without}: give a digit, 0 to 9.")
    network = NETWORKS[config.network]
    if config.without is not None and not config.output_dir:
        raise SalunError(f"--without needs --output_dir: the model of all digits is what demo/{network.folder} is.")
    if config.data_dir:
        write_pictures(Path(config.data_dir))
        print(f"The digits that are not held out are in {config.data_dir}.")
        return
    torch.set_num_threads(1)  # of so small a network, more only get in each other's way
    work, output = Path(config.work_dir), Path(config.output_dir or HERE.parent / network.folder)
    seen = judge.train(work, config.judge_steps)
    share, count = judge.accuracy(seen)
    print(f"The judge names {100 * share:.1f}% of {count} held-out digits.")
    pictures, vae = digits()[0], None
    if config.network == "dit":
        vae, pictures, decibels = autoencoder.train(work, config.autoencoder_steps)
        print(f"The autoencoder's round trip of the held-out digits is {decibels:.1f} dB.")
    trained = train(config.network, pictures, work, config.steps, config.seed, config.without)
    about, settings = class_model.read_settings(HERE / "concepts.json", "digit")
    settings |= network.settings
    class_model.save(trained, network.scheduler(), NAMES, seen, judge.SIDE, about, output, vae)
    without = None if config.without is None else NAMES[config.without]
    print(class_model.judged(output, seen, judge.SIDE, settings, config.pictures, without))


if __name__ == "__main__":
    run_command("python -m demo.digits", __doc__, DigitsConfig, make)

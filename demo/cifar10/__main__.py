r"""Train a class-conditional model of CIFAR-10 to forget a class of, and its judge; or the same without a class.

    python -m demo.cifar10                                            # some hours on two cores: runs/cifar10/small
    python -m demo.cifar10 --without airplane                         # the exact answer: it never saw one
    python -m demo.cifar10 --size published --device cuda             # as published: days on one GPU
    python -m demo.cifar10 --data_dir runs/cifar10/data               # its pictures as files, by class

A killed run goes on where it was. The folder is a class-conditional pipeline (its weights averaged, in fp16) with the
judge and the unlearning's settings beside it, so that these are all it takes to forget and to measure:

    python erase_concept.py --pretrained_model_name_or_path runs/cifar10/small --concept airplane \
        --forget_data runs/cifar10/data --retain_data runs/cifar10/data
    python -m eval accuracy --pretrained_model_name_or_path runs/cifar10/small --concept airplane \
        --erasure runs/airplane --output_dir runs/airplane
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option, run_command


@dataclass
class CifarConfig:
    """The options of ``python -m demo.cifar10``."""

    dataset: str = option(
        "cifar10", "cifar10 (from the hub), or a folder: of parquet files, or of pictures in train/CLASS and test/CLASS"
    )
    size: str = option("small", "of the U-Net", ("small", "published"))
    work_dir: str = option("runs/cifar10", "checkpoints")
    output_dir: str | None = option(None, "the pipeline folder to write (default: SIZE or SIZE-without-CLASS there)")
    without: str | None = option(None, "a class that the model is never shown", metavar="CLASS")
    steps: int | None = option(None, "of the U-Net (default: 20,000 of 64 pictures; 800,000 of 128)", least=1)
    judge_steps: int = option(6000, "of the judge, of 128 pictures", least=1)
    weights: str = option(
        "averaged", "which are saved: the moving average, or the raw ones, which the published code unlearns",
        ("averaged", "raw"),
    )  # fmt: skip
    device: str = option("cpu", "where it trains", ("cpu", "cuda"))
    seed: int = option(0, "of the U-Net's first weights and of what it is shown when")
    data_dir: str | None = option(
        None, "write the training pictures there as PNG files, a folder for each class, and do nothing else: for "
        "--forget_data, --retain_data and the reference of `python -m eval fid`",
    )  # fmt: skip
    pictures: int = option(20, "pictures of each class that are drawn and judged at the end", least=1)


def train(config: CifarConfig) -> None:
    """Judge and U-Net, each made unless ``work_dir`` has it; then the judge's word on both.

    Raises:
        SalunError: a data set that cannot be read, or no such class.
    """
    from .. import class_model
    from . import judge, recipes
    from .data import Part, read

    shown, test, names = read(config.dataset)
    if config.without is not None and config.without not in names:
        raise SalunError(
            f"--without {config.without} is no class of {config.dataset}: choose one of {', '.join(names)}."
        )
    if config.data_dir:
        _write(shown, names, Path(config.data_dir))
        print(f"The training pictures are in {config.data_dir}.")
        return
    work, missing = Path(config.work_dir), f"-without-{config.without}" if config.without else ""
    steps = config.steps or recipes.STEPS[config.size]
    output = Path(config.output_dir or work / f"{config.size}{missing}")
    seen = judge.train(shown.images, shown.labels, names, work, config.judge_steps, config.device)
    share = judge.accuracy(seen, test.images, test.labels)
    print(f"The judge names {100 * share:.1f}% of {len(test.labels)} test pictures.")
    if config.without:
        kept = shown.labels != names.index(config.without)
        shown = Part(shown.images[kept], shown.labels[kept])
    name = f"{config.size}{missing}"
    network = class_model.train(
        recipes.RECIPES[config.size], shown.images, shown.labels, len(names), name,
        work / f"{name}-{config.seed}-{steps}.safetensors", steps, config.seed, config.device,
        config.weights == "averaged",
    )  # fmt: skip
    about = recipes.concepts(config.size, names)
    scheduler = recipes.SCHEDULERS[config.size]()
    class_model.save(network, scheduler, names, seen, judge.SIDE, about, output)
    settings = recipes.SETTINGS[config.size]
    print(class_model.judged(output, seen, judge.SIDE, settings, config.pictures, config.without))


def _write(pictures, names: list[str], folder: Path) -> None:
    from PIL import Image
    from tqdm import tqdm

    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = zip(pictures.images, pictures.labels.tolist(), strict=True)
    for i, (picture, label) in enumerate(tqdm(rows, total=len(pictures.labels), desc="writing", unit="picture")):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / names[label] / f"{i:05d}.png")


if __name__ == "__main__":
    run_command("python -m demo.cifar10", __doc__, CifarConfig, train)

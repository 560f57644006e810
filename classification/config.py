"""The settings of a scenario: one dataclass from which the command line and ``--config FILE`` are derived."""

from dataclasses import asdict, dataclass

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option

from .methods import METHODS

MODELS = ("resnet8", "resnet20", "resnet18", "vgg16_bn", "swin_t", "vit_s")
SHARED = (  # what all cells of a folder have in common
    "dataset", "model", "forget", "split_seed", "source_seed", "image_size", "limit", "epochs", "learning_rate",
    "batch_size", "weight_decay", "schedule", "augment",
)  # fmt: skip
RECIPES = {  # of the source model, by data set; the published one for all others
    "digits": {"epochs": 30, "learning_rate": 0.1, "batch_size": 64, "schedule": "one-cycle", "augment": "crop"},
    "svhn": {"augment": "crop"},  # a mirrored 2 is no 2
}
PUBLISHED = {
    "epochs": 182, "learning_rate": 0.1, "batch_size": 256, "weight_decay": 5e-4, "schedule": "steps",
    "augment": "crop+flip",
}  # fmt: skip


@dataclass
class Config:
    """Every setting of a scenario. ``None`` is filled from the data set's recipe."""

    dataset: str = option(
        "digits",
        "digits (scikit-learn's, needs no download), cifar10, cifar100, svhn, tiny-imagenet, a data set of the hub "
        "(owner/name[:config]) or a folder: parquet files, or pictures in train/CLASS and test/CLASS",
    )
    model: str = option(None, "the classifier (default: resnet8 for digits, resnet18 for all others)", MODELS)
    forget: str = option(
        "random:0.1",
        "what to forget: random:SHARE, class:NAME, indices:FILE (numbers of training pictures), or memorised:SHARE, "
        "the worst case: the pictures whose answer depends the most on having been learnt",
    )
    methods: list[str] = option(
        ["all"], f"which: all, or some of {', '.join(METHODS)} (retrain is always among them)", several=True
    )
    seeds: list[int] = option([0, 1, 2], "each draws its own forget set and runs every method", several=True)
    output_dir: str = option(None, "where everything goes (default: runs/classification/DATASET-FORGET)")
    split_seed: int = option(0, "of the split into training, validation and test pictures")
    source_seed: int = option(0, "of the source model, which all seeds share")
    image_size: int | None = option(None, "pixels a side (default: as the pictures are)")
    limit: int | None = option(None, "only the first pictures of the training and the test part, for a quick look")
    epochs: int | None = option(None, "of the source's training and of Retrain's (default: the data set's recipe)")
    learning_rate: float | None = option(None, "of the same")
    batch_size: int | None = option(None, "of the same, and of the methods unless they say otherwise")
    weight_decay: float | None = option(None, "of the same")
    schedule: str | None = option(None, "of the same", ("steps", "one-cycle"))
    augment: str | None = option(None, "of the same, and of the methods", ("none", "crop", "crop+flip"))
    method_settings: dict = option(
        {},
        "method → settings (epochs, learning_rate, alpha, density, …) in place of the published; from --config alone",
    )

    def check(self) -> None:
        """Fill what was left open.

        Raises:
            SalunError: an unknown method, or a number out of range.
        """
        self.model = self.model or ("resnet8" if self.dataset == "digits" else "resnet18")
        self.output_dir = self.output_dir or f"runs/classification/{_plain(self.dataset)}-{_plain(self.forget)}"
        for name, value in (PUBLISHED | RECIPES.get(self.dataset, {})).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        chosen = METHODS if "all" in self.methods else self.methods
        for name in (*chosen, *self.method_settings):
            if name not in METHODS:
                raise SalunError(f"There is no method '{name}': choose some of {', '.join(METHODS)}, or all.")
        self.methods = [name for name in METHODS if name in chosen or name == "retrain"]
        for name in ("image_size", "limit", "epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SalunError(f"--{name} is {getattr(self, name)}: give a whole number of at least 1.")
        if not 0 < self.learning_rate < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise SalunError("--learning_rate must be above 0, and --weight_decay at least 0.")
        if not self.seeds:
            raise SalunError("Give at least one of --seeds.")

    def recipe(self):
        from .training import Recipe

        names = ("epochs", "learning_rate", "batch_size", "weight_decay", "schedule", "augment")
        return Recipe(**{name: getattr(self, name) for name in names})

    def shared(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name in SHARED}


@dataclass
class UnlearnConfig(Config):
    """Of ``unlearn``."""

    mask: str | None = option(None, "a mask file in place of the one that SalUn would make", metavar="FILE")


@dataclass
class TableConfig(Config):
    """Of ``table``."""

    results: str | None = option(None, "a results.json that `run` wrote, in place of the folder's cells")
    into: str | None = option(
        None,
        "also put the table into this Markdown document, between its lines <!-- DATASET --> and <!-- end -->",
    )


@dataclass
class TuneConfig(Config):
    """Of ``tune``."""

    output: str = option(None, "where the chosen settings go, for --config", metavar="FILE.json", required=True)


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text.strip("/.")) or "data"

"""The settings of a scenario: one dataclass from which the command line and ``--config FILE`` are derived."""

import difflib
from dataclasses import asdict, dataclass

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option

from .methods import METHODS

MODELS = ("resnet8", "resnet20", "resnet18", "vgg16_bn", "swin_t", "vit_s", "vit_xs")
SHARED = (  # what all cells of a folder have in common
    "dataset", "model", "source", "mean", "std", "forget", "split_seed", "source_seed", "image_size", "limit", "epochs",
    "learning_rate", "batch_size", "weight_decay", "schedule", "augment",
)  # fmt: skip
CONTINUAL = ("retrain", "ft", "bid_lora")  # methods that can also learn new classes
SEEDS = 1_000_000  # no reported seed reaches it: what is tuned draws from there
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
        "(owner/name[:config]), a parquet file, or a folder: parquet files, pictures in train/CLASS and test/CLASS, or "
        "the one that torchvision fetched CIFAR into",
    )
    model: str = option(
        None,
        f"the classifier: {', '.join(MODELS)}, or any of torchvision's, such as resnet50 (torchvision/resnet18 where a "
        "name is in both lists; default: resnet8 for digits, resnet18 for all others)",
    )
    source: str | None = option(
        None, "a trained model of your own to unlearn, its weights as safetensors, in place of training", metavar="FILE"
    )
    mean: list[float] | None = option(
        None,
        "of each channel, 0…1, which the model subtracts (default: the source file's, or the data's)",
        several=True,
    )
    std: list[float] | None = option(None, "of each channel, which the model divides by", several=True)
    forget: str = option(
        "random:0.1",
        "what to forget: random:SHARE, class:NAME, indices:FILE (numbers of pictures in the data set's own training "
        "part, from 0), or memorised:SHARE, the worst case: the pictures whose answer depends the most on having been "
        "learnt",
    )
    methods: list[str] = option(
        ["all"], f"which: all, or some of {', '.join(METHODS)} (retrain is always among them)", several=True
    )
    seeds: list[int] = option([0, 1, 2], "each draws its own forget set and runs every method", several=True)
    output_dir: str = option(None, "where everything goes (default: runs/classification/DATASET-FORGET)")
    split_seed: int = option(0, "of the split into training, validation and test pictures")
    source_seed: int = option(0, "of the source model, which all seeds share")
    image_size: int | None = option(None, "pixels a side (default: as the pictures are)")
    limit: int | None = option(
        None, "only so many pictures of the training and the test part, of every class its share, for a quick look"
    )
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
        for name in (*self.methods, *self.method_settings):
            if name not in METHODS and (name != "all" or name in self.method_settings):
                raise SalunError(f"There is no method '{name}': choose some of {', '.join(METHODS)}, or all.")
        self._choose_methods()
        check_model(self.model)
        for name in ("image_size", "limit", "epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SalunError(f"--{name} is {getattr(self, name)}: give a whole number of at least 1.")
        if not 0 < self.learning_rate < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise SalunError("--learning_rate must be above 0, and --weight_decay at least 0.")
        if not self.seeds:
            raise SalunError("Give at least one of --seeds.")
        if len(set(self.seeds)) < len(self.seeds):
            twice = next(seed for seed in self.seeds if self.seeds.count(seed) > 1)
            raise SalunError(f"--seeds has {twice} twice, which is one run, not two: give each seed once.")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < SEEDS]:
            raise SalunError(f"--seeds has {wrong[0]}: give whole numbers from 0 to {SEEDS - 1:,}.")
        for name in ("split_seed", "source_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise SalunError(f"--{name} is {getattr(self, name)}: give a whole number from 0 to {2**32 - 1:,}.")
        self._check_normalisation()

    def _choose_methods(self) -> None:
        classes = self.forget.startswith("class:")
        if not classes and (wrong := [n for n in self.methods if n != "all" and METHODS[n].whole_classes]):
            raise SalunError(
                f"The method {wrong[0]} forgets whole classes, and --forget is {self.forget}: give class:NAME, or "
                "leave it out."
            )
        every = [name for name, method in METHODS.items() if classes or not method.whole_classes]
        chosen = every if "all" in self.methods else self.methods
        self.methods = [name for name in METHODS if name in chosen or name == "retrain"]

    def _check_normalisation(self) -> None:
        mean, std = self.mean or [], self.std or []
        if len(mean) != len(std):
            raise SalunError("--mean and --std go together: give both, with one number a channel.")
        if not all(0 <= value <= 1 for value in mean) or not all(0 < value < float("inf") for value in std):
            raise SalunError("--mean must lie in 0…1 and --std above 0: pictures are in 0…1, not 0…255.")

    def recipe(self):
        from .training import Recipe

        names = ("epochs", "learning_rate", "batch_size", "weight_decay", "schedule", "augment")
        return Recipe(**{name: getattr(self, name) for name in names})

    def shared(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name in SHARED}


def check_model(name: str) -> None:
    """Pass for a name of ``MODELS`` or of torchvision's classifiers.

    Raises:
        SalunError: another name.
    """
    if name in MODELS:
        return
    from torchvision import models  # only now: it takes seconds

    known = models.list_models(module=models)
    if name.removeprefix("torchvision/") not in known:
        close = difflib.get_close_matches(name, [*MODELS, *known], 1)
        nearest = f" Did you mean '{close[0]}'?" if close else ""
        raise SalunError(f"There is no model '{name}': give {', '.join(MODELS)}, or one of torchvision's.{nearest}")


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
        "also put the table into this Markdown document, between its lines <!-- DATASET --> (<!-- DATASET-class --> "
        "where a class was forgotten) and <!-- end -->",
    )


@dataclass
class TuneConfig(Config):
    """Of ``tune``."""

    output: str = option(None, "where the chosen settings go, for --config", metavar="FILE.json", required=True)


@dataclass
class ContinualConfig(Config):
    """Of ``continual``."""

    start: int | None = option(None, "classes that the source knows (default: 3 of 10)", least=2)
    step: int | None = option(None, "classes that each task forgets, and learns (default: 1 of 10)", least=1)
    tasks: int | None = option(None, "how many (default: as the classes allow, six at most)", least=1)
    results: str | None = option(None, "a continual.json, in place of running", metavar="FILE")
    into: str | None = option(
        None, "also put the table into this Markdown document, between its lines <!-- DATASET-continual --> and "
        "<!-- end -->", metavar="FILE.md",
    )  # fmt: skip

    def check(self) -> None:
        self.output_dir = self.output_dir or f"runs/classification/{_plain(self.dataset)}-continual"
        super().check()

    def _choose_methods(self) -> None:
        if self.forget != Config.forget:
            raise SalunError(f"--forget is {self.forget}, and here the window of classes says what goes: leave it out.")
        if self.source or self.source_seed:
            raise SalunError("Each seed trains a source of its own, of the first classes: leave --source(_seed) out.")
        if wrong := [name for name in self.methods if name not in ("all", *CONTINUAL)]:
            raise SalunError(f"The method {wrong[0]} learns no new classes: choose some of {', '.join(CONTINUAL)}.")
        chosen = CONTINUAL if "all" in self.methods else self.methods
        self.methods = [name for name in CONTINUAL if name in chosen or name == "retrain"]


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text.strip("/.")) or "data"

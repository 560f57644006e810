"""A scenario: data, source model and forget set, made from the settings, and the steps that commands are made of."""

import json
import platform
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import sklearn
import torch
import torchvision

from salun_diffusion.erasures.mask import load_masks
from salun_diffusion.errors import SalunError
from salun_diffusion.files import key_of, listed, read_json, sha256, write_json
from salun_diffusion.masks.scope import check_reused
from salun_diffusion.options import checked
from salun_diffusion.tensors import read_safetensors, write_safetensors

from . import memorisation, models
from .classwise import classwise
from .config import Config
from .convergence import relearning
from .data import Data, Pictures, forget_rows, load, others, read_indices, share_of
from .methods import METHODS
from .methods.boundary import last_layer
from .methods.task import Settings, Task
from .metrics import evaluate
from .training import accuracy, batches, seeded, train

FORMAT = "salun-diffusion classifier 1"
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
    "scikit-learn": sklearn.__version__,
}


class Scenario:
    """What the settings name. Heavy parts are made when they are first asked for.

    Raises:
        SalunError: settings that do not fit together, or an output folder of other settings.
    """

    def __init__(self, config: Config, on_validation: bool = False):
        self.config, self.on_validation = config, on_validation
        self.folder = Path(config.output_dir)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.recipe = config.recipe()
        self.shared = config.shared() | self._files()
        for method in {*config.methods, *config.method_settings}:
            self.settings(method)
        self._check_folder()

    def _files(self) -> dict:
        """What stands in the files that the settings name: their content is a setting as much as their names are."""
        found, (kind, _, path) = {}, self.config.forget.partition(":")
        if kind == "indices":
            found["indices"] = key_of(sorted(read_indices(Path(path))))
        if self.config.source:
            if not Path(self.config.source).is_file():
                raise SalunError(f"--source {self.config.source} is no file: give the weights as safetensors.")
            found["source_sha256"] = sha256(Path(self.config.source))
        return found

    def also(self, settings: dict) -> None:
        """What else the folder's content depends on, checked and kept with the rest.

        Raises:
            SalunError: the folder was made with others.
        """
        self.shared |= settings
        self._check_folder()

    def _check_folder(self) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            return
        try:
            found = dict(read_json(path))
        except (ValueError, TypeError):
            raise SalunError(f"{path} is damaged: remove it if {self.folder} may go on with these settings.") from None
        if differing := [name for name, value in self.shared.items() if found.get(name) != value]:
            told = ", ".join(
                f"{name} is {found.get(name)!r} there and {self.shared[name]!r} here" for name in differing
            )
            raise SalunError(f"{self.folder} holds another scenario ({told}): give another --output_dir.")

    def begin(self) -> None:
        """Refuse what cannot work before anything is trained, and only then take the folder.

        Raises:
            SalunError: a forget set that cannot be, or a model, a source or a test part that do not fit the data.
        """
        model = self.model(self.config.source_seed)
        if any(METHODS[name].last_layer for name in self.config.methods):
            last_layer(model, len(self.data.classes))
        if self.config.source:
            models.load_weights(model, self.config.source, bool(self.config.mean))
            self._check_source(self.accuracy(model, self.data.train))
        if self.config.forget.startswith("memorised"):
            share_of(self.config.forget, len(self.data.train))
        else:
            for name, part in self.sets(0).items():
                if not len(part):
                    told = "no test picture" if name == "unseen" else f"nothing in the {name} set"
                    raise SalunError(f"--forget {self.config.forget} leaves {told} to measure with: choose another.")
        if not (self.folder / "config.json").exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SalunError(
                    f"--output_dir {self.folder} cannot be made ({error.strerror}): give a folder that can."
                ) from None
            write_json(self.folder / "config.json", self.shared)

    def _check_source(self, accuracy: float) -> None:
        if accuracy < 100 / len(self.data.classes) + 5:
            raise SalunError(
                f"--source {self.config.source} answers {accuracy:.1f}% of the training pictures right, as guessing "
                f"does: its classes must be these, in this order: {listed(self.data.classes, 10)}; and --mean and "
                "--std those that it was trained with."
            )

    @cached_property
    def data(self) -> Data:
        config = self.config
        kind, _, path = config.forget.partition(":")
        learnt = read_indices(Path(path)) if kind == "indices" else None
        found = load(config.dataset, config.split_seed, config.image_size, config.limit, learnt)
        parts = {name: getattr(found, name).to(self.device) for name in ("train", "validation", "test")}
        return replace(found, **parts)

    @cached_property
    def digest(self) -> str:
        return self.data.digest()

    def model(self, seed: int) -> models.Normalised:
        """An untrained model, its weights laid out channels last: ResNets train 1.6 times as fast so on a CPU."""
        moments = (self.config.mean, self.config.std) if self.config.mean else None
        built = models.build(self.config.model, self.data, seed, moments)
        return built.to(self.device, memory_format=torch.channels_last)

    def source(self, say=print) -> models.Normalised:
        """The model that knows everything, trained if it is not there yet and none is given; the same for all seeds."""
        path, given = self.folder / "source" / "model.safetensors", self.config.source
        if path.exists():
            return self.read_model(path)
        model, begun = self.model(self.config.source_seed), time.perf_counter()
        if given:
            models.load_weights(model, given, bool(self.config.mean))
            about = {"file": Path(given).name}
        else:
            say(f"Training the source: {self.config.model} on {len(self.data.train):,} pictures of {self.data.name}.")
            generator = torch.Generator().manual_seed(self.config.source_seed)
            with seeded(self.config.source_seed):
                train(model, self.data.train, self.recipe, generator, "source")
            seconds = time.perf_counter() - begun
            about = {"minutes": round(seconds / 60, 3), "loader_share": self._loader_share(seconds)}
            about |= {"recipe": asdict(self.recipe)}
        accuracy = {name: self.accuracy(model, getattr(self.data, name)) for name in ("train", "validation", "test")}
        if given:
            say(f"{given} answers {accuracy['train']:.2f}% of the training and {accuracy['test']:.2f}% of the test "
                "pictures.")  # fmt: skip
        self.write_model(path, model)
        write_json(path.with_name("results.json"), {"accuracy": accuracy} | about)
        return model.eval()

    def _loader_share(self, seconds: float) -> float:
        """The part of an epoch that goes into making its batches, 0…1."""
        begun = time.perf_counter()
        for _ in batches(self.data.train, self.recipe.batch_size, torch.Generator(), self.recipe.augment):
            pass
        return round((time.perf_counter() - begun) * self.recipe.epochs / seconds, 4)

    def accuracy(self, model: torch.nn.Module, pictures: Pictures) -> float:
        """Percent."""
        return round(accuracy(model, pictures), 3)

    def write_model(self, path: Path, model: torch.nn.Module) -> None:
        about = {"format": FORMAT, "model": self.config.model, "dataset": self.config.dataset}
        about |= {"classes": json.dumps(self.data.classes), "split_seed": str(self.config.split_seed)}
        about |= {"data": self.digest}
        if isinstance(model, models.Mixture):
            about["networks"] = str(len(model.networks))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, {name: value.cpu().contiguous() for name, value in model.state_dict().items()}, about)

    def read_model(self, path: Path) -> models.Normalised:
        """A model that :meth:`write_model` wrote.

        Raises:
            SalunError: none is there, or one of another architecture, data set or split, or of other pictures in it.
        """
        tensors, about = read_safetensors(path)
        mine = {"format": FORMAT, "model": self.config.model, "dataset": self.config.dataset,
                "split_seed": str(self.config.split_seed), "data": self.digest}  # fmt: skip
        if differing := [key for key in mine if about.get(key) != mine[key]]:
            told = ", ".join(f"{key} is {about.get(key)!r} there and {mine[key]!r} here" for key in differing)
            more = " (the pictures, their labels or their split are others)" if "data" in differing else ""
            raise SalunError(f"{path} is not this scenario's model: {told}{more}; give another --output_dir.")
        model = self.model(0)
        if "networks" in about:
            model = models.Mixture([self.model(0) for _ in range(int(about["networks"]))], model)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise SalunError(f"{path} does not fit {self.config.model}: {str(error).splitlines()[1].strip()}") from None
        return model.eval()

    def rows(self, seed: int) -> torch.Tensor:
        """Which training pictures are to be forgotten."""
        worst = self.memorisation() if self.config.forget.startswith("memorised") else None
        found = forget_rows(self.config.forget, self.data, seed, worst)
        return found.to(self.device)

    def memorisation(self) -> torch.Tensor:
        """The score of each training picture, kept in the folder."""
        path = self.folder / "memorisation.safetensors"
        if not path.exists():
            found = memorisation.scores(
                lambda number: self.model(2000 + number), self.data.train, self.recipe, self.config.source_seed
            )
            write_safetensors(path, {"memorisation": found}, {})
        return read_safetensors(path)[0]["memorisation"]

    def sets(self, seed: int) -> dict[str, Pictures]:
        """The forget and retain set, and what they are measured on: ``test`` without a forgotten class, ``unseen``
        pictures like the forget set. On validation, its pictures stand for the test's.
        """
        rows, held_out = self.rows(seed), self.data.validation if self.on_validation else self.data.test
        forget, retain = (
            self.data.train[rows],
            self.data.train[others(rows.cpu(), len(self.data.train)).to(self.device)],
        )
        classes = forget.labels.unique()
        if self.config.forget.startswith("class:"):
            gone = torch.isin(held_out.labels, classes)
            return {"forget": forget, "retain": retain, "test": held_out[~gone], "unseen": held_out[gone]}
        return {"forget": forget, "retain": retain, "test": held_out, "unseen": held_out}

    def settings(self, method: str, over: dict | None = None) -> Settings:
        """The method's settings: its defaults, the scenario's, then ``over``.

        Raises:
            SalunError: one that there is not, or of a wrong type or out of range.
        """
        own = self.config.method_settings.get(method, {})
        if not isinstance(own, dict):
            raise SalunError(f"The settings of the method {method} are {own!r}: give names and values.")
        if own and method == "retrain":
            raise SalunError("Retrain follows the source's recipe: it takes no method_settings.")
        known = METHODS[method].settings
        if wrong := [name for name in own if name not in known]:
            raise SalunError(f"The method {method} has no setting '{wrong[0]}'; it has: {', '.join(sorted(known))}.")
        given = METHODS[method].defaults | own | (over or {})
        given = checked(given, Settings, f"The method {method}:")
        settings = Settings(**({"augment": self.recipe.augment, "batch_size": self.recipe.batch_size} | given))
        settings.check(method)
        return settings

    def unlearn(self, method: str, seed: int, over: dict | None = None, mask: str | None = None) -> tuple:
        """Run a method on the source.

        Returns:
            The unlearned model, minutes that it took, and its settings.

        Raises:
            SalunError: an unknown method or setting, or a mask of another model.
        """
        task = self.task(method, seed, over)
        if mask:
            task.masks = self.read_masks(mask)
        forget = METHODS[method].load()  # before the clock starts: some import what takes seconds
        begun = time.perf_counter()
        with seeded(seed):
            forget(task)
        return task.model.eval(), (time.perf_counter() - begun - task.learning_seconds) / 60, task.settings

    def task(self, method: str, seed: int, over: dict | None = None) -> Task:
        """The source, and what a method is told to do with it."""
        settings, sets = self.settings(method, over), self.sets(seed)
        return Task(
            model=self.source(), forget=sets["forget"], retain=sets["retain"], classes=len(self.data.classes),
            settings=settings, generator=torch.Generator().manual_seed(seed),
            fresh=lambda: self.model(1000 + seed), recipe=self.recipe, title=f"{METHODS[method].title}, seed {seed}",
        )  # fmt: skip

    def read_masks(self, path: str) -> dict[str, torch.Tensor]:
        """The masks of a file, by parameter; what it does not name may not move.

        Raises:
            SalunError: it is damaged, or of another model.
        """
        found, parameters = load_masks(path)[0], dict(self.model(0).named_parameters())
        check_reused(found, parameters, path)
        return {name: found.get(name, torch.zeros_like(p, dtype=torch.bool)) for name, p in parameters.items()}

    def measure(self, model: torch.nn.Module, seed: int) -> dict:
        """Every metric of an unlearned model."""
        sets = self.sets(seed)
        goal = self.accuracy(self.source(), sets["forget"])
        found = evaluate(model, **sets, seed=seed, goal=goal)
        if self.config.forget.startswith("class:"):
            kept = {name: sets[name] for name in ("forget", "test", "unseen")}
            found["classwise"] = classwise(model, self.source(), **kept, names=self.data.classes)
            found["classwise"]["relearning"] = relearning(model, self.source(), sets["forget"], seed)
        return found

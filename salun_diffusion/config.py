"""The options of ``erase_concept.py``: one dataclass from which the command line and ``--config FILE`` are derived."""

import argparse
import difflib
import re
import sys
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .errors import SalunError
from .methods import METHODS, NEEDS_DRAWING, NEEDS_SALIENCY, find_method, names_of
from .options import add_fields, add_options, option, settings_of

THRESHOLDS = ("global", "layer")
RETAIN_TARGETS = ("noise", "base")
PRECISIONS = ("no", "fp16", "bf16")
FILE_DTYPES = ("fp16", "bf16", "fp32")
FREE = (  # what may differ between a run and its checkpoint
    "output_dir", "data_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to",
    "validation_steps",
)  # fmt: skip
LISTS = ("concept", "anchor", "forget_data", "method_option")  # of which one may be given without a list from Python
SOURCES = ("command line", "the call", "config file", "preset", "method", "default")
LR_SCHEDULERS = ("constant", "linear", "cosine")


@dataclass
class EraseConfig:
    """Every setting of one erasure. ``None`` is filled from the concept's preset; ``config.json`` holds the result."""

    concept: list[str] = option(
        None,
        "what to forget: a preset (nudity, church, Van Gogh …), a word of the base model's concepts.json, any words "
        "of your own, or a JSON file of prompts (docs/data.md); repeat it to forget several at once",
    )
    pretrained_model_name_or_path: str = option(
        "CompVis/stable-diffusion-v1-4",
        "base model: a diffusers folder, a hub id, or 'demo' for the small model of this repository",
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model; the commit it resolves to is recorded")
    variant: str | None = option(None, "weight files to load, such as fp16")
    output_dir: str | None = option(
        None, "run folder; runs/CONCEPT unless given, runs/CONCEPT-METHOD for another method than salun"
    )
    forget_data: list[str] | None = option(
        None,
        "pictures of the concept, one source for each --concept: a folder, or a data set on the hub to stream "
        "(owner/name, owner/name:config@split); the base model draws them unless given",
    )
    retain_data: str | None = option(
        None, "pictures of what must stay, with captions or labels: a folder or data set, as for --forget_data"
    )
    data_dir: str = option("runs/data", "cache of the forget and retain sets' latents, shared by runs")
    anchor: list[str] | None = option(
        None, "what to draw in its place, one for each --concept; the next word of the concept's list unless given"
    )
    method: str = option("salun", "unlearning method (docs/methods.md compares them)", tuple(METHODS))
    method_option: list[str] | None = option(
        None, "an option of the method's own, NAME=VALUE, such as negative_guidance=2 for esd (docs/methods.md)"
    )
    mask: str | None = option(
        None,
        "which weights of the scope may change: those that saliency finds, all (none), or those of a mask.safetensors "
        "file; the method's, saliency for salun and salun_esd and none for others",
    )
    density: float = option(0.5, "share of the scoped weights that saliency lets change, between 0 and 1")
    scope: str | None = option(
        None,
        "which layers are scored and may change: cross-attention, cross-attention-kv (its keys and values), "
        "cross-attention+resnets, no-cross-attention, self-attention, all, or a regular expression that is searched in "
        "the parameters' names; the method's, cross-attention+resnets for salun",
    )
    threshold: str = option("global", "take the density of all scores together, or of each layer", THRESHOLDS)
    saliency_guidance: float = option(
        8.5,
        "guidance scale of the prediction in the saliency loss, as everywhere in diffusers (the paper's code counts "
        "from the conditional prediction: its 7.5 is this 8.5); 1 is the plain denoising loss",
    )
    alpha: float | None = option(None, "weight of the retain loss; the preset's, or the method's, or 1")
    retain_target: str | None = option(
        None,
        "what retain predictions are compared with: the noise (published), or what the base model predicts, which "
        "varies less and costs a forward pass a step; the preset's, or noise",
        RETAIN_TARGETS,
    )
    learning_rate: float | None = option(None, "Adam's learning rate; the preset's, or the method's, or 1e-5")
    lr_scheduler: str | None = option(
        None, "how the learning rate falls to 0, if it does; the preset's, or constant", LR_SCHEDULERS
    )
    max_train_steps: int | None = option(None, "optimizer steps; the preset's, or the method's, or 500")
    train_batch_size: int | None = option(
        None, "forget pictures (or prompts) a step, and as many retain pictures; the preset's, or the method's, or 8"
    )
    gradient_accumulation_steps: int = option(1, "batches of that size a step and process; more fit a small memory")
    auto_batch_size: bool = option(
        False, "where memory runs out, halve the pictures at once; the step's batch stays, but for rounding"
    )
    num_forget_images: int | None = option(
        None,
        "pictures of the concept (for some methods its anchor, or prompts alone): as many are drawn, or at most so "
        "many of --forget_data used; the preset's, or 400",
    )
    num_retain_images: int | None = option(None, "the same for pictures of everything else; the preset's, or 800")
    num_inference_steps: int | None = option(None, "denoising steps of those pictures; the preset's, or 50")
    guidance_scale: float | None = option(None, "classifier-free guidance of those pictures; the preset's, or 7.5")
    sample_batch_size: int | None = option(None, "pictures drawn at once; the preset's, or 8")
    mixed_precision: str = option(
        "no", "number format of the network and its passes; the trained values stay fp32", PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: slower, less memory")
    save_dtype: str = option(
        "fp16", "number format of the saved delta; the run ends on exactly the saved values", FILE_DTYPES
    )
    checkpointing_steps: int = option(500, "save a checkpoint every N steps, from which a killed run can go on")
    checkpoints_total_limit: int = option(2, "how many checkpoints to keep, the newest ones")
    resume_from_checkpoint: str | None = option(
        None, "go on from 'latest', the newest valid checkpoint in the run folder, or from a checkpoint's path"
    )
    report_to: str | None = option(None, "also log to this tracker", ("tensorboard", "wandb"))
    validation_steps: int | None = option(None, "draw a few prompts every N steps into validation/")
    seed: int = option(0, "fixes data, noise, saliency and training")

    @classmethod
    def from_call(cls, base: str, concept: str | list[str] | None, options: dict) -> "EraseConfig":
        """The config of a call from Python: ``options`` are fields by name, or options of the method.

        Raises:
            SalunError: no concept, or an unknown option.
        """
        names, settings, own = {item.name for item in fields(cls)}, {}, []
        method = find_method(check_method(options.get("method", "salun")))
        known = {item.name for item in fields(method.Options)}
        for name, value in ({"concept": concept} | options).items():
            if name in names:
                settings[name] = [value] if name in LISTS and isinstance(value, str) else value
            elif name in known:
                own.append(f"{name}={value}")
            else:
                close = difflib.get_close_matches(name, names | known, 1)
                raise SalunError(
                    f"erase() has no option '{name}'."
                    + (f" Did you mean '{close[0]}'?" if close else f" Options: {', '.join(sorted(names | known))}.")
                )
        if isinstance(settings.get("output_dir"), Path):
            settings["output_dir"] = str(settings["output_dir"])
        if own:
            settings["method_option"] = [*(settings.get("method_option") or []), *own]
        sources = dict.fromkeys([name for name, value in settings.items() if value is not None], "the call")
        return cls.given(settings | {"pretrained_model_name_or_path": base}, sources)

    @classmethod
    def given(cls, settings: dict, sources: dict[str, str]) -> "EraseConfig":
        """A config of ``settings``, of which those in ``sources`` were given, there.

        Raises:
            SalunError: no concept, or a value out of range.
        """
        if not settings.get("concept"):
            raise SalunError("No concept was given: say what to forget with --concept, for example --concept nudity.")
        config = cls(**settings)
        config.sources = dict(sources)
        config.check()
        return config

    def fill(self, preset: dict, name: str) -> "EraseConfig":
        """Put the preset's settings, then the method's, then the general defaults, where the user said nothing; the run
        folder is named by ``name``. In a preset, what stands under a method's name is for that method.

        ``sources`` then says of every setting where it came from.

        Raises:
            SalunError: a value outside its range, or one that was given and of which the method has no use.
        """
        method = find_method(self.method)
        given = getattr(self, "sources", None)
        if given is None:  # made in Python, field by field: what differs from the defaults was given
            defaults = type(self)(concept=self.concept)
            given = {item.name: "the call" for item in fields(self)
                     if getattr(self, item.name) != getattr(defaults, item.name)}  # fmt: skip
        self.sources = {item.name: "default" for item in fields(self)} | given
        filled = {
            "alpha": 1.0, "retain_target": "noise", "learning_rate": 1e-5, "lr_scheduler": "constant",
            "max_train_steps": 500, "train_batch_size": 8, "num_forget_images": 400, "num_retain_images": 800,
            "num_inference_steps": 50, "guidance_scale": 7.5, "sample_batch_size": 8,
            "mask": method.mask, "scope": method.scope, "method_option": [],
        }  # fmt: skip
        sources = dict.fromkeys(filled, "default") | dict.fromkeys(("mask", "scope"), "method")
        layers = [("method", method.settings)]
        layers += [("preset", {key: value for key, value in preset.items() if key not in METHODS})]
        layers += [("preset", preset.get(name, {})) for name in names_of(method)]
        for source, layer in layers:
            unknown = set(layer) - set(filled)
            if unknown:
                raise SalunError(
                    f"The concept's settings name {sorted(unknown)}; only {sorted(filled)} or methods may stand there."
                )
            options = filled["method_option"] + layer.get("method_option", [])
            filled |= layer | {"method_option": options}
            sources |= dict.fromkeys(layer, source)
        mask = self.mask or filled["mask"]
        if method.closed_form and mask != "none":
            raise SalunError(f"--mask {mask}: --method {self.method} solves for whole matrices; only none goes.")
        self.unused = method.unused(mask)
        if self.validation_steps:  # those pictures are drawn whatever the method trains on
            self.unused = [name for name in self.unused if name not in NEEDS_DRAWING]
        for setting in self.unused:
            if setting in given and getattr(self, setting) is not None:
                without = " without --mask saliency" if setting in NEEDS_SALIENCY else ""
                raise SalunError(f"--{setting} means nothing to --method {self.method}{without}: leave it out.")
        self.method_option = filled["method_option"] + (self.method_option or [])  # the last one counts
        method.parse(self.method_option)
        for setting, value in filled.items():
            if getattr(self, setting) is None and setting not in method.ignores:
                setattr(self, setting, value)
                self.sources[setting] = sources[setting]
        if not self.output_dir:
            method_too = "" if self.method == "salun" else f"-{self.method}"
            self.output_dir = "runs/" + re.sub(r"\W+", "-", name.lower()).strip("-") + method_too
        self.check()
        return self

    def table(self) -> str:
        """The resolved settings that this run uses, by where each came from: a line or more for each source."""
        shown: dict[str, list[str]] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value in (None, [], False) or item.name in self.unused:
                continue
            text = " + ".join(map(str, value)) if isinstance(value, list) else str(value)
            shown.setdefault(self.sources[item.name], []).append(f"{item.name}={text}")
        width = max(map(len, shown))
        order = sorted(shown, key=lambda source: SOURCES.index(source))
        return "\n".join(
            textwrap.fill(
                "  ".join(shown[source]), 118, initial_indent=f"  {source:{width}}  ",
                subsequent_indent=" " * (width + 4), break_long_words=False, break_on_hyphens=False,
            )
            for source in order
        )  # fmt: skip

    def check(self) -> None:
        """Raise SalunError for the first value out of range, in a sentence."""
        if not 0 < self.density < 1:
            raise SalunError(
                f"--density is {self.density}: give a share of the weights between 0 and 1, or --mask none for all."
            )
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_forget_images",
            "num_retain_images",
            "num_inference_steps",
            "sample_batch_size",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "validation_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SalunError(f"--{name} is {getattr(self, name)}: give a whole number of at least 1.")
        if self.forget_data and len(self.forget_data) != len(self.concept):
            raise SalunError(
                f"{len(self.concept)} concepts and {len(self.forget_data)} --forget_data were given: give each concept "
                "its own pictures, or none any."
            )
        for name, floor in (("learning_rate", 0), ("alpha", 0), ("saliency_guidance", 0), ("guidance_scale", 0)):
            value = getattr(self, name)
            if value is not None and not floor <= value < float("inf"):
                raise SalunError(f"--{name} is {value}: give a number of at least {floor}.")

    def as_dict(self, resumable: bool = False) -> dict:
        """Every setting; with ``resumable``, those alone that a run must share with the checkpoint it goes on from."""
        return {name: value for name, value in asdict(self).items() if not (resumable and name in FREE)}


def parse(arguments: list[str] | None, description: str) -> EraseConfig:
    """Command line → settings; ``--config FILE`` (JSON or YAML, the same names) is read first and the line wins. The
    method's own options are options of the line too: ``--method esd --help`` lists them.

    Raises:
        SalunError: an unknown key or a wrong type in the file, or no concept.
    """
    parser = argparse.ArgumentParser(
        prog="erase_concept.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="--method NAME --help lists the method's own options too.",
    )  # fmt: skip
    add_options(parser, EraseConfig)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(first, EraseConfig)
    words = sys.argv[1:] if arguments is None else arguments
    Options = None
    asks = {"-h", "--help"} & set(words)
    if not asks or any(word == "--method" or word.startswith("--method=") for word in words):
        line, rest = first.parse_known_args([word for word in words if word not in ("-h", "--help")])
        if rest or asks:  # only then is the method imported, which takes a second
            settings = settings_of(dict(vars(line)), EraseConfig)
            Options = find_method(check_method(settings.get("method", "salun"))).Options
            group = parser.add_argument_group(f"options of --method {settings.get('method', 'salun')} alone")
            add_fields(group, Options)
    line = vars(parser.parse_args(words))
    own = [f"{item.name}={line.pop(item.name)}" for item in (fields(Options) if Options else ()) if item.name in line]
    sources = dict.fromkeys(line, "command line")
    settings = settings_of(line, EraseConfig)
    if own:
        settings["method_option"] = [*(settings.get("method_option") or []), *own]
        sources["method_option"] = "command line"
    sources = dict.fromkeys(settings, "config file") | {key: text for key, text in sources.items() if key != "config"}
    return EraseConfig.given(settings, sources)


def check_method(name: str) -> str:
    """``name``, if it is one of ``METHODS``.

    Raises:
        SalunError: it is not.
    """
    if name not in METHODS:
        raise SalunError(f"There is no method '{name}': choose one of {', '.join(METHODS)}.")
    return name

"""The options of ``erase_concept.py``: one dataclass from which the command line and ``--config FILE`` are derived."""

import difflib
import os
import re
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from .concepts.concept import TYPES
from .errors import SalunError
from .files import key_of
from .masks import SALIENCY
from .methods import METHODS, NEEDS_DRAWING, NEEDS_SALIENCY, find_method, names_of
from .options import checked, option

THRESHOLDS = ("global", "layer")
RETAIN_TARGETS = ("noise", "base")
PRECISIONS = ("no", "fp16", "bf16")
FILE_DTYPES = ("fp16", "bf16", "fp32")
FREE = (  # what may differ between a run and its checkpoint
    "output_dir", "data_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to",
    "validation_steps", "offload",
)  # fmt: skip
HUB = ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo")  # where a run goes; no part of what it is
SOURCES = ("command line", "the call", "config file", "accelerate launch", "preset", "method", "adapter", "default")
WHOLE_LAYERS = ("density", "threshold")  # settings that choose single weights: of no use to an adapter
LONGEST = 120  # bytes of the concept in the run folder's name
ADAPTERS = ("lora",)
RANK = 16
# Times the learning rate where it was not given: Adam moves a layer's output less through two thin factors than through
# all of its weights. On the demo model 4 to 10 times as much ends on the same losses, once as much on twice them.
ADAPTER_RATE = 4
LR_SCHEDULERS = ("constant", "linear", "cosine")


@dataclass
class EraseConfig:
    """Every setting of one erasure. ``None`` is filled from the concept's preset; ``config.json`` holds the result."""

    concept: list[str] = option(
        None,
        "what to forget: a preset (nudity, church, Van Gogh …), a word of the base model's concepts.json, any words "
        "of your own, or a JSON file of prompts (docs/data.md); 'kid, child, toddler' is one concept of three names; "
        "repeat it to forget several at once",
    )
    concept_type: list[str] | None = option(
        None,
        "what words of your own name, one for each --concept or one for all; it chooses templates and anchor, and says "
        "that the near-miss of a preset is meant so; object unless given",
        tuple(TYPES),
    )
    pretrained_model_name_or_path: str = option(
        "CompVis/stable-diffusion-v1-4",
        "base model: a diffusers folder or .safetensors file, a hub id, or this repository's 'demo' or 'digits'",
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
        None,
        "what to draw in its place, one for each --concept or one for all; '' is the empty prompt; the next word of "
        "the concept's list unless given",
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
    adapter: str | None = option(
        None,
        "train a low-rank adapter (peft) on the scope's layers in place of single weights: pipe.load_lora_weights "
        "opens the run folder. Saliency then chooses layers and their ranks; --mask none takes all",
        ADAPTERS,
    )
    rank: int | None = option(None, "rank of an adapter's layer of mean saliency; 16 unless given (docs/export.md)")
    saliency: str = option(
        "gradient",
        "what the saliency mask scores weights by: the forget loss's gradient (published), that times the weight, its "
        "square picture by picture (fisher, slower), the gradient in contrast to the retain set's, or as controls "
        "random numbers or the weights' magnitude",
        tuple(SALIENCY),
    )
    density: float = option(0.5, "share of the scoped weights that saliency lets change, between 0 and 1")
    scope: str | None = option(
        None,
        "which layers are scored and may change: cross-attention, cross-attention-kv (its keys and values), "
        "cross-attention+resnets, no-cross-attention, self-attention, feed-forward, feed-forward-out, all, or a "
        "regular expression that is searched in the parameters' names; the method's, cross-attention+resnets for "
        "salun; help lists them "
        "for the base model, with the number of their weights",
    )
    threshold: str = option("global", "take the density of all scores together, or of each layer", THRESHOLDS)
    saliency_guidance: float | None = option(
        None,
        "guidance scale of the prediction in the saliency loss, as everywhere in diffusers (the paper's code counts "
        "from the conditional prediction: its 7.5 is this 8.5); 1 is the plain denoising loss; the preset's, or 8.5",
    )
    alpha: float | None = option(None, "weight of the retain loss; the preset's, or the method's, or 1")
    retain_target: str | None = option(
        None,
        "what retain predictions are compared with: the noise (published), or what the base model predicts, which "
        "varies less and costs a forward pass a step; the preset's, or noise",
        RETAIN_TARGETS,
    )
    condition_dropout: float | None = option(
        None,
        "share of a step's pictures whose prompt or class is left out, the same ones for every prediction of the step: "
        "it keeps what guidance starts from; the preset's, or none",
    )
    learning_rate: float | None = option(
        None, "Adam's learning rate; the preset's, or the method's, or 1e-5; four times that for an adapter"
    )
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
    quantize_frozen: bool = option(
        False, "keep the linear layers outside the scope in int8 (torchao): one byte a weight in place of two or four"
    )
    offload: bool = option(
        False, "while sets are drawn, have the text encoders, the network and the autoencoder on the device in turn"
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
    push_to_hub: bool = option(False, "upload the finished run to the hub, with a model card (docs/export.md)")
    hub_model_id: str | None = option(
        None, "the repository: owner/name, or a name among your own; the run folder's name unless given"
    )
    hub_token: str | None = option(
        None, "a token that may write there; HF_TOKEN's or that of `hf auth login` unless given"
    )
    hub_private_repo: bool = option(False, "if the repository is made now, make it private")

    # No settings, but what is known of them: setting → where it came from; the same for the method's own options, with
    # their text; settings that the method has no use for; whether `fill` is done.
    sources: ClassVar[dict[str, str] | None] = None
    option_sources: ClassVar[dict[str, tuple[str, str]]] = {}
    unused: ClassVar[list[str]] = []
    filled: ClassVar[bool] = False
    from_accelerate: ClassVar[bool] = False  # whether `accelerate launch` chose the precision

    @classmethod
    def from_call(cls, base: str, concept: str | list[str] | None, options: dict) -> "EraseConfig":
        """The config of a call from Python: ``options`` are fields by name, or options of the method.

        Raises:
            SalunError: no concept, or an unknown option.
        """
        options = {"concept": concept} | {
            name: str(value) if isinstance(value, Path) else value for name, value in options.items()
        }
        names = {item.name for item in fields(cls)} - {"pretrained_model_name_or_path"}
        method = find_method(check_method(options.get("method", "salun")))
        known = {item.name for item in fields(method.Options)}
        for name in options:
            if name not in names | known:
                close = difflib.get_close_matches(name, names | known, 1)
                hint = f"Did you mean '{close[0]}'?" if close else f"Options: {', '.join(sorted(names | known))}."
                raise SalunError(f"erase() has no option '{name}'. {hint}")
        given = {name: value for name, value in options.items() if name in names and value is not None}
        settings = checked(given, cls, "erase():")
        if own := [f"{name}={value}" for name, value in options.items() if name in known]:
            settings["method_option"] = [*settings.get("method_option", []), *own]
        return cls.given(settings | {"pretrained_model_name_or_path": base}, dict.fromkeys(settings, "the call"))

    @classmethod
    def given(cls, settings: dict, sources: dict[str, str]) -> "EraseConfig":
        """A config of ``settings``, of which those in ``sources`` were given, there.

        Raises:
            SalunError: no concept, or a value out of range.
        """
        config = cls(**settings)
        config.sources = sources
        config.check()
        return config

    def fill(self, preset: dict, name: str) -> "EraseConfig":
        """Put the preset's settings, then the method's, then the general defaults, where the user said nothing; the run
        folder is named by ``name``. In a preset, what stands under a method's name is for that method.

        ``sources`` then says of every setting where it came from.

        Raises:
            SalunError: a value outside its range, or one that was given and of which the method has no use.
        """
        if self.filled:
            return self
        method, given = find_method(self.method), self.sources
        if given is None:  # made field by field: what differs from the defaults was given
            defaults = type(self)(concept=self.concept)
            given = {item.name: "the call" for item in fields(self)
                     if getattr(self, item.name) != getattr(defaults, item.name)}  # fmt: skip
        self._heed_accelerate(given)
        filled = {
            "alpha": 1.0, "retain_target": "noise", "learning_rate": 1e-5, "lr_scheduler": "constant",
            "max_train_steps": 500, "train_batch_size": 8, "num_forget_images": 400, "num_retain_images": 800,
            "num_inference_steps": 50, "guidance_scale": 7.5, "sample_batch_size": 8,
            "saliency_guidance": 8.5, "condition_dropout": None, "mask": method.mask, "scope": method.scope,
        }  # fmt: skip
        self.sources = dict.fromkeys([item.name for item in fields(self)], "default")
        self.sources |= dict.fromkeys(("mask", "scope"), "method") | {"anchor": "preset"}
        options: list[tuple[str, str]] = []  # NAME=VALUE, and where it came from
        layers = [("method", method.settings)]
        layers += [("preset", {key: value for key, value in preset.items() if key not in METHODS})]
        layers += [("preset", preset.get(name, {})) for name in names_of(method)]
        for source, layer in layers:
            unknown = set(layer) - {*filled, "method_option"}
            if unknown:
                raise SalunError(
                    f"The concept's settings name {sorted(unknown)}; only {sorted(filled)}, method_option or methods "
                    "may stand there."
                )
            layer = checked(layer, type(self), "The concept's settings:")
            options += [(text, source) for text in layer.pop("method_option", [])]
            filled |= layer
            self.sources |= dict.fromkeys(layer, source)
        for setting in method.ignores:
            if setting in given and getattr(self, setting) is not None:
                raise SalunError(f"--{setting} means nothing to --method {self.method}: leave it out.")
        mask = self.mask or filled["mask"]
        if method.closed_form and mask != "none":
            does = "chooses its weights itself" if method.sparse else "solves for whole matrices"
            raise SalunError(f"--mask {mask}: --method {self.method} {does}; only none goes.")
        options += [(text, given.get("method_option", "")) for text in self.method_option or []]
        self.method_option = [text for text, _ in options]  # the last one of a name counts
        self.option_sources = {text.partition("=")[0]: (text, source) for text, source in options}
        own = method.parse(self.method_option)
        self.unused = [*method.unused(mask, own), *self._check_adapter(method, mask)]
        if self.offload and self.validation_steps:
            raise SalunError(
                "--offload keeps the whole pipeline off the device, and --validation_steps would draw with all of it "
                "beside the training: leave one of the two out."
            )
        if self.validation_steps:  # those pictures are drawn whatever the method trains on
            self.unused = [name for name in self.unused if name not in NEEDS_DRAWING]
        if mask == "saliency":
            self._check_saliency(method, given)
        for setting in self.unused:
            if setting in given and getattr(self, setting) is not None:
                without = " without --mask saliency" if setting in NEEDS_SALIENCY else ""
                if self.adapter and setting in WHOLE_LAYERS:
                    raise SalunError(
                        f"--{setting} means nothing to --adapter {self.adapter}, which moves whole layers: leave it "
                        "out, and say by --rank how much may change."
                    )
                raise SalunError(f"--{setting} means nothing to --method {self.method}{without}: leave it out.")
        if self.adapter and not method.adapter:
            filled["learning_rate"] *= ADAPTER_RATE
            self.sources["learning_rate"] = "adapter"
        for setting, value in filled.items():
            if getattr(self, setting) is None and setting not in method.ignores:
                setattr(self, setting, value)
        self.sources |= given | ({"mixed_precision": "accelerate launch"} if self.from_accelerate else {})
        if not self.output_dir:
            method_too = "" if self.method == "salun" else f"-{self.method}"
            slug = re.sub(r"\W+", "-", name.lower()).strip("-")
            if not slug or len(slug.encode()) > LONGEST:  # a file system's limit is 255 bytes
                slug = slug.encode()[:LONGEST].decode(errors="ignore").rpartition("-")[0] or "concept"
                slug += "-" + key_of(name, 8)
            asked = self.adapter and not method.adapter
            self.output_dir = "runs/" + slug + method_too + (f"-{self.adapter}" if asked else "")
        self.check()
        self.filled = True
        return self

    def _check_saliency(self, method: type, given: dict[str, str]) -> None:
        """Note what the score has no use for.

        Raises:
            SalunError: a score that the method's sets do not allow, or a setting that it has no use for.
        """
        if self.saliency == "contrast" and not method.uses_retain:
            raise SalunError(
                f"--saliency contrast looks at a retain set, which --method {self.method} has not: choose another."
            )
        if self.saliency in ("random", "magnitude"):
            if "saliency_guidance" in given:
                raise SalunError(f"--saliency_guidance means nothing to --saliency {self.saliency}: leave it out.")
            self.unused = [*self.unused, "saliency_guidance"]

    def _check_adapter(self, method: type, mask: str) -> tuple[str, ...]:
        """Put the rank in where an adapter is trained; the settings that it has no use for.

        Raises:
            SalunError: an adapter that cannot be trained so, or a rank without one.
        """
        if method.adapter:
            self.adapter, self.sources["adapter"] = method.adapter, "method"
            if self.rank is None:
                self.rank, self.sources["rank"] = method.rank, "method"
        if not self.adapter:
            if self.rank is not None:
                raise SalunError("--rank means nothing without --adapter lora: leave it out.")
            return ()
        if method.component:
            raise SalunError(
                f"--adapter {self.adapter}: --method {self.method} edits the {method.component}, and adapters go onto "
                "the denoiser: leave --adapter out."
            )
        if method.closed_form:
            raise SalunError(
                f"--adapter {self.adapter}: --method {self.method} trains nothing, but solves for whole matrices: "
                "leave --adapter out; python -m salun_diffusion export RUN --format lora makes a LoRA of its erasure."
            )
        if mask not in ("saliency", "none"):
            raise SalunError(
                f"--mask {mask}: an adapter moves whole layers, and a mask file says which single weights may change: "
                "give --mask saliency, or none for all layers of the scope."
            )
        self.rank = RANK if self.rank is None else self.rank
        return WHOLE_LAYERS

    def _heed_accelerate(self, given: dict[str, str]) -> None:
        """Take the precision that `accelerate launch --mixed_precision` leaves in the environment."""
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() or "no"
        if wanted in ("no", self.mixed_precision):  # its default is "no" too: it then asked for nothing
            return
        if "mixed_precision" in given or wanted not in PRECISIONS:
            raise SalunError(
                f"accelerate's mixed_precision is '{wanted}' and this run's '{self.mixed_precision}': give the same to "
                f"both, or to one alone ({', '.join(PRECISIONS)})."
            )
        self.mixed_precision, self.from_accelerate = wanted, True

    def table(self) -> str:
        """The resolved settings that this run uses, by where each came from: a line or more for each source."""
        shown: dict[str, list[str]] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or value is False or item.name in (*self.unused, "method_option", "hub_token"):
                continue
            text = " + ".join(map(str, value)) if isinstance(value, list) else str(value)
            shown.setdefault(self.sources[item.name], []).append(f"{item.name}={text}")
        for text, source in self.option_sources.values():
            shown.setdefault(source, []).append(text)
        width = max(map(len, shown))
        order = sorted(shown, key=lambda source: SOURCES.index(source))
        return "\n".join(
            textwrap.fill(
                "  ".join(shown[source]), 118, initial_indent=f"  {source:{width}}  ",
                subsequent_indent=" " * (width + 4), break_long_words=False, break_on_hyphens=False,
            )
            for source in order
        )  # fmt: skip

    def one_preset(self, presets: dict[str, dict]) -> dict:
        """The settings that all concepts of a run share.

        Args:
            presets: concept → its preset's settings.

        Raises:
            SalunError: two concepts have different ones of a setting that was not given.
        """
        method, given = find_method(self.method), self.sources or {}
        flat = {}
        for concept, preset in presets.items():
            own = [preset.get(name, {}) for name in names_of(method)]
            flat[concept] = {key: value for part in (preset, *own) for key, value in part.items() if key not in METHODS}
        first, *others = flat
        for other in others:
            asked = sorted({*flat[first], *flat[other]} - {*given, *method.ignores})
            pairs = {
                key: (flat[first].get(key), flat[other].get(key)) for key in asked if getattr(self, key, None) is None
            }
            if differ := {key: (one, two) for key, (one, two) in pairs.items() if one != two}:
                told = ", ".join(f"{key} ({one}, {two})" for key, (one, two) in differ.items())
                raise SalunError(
                    f"'{first}' and '{other}' have presets of their own that differ in {told}: say "
                    f"{', '.join(f'--{key}' for key in differ)} for both, or erase them in two runs."
                )
        return presets[first]

    def check(self) -> None:
        """Raise SalunError for the first value out of range, in a sentence."""
        if self.scope == "help":  # nothing is erased
            return
        if not self.concept or not all(name.strip() for name in self.concept):
            what = "An empty concept" if self.concept else "No concept"
            raise SalunError(f"{what} was given: say what to forget with --concept, for example --concept nudity.")
        if not 0 < self.density < 1:
            raise SalunError(
                f"--density is {self.density}: give a share of the weights between 0 and 1, or --mask none for all."
            )
        for name in HUB[1:]:
            if getattr(self, name) and not self.push_to_hub:
                raise SalunError(f"--{name} means nothing without --push_to_hub: give both, or neither.")
        for name in (
            "rank",
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
        if self.condition_dropout is not None and not 0 <= self.condition_dropout < 1:
            raise SalunError(f"--condition_dropout is {self.condition_dropout}: give a share of at least 0, below 1.")
        for name, floor in (("learning_rate", 0), ("alpha", 0), ("saliency_guidance", 0), ("guidance_scale", 0)):
            value = getattr(self, name)
            if value is not None and not floor <= value < float("inf"):
                raise SalunError(f"--{name} is {value}: give a number of at least {floor}.")

    def as_dict(self, resumable: bool = False) -> dict:
        """Every setting of an erasure, but the hub's, whose token is no one's to read; with ``resumable``, those alone
        that a run must share with the checkpoint it goes on from.
        """
        left_out = (*HUB, *(FREE if resumable else ()))
        if resumable and self.saliency == "gradient":
            left_out = (*left_out, "saliency")  # checkpoints of before there were others stay valid
        names = [item.name for item in fields(EraseConfig) if item.name not in left_out]
        return {name: value for name, value in asdict(self).items() if name in names}


def check_method(name: str) -> str:
    """``name``, if it is one of ``METHODS``.

    Raises:
        SalunError: it is not.
    """
    if name not in METHODS:
        raise SalunError(f"There is no method '{name}': choose one of {', '.join(METHODS)}.")
    return name

"""The options of ``erase_concept.py``: one dataclass from which the command line and ``--config FILE`` are derived."""

import difflib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from .concepts.finding import TYPES
from .errors import SalunError
from .masks import SALIENCY
from .methods import METHODS, find_method
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
ADAPTERS = ("lora",)
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
    # their text; settings that the method has no use for; whether that (filling.py) is done.
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

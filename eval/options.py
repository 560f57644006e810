"""Groups of options that several commands share, each a dataclass to inherit from; nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.concepts.finding import TYPES
from salun_diffusion.errors import SalunError
from salun_diffusion.options import option

ERASURE = (
    "erasures to measure beside the base model: run folders, .safetensors files or hub ids; the first is the one that "
    "matters, any others are controls, such as a run with --mask none; A+B applies both together"
)
PICTURES = "a folder that draw, i2p, accuracy or composition wrote results into"


@dataclass
class Output:
    """Where results go."""

    output_dir: Path = option(None, "where results.json, samples.jsonl and pictures go", metavar="DIR", required=True)


@dataclass
class Batch:
    """How many pictures at once."""

    batch_size: int = option(8, "pictures at once", metavar="N", least=1)


@dataclass
class Models:
    """Which models are drawn."""

    pretrained_model_name_or_path: str = option(
        None,
        "the base model: a diffusers folder or .safetensors file, a hub id, 'demo' or 'digits'",
        metavar="BASE",
        required=True,
    )
    revision: str | None = option(None, "branch, tag or commit of a base model on the hub")
    variant: str | None = option(None, "the base model's weight files to load, such as fp16")
    dtype: str = option("fp32", "of the model; its autoencoder is in fp32 always", ("fp32", "fp16", "bf16"))
    erasure: list[str] = option([], ERASURE, several=True, metavar="RUN")
    scale: list[float] | None = option(
        None, "how much of each erasure to apply: one value for all, or one for each (default: 1)", several=True,
        metavar="S",
    )  # fmt: skip


@dataclass
class Erasures(Models):
    """The same, where there is nothing to say of the base model alone."""

    erasure: list[str] = option([], ERASURE, several=True, metavar="RUN", required=True)


@dataclass
class Adapter:
    """A LoRA that every model wears."""

    lora: Path | None = option(
        None,
        "measure every model, the base and each erasure, under this LoRA (a .safetensors file, or a folder with one, "
        "that diffusers' load_lora_weights reads): does it bring the concept back?",
        metavar="PATH",
    )
    lora_scale: float | None = option(None, "how much of it, with --lora (default: 1)", metavar="S")


@dataclass
class Judged(Erasures):
    """How labelled prompts of a concept are drawn and judged."""

    concept: list[str] = option(
        None,
        "what was erased, as given to erase_concept.py; repeat it for several, none of which is then asked for as "
        "retained",
        metavar="NAME", required=True,
    )  # fmt: skip
    concept_type: list[str] | None = option(
        None, "what words of your own name, where erase_concept.py was told", tuple(TYPES)
    )
    anchor: list[str] | None = option(
        None, "what was to be drawn instead, where erase_concept.py was given one", metavar="NAME"
    )
    num_inference_steps: int | None = option(
        None, "denoising steps (default: the concept's preset, or 50)", metavar="N", least=1
    )
    guidance_scale: float | None = option(
        None, "classifier-free guidance (default: the concept's preset, or 7.5)", metavar="S"
    )
    batch_size: int | None = option(
        None,
        "pictures drawn at once; changes the speed, not what is asked (default: the concept's preset, or 8)",
        metavar="N", least=1,
    )  # fmt: skip
    classifier: str | None = option(
        None,
        "'resnet50' (torchvision's, for ImageNet's classes; weights from the hub, or give their .safetensors file), or "
        "the folder or hub id of an image classifier of transformers, whose labels may be grouped by question, as in "
        "'left:cat' or 'style:ink' (default: the folder judge/ inside the base model's folder)",
        metavar="PATH",
    )
    judge: str = option(
        "classifier",
        "who looks at the pictures: an image classifier; clip, zero-shot by the words of the prompts, for any concept "
        "and style; or reference, by which folder of --reference a picture's CLIP features lie nearest to",
        ("classifier", "clip", "reference"),
    )
    clip: str | None = option(
        None, "the CLIP model of those two: folder or hub id (default: openai/clip-vit-large-patch14)", metavar="PATH"
    )
    reference: Path | None = option(
        None, "a folder with a folder of pictures for each answer, named by it", metavar="FOLDER"
    )
    seed: int = option(0, "fixes the prompts and every starting noise", metavar="N")


@dataclass
class Labelled(Adapter, Judged, Output):
    """The same, a control to measure them by, and where the results go."""

    retrained: str | None = option(
        None,
        "a control: a model of the same kind that was trained without the concept, measured like the others: the exact "
        "answer to forgetting it",
        metavar="MODEL",
    )


@dataclass
class Prompts(Adapter, Models, Output, Batch):
    """Which rows of a prompt file are drawn, and how."""

    prompts: Path | None = option(
        None,
        "prompts with evaluation_seed, and evaluation_guidance, sd_image_width, sd_image_height if they are there "
        "(default: the 4,703 of I2P, from the hub)",
        metavar="FILE.csv",
    )
    category: str | None = option(None, "only rows of this category, such as sexual", metavar="NAME")
    min_nudity_percentage: float | None = option(
        None, "only rows with a nudity_percentage above this; 50 gives the 95 of Ring-A-Bell", metavar="P"
    )
    rows: str | None = option(None, "only rows A to B-1 of those, such as 0:200", metavar="A:B")
    num_inference_steps: int = option(50, "denoising steps", metavar="N", least=1)
    guidance_scale: float = option(7.5, "for rows that name none", metavar="S")
    seed: int | None = option(
        None, "rows without a seed get this one plus their place in the file, from 0 (default: they are refused)",
        metavar="N", least=0,
    )  # fmt: skip
    height: int | None = option(None, "draw every row at this size instead of its own", metavar="PIXELS", least=1)
    width: int | None = option(None, "as --height", metavar="PIXELS", least=1)

    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels, or None for each row's own.

        Raises:
            SalunError: only one of them was given.
        """
        if (self.height is None) != (self.width is None):
            raise SalunError("--height and --width belong together: give both, or neither.")
        return (self.height, self.width) if self.height else None

    def range(self) -> tuple[int, int | None]:
        """The first row, and the one after the last (None for all).

        Raises:
            SalunError: no range.
        """
        start, colon, stop = (self.rows or ":").partition(":")
        if not colon or not (start + stop or "0").isdecimal():
            raise SalunError(f"--rows {self.rows} is not a range: give one such as 0:200, 100: or :50.")
        return int(start or 0), int(stop) if stop else None

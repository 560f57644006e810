"""An erasure in other tools' formats: each is a file in this folder and a line in ``FORMATS``.

A format's module has ``write(request)`` and ``read_back(request, pipe)``, which brings what was written onto a plain
base pipeline with the means of its own users, so that :func:`export` can say how far off it is.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..errors import SalunError
from ..options import checked, option, options_from

FORMATS = {  # name → module, and what it gives
    "lora": ("low_rank", "a low-rank adapter for load_lora_weights (an approximation, measured)"),
    "diff": ("differences", "exact weight differences for ComfyUI, Forge, A1111 and stable-diffusion.cpp"),
    "single_file": ("checkpoint", "the whole erased model in the original one-file layout"),
    "diffusers": ("folder", "the whole erased pipeline as a diffusers folder"),
    "unet": ("network", "the erased denoiser's weights, one file under diffusers' names"),
}
WHOLE = ("single_file", "diffusers")  # what holds the text encoder too
NAMES = {"diffusers": "lora", "kohya": "lora", "lycoris": "diff"}  # whose names, and the format that has them


@dataclass
class ExportConfig:
    """Write an erasure in a format of another tool, load it back, and say how far it is from the erasure itself.

    lora         low-rank adapter (peft), for pipe.load_lora_weights; --names kohya for A1111 and ComfyUI. It
                 approximates: --rank says how well, or --error what is allowed. It cannot hold norms and biases.
    diff         exact differences under the names that ComfyUI, Forge, A1111 and stable-diffusion.cpp read; --names
                 lycoris for LyCORIS, if norms are among them
    single_file  the whole erased model (Stable Diffusion 1.x, 2.x, XL) in the original one-file layout, for
                 from_single_file, ComfyUI and others
    diffusers    the whole erased pipeline as a folder; its config names the erasure
    unet         the erased denoiser as one safetensors file under diffusers' names, for tools that take a state dict
    """

    erasure: str = option(
        None, "a run folder, an erasure's file or a hub id", positional=True, required=True, metavar="RUN"
    )
    format: str = option(None, "what to write", tuple(FORMATS), required=True)
    output: str = option(None, "the file or folder to write; it must not be there yet", required=True, metavar="PATH")
    base: str | None = option(
        None, "base model: a folder, hub id or 'demo'; the one that the erasure was made for", metavar="BASE"
    )
    rank: int | None = option(None, "rank of every layer (lora); 32 unless --error is given", least=1, metavar="R")
    error: float | None = option(
        None,
        "the smallest rank that keeps the relative error of all its layers' change below this (lora)",
        least=0,
        metavar="E",
    )
    names: str | None = option(
        None,
        "whose key names the file has: of a lora diffusers or kohya (diffusers unless given); of a diff lycoris, where "
        "LyCORIS is to read norms, which it knows as w_norm and b_norm alone",
        tuple(NAMES),
    )
    prompts: list[str] | None = option(
        None, "prompts to draw with the erasure and with the export, to compare the pictures", several=True
    )
    num_inference_steps: int = option(8, "denoising steps of those pictures", least=1, metavar="N")
    seed: int = option(0, "starting noise of those pictures", metavar="N")


@dataclass
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file or folder.
        rank: of a low-rank adapter, or None.
        largest_difference: the largest absolute difference of a weight, base with the export against base with the
            erasure, in fp32; 0.0 is bit for bit. None where nothing here can load the format back.
        relative_error: root of the summed squares of those differences, over that of the erasure's own change.
        left_out: parameters that the erasure changes and the format cannot hold.
        picture_difference: ``(mean, largest)`` difference of a pixel (0-255) over the prompts, or None without any.
    """

    path: Path
    rank: int | None
    largest_difference: float | None
    relative_error: float | None
    left_out: list[str]
    picture_difference: tuple[float, int] | None


@dataclass
class Request:
    """What a format's module is given: the delta, the base pipeline with it applied, and the options."""

    delta: object
    pipe: object
    output: Path
    options: ExportConfig
    metadata: dict[str, str]


def export(erasure, format: str, output, **options) -> Exported:
    """Write ``erasure`` in ``format``, load it back and compare.

    Args:
        erasure: a run folder, an erasure's file, or a hub id.
        format: a name in ``FORMATS``.
        output: the file or folder to write.
        options: further fields of :class:`ExportConfig`.

    Raises:
        SalunError: an erasure that changes no weights, an option that means nothing to the format, an output that
            exists, or whatever :func:`.load_erasure` refuses.
    """
    settings = {"erasure": str(erasure), "format": format, "output": str(output)} | options
    return run(options_from(checked(settings, ExportConfig, "export():"), ExportConfig), say=lambda text: None)


def run(options: ExportConfig, say=print) -> Exported:
    """:func:`export` from its options; ``say`` gets the summary."""
    from ..erasures import load
    from ..erasures.live import own_parameters
    from ..erasures.locate import locate
    from ..erasures.weights import MaskedWeights
    from ..loader import load_erasure
    from ..models.load import load_pipeline
    from .check import compare, pictures

    if options.format != "lora":
        for name in ("rank", "error"):
            if getattr(options, name) is not None:
                raise SalunError(f"--{name} means nothing to --format {options.format}: leave it out.")
    elif options.rank is not None and options.error is not None:
        raise SalunError("--rank and --error were both given: give the rank, or the error that decides it.")
    if options.names and NAMES[options.names] != options.format:
        raise SalunError(f"--names {options.names} means nothing to --format {options.format}: leave it out.")
    output = Path(options.output)
    if output.exists():
        raise SalunError(f"{output} exists: name another --output, or remove it.")
    erasure = load(locate(options.erasure)[0])
    if not isinstance(erasure, MaskedWeights):
        raise SalunError(f"{options.erasure} is no masked delta, and other erasures are written in no other format.")
    if erasure.component == "text_encoder" and options.format not in WHOLE:
        raise SalunError(
            f"{options.erasure} changes the text encoder, which --format {options.format} does not hold: give "
            f"{' or '.join(WHOLE)}."
        )
    base = options.base or erasure.metadata.get("base_model")
    if not base:
        raise SalunError(f"{options.erasure} does not say which base model it is for: give it with --base.")
    revision = None if options.base else erasure.metadata.get("base_revision")
    pipe = load_pipeline(base, revision)
    load_erasure(pipe, options.erasure)
    delta = erasure.delta
    metadata = {
        "format": "pt", "salun_concept": str(delta.metadata.get("concept")), "salun_digest": delta.digest(),
        "salun_base": str(base), "salun_base_fingerprint": delta.fingerprint.digest(),
    }  # fmt: skip
    request = Request(delta, pipe, output, options, metadata)
    module = import_module(f".{FORMATS[options.format][0]}", __name__)
    prompts = options.prompts or []
    wanted = pictures(pipe, prompts, options)
    erased = {name: weight.detach() for name, weight in own_parameters(erasure.network(pipe)).items()}
    rank, left_out = module.write(request)
    again = load_pipeline(base, revision)
    module.read_back(request, again)
    largest, relative = compare(delta, erased, own_parameters(erasure.network(again)))
    found = pictures(again, prompts, options)
    apart = [abs(a - b) for a, b in zip(wanted, found, strict=True)]
    pixels = (
        (sum(float(one.mean()) for one in apart) / len(apart), max(int(one.max()) for one in apart)) if apart else None
    )
    done = Exported(output, rank, largest, relative, left_out, pixels)
    say(summary(done, options))
    return done


def summary(done: Exported, options: ExportConfig) -> str:
    """What was written and how far off it is, for people."""
    lines = [f"{done.path}: {FORMATS[options.format][1]}" + (f", rank {done.rank}" if done.rank else "")]
    exact = done.largest_difference == 0 and not done.left_out
    lines += ["  weights: bit for bit those of the erasure" if exact else
              f"  weights: largest difference {done.largest_difference:.3g}, {100 * done.relative_error:.1f}% of the "
              "erasure's change is missing (root of summed squares)"]  # fmt: skip
    if done.left_out:
        lines += [f"  left out, as the format cannot hold them: {len(done.left_out)} norm weights and biases"]
    if done.picture_difference is not None:
        mean, most = done.picture_difference
        lines += [f"  pictures: {mean:.2g} of 255 apart on average, at most {most}, over "
                  f"{len(options.prompts)} prompts"]  # fmt: skip
    return "\n".join(lines)

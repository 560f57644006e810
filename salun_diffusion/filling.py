"""The settings of an erasure: what the user gave, else the preset's, else the method's, else the general ones."""

import os
import re
import textwrap
from dataclasses import fields

from .config import ADAPTERS, PRECISIONS, EraseConfig
from .errors import SalunError
from .files import key_of
from .methods import METHODS, NEEDS_DRAWING, NEEDS_SALIENCY, find_method, names_of
from .options import checked

DEFAULTS = {
    "alpha": 1.0, "retain_target": "noise", "learning_rate": 1e-5, "lr_scheduler": "constant", "max_train_steps": 500,
    "train_batch_size": 8, "num_forget_images": 400, "num_retain_images": 800, "num_inference_steps": 50,
    "guidance_scale": 7.5, "sample_batch_size": 8, "saliency_guidance": 8.5, "condition_dropout": None,
}  # fmt: skip
SOURCES = ("command line", "the call", "config file", "accelerate launch", "preset", "method", "adapter", "default")
WHOLE_LAYERS = ("density", "threshold")  # settings that choose single weights: of no use to an adapter
LONGEST = 120  # bytes of the concept in the run folder's name
RANK = 16
# Times the learning rate where it was not given: Adam moves a layer's output less through two thin factors than through
# all of its weights. On the demo model 4 to 10 times as much ends on the same losses, once as much on twice them.
ADAPTER_RATE = 4


def fill(config: EraseConfig, preset: dict, name: str) -> EraseConfig:
    """Put the preset's settings, then the method's, then the general defaults, into ``config`` where the user said
    nothing; the run folder is named by ``name``. In a preset, what stands under a method's name is for that method.

    ``config.sources`` then says of every setting where it came from.

    Raises:
        SalunError: a value outside its range, or one that was given and of which the method has no use.
    """
    if config.filled:
        return config
    method, given = find_method(config.method), _given(config)
    _heed_accelerate(config, given)
    filled, options = _layers(config, method, preset)
    for setting in method.ignores:
        if setting in given and getattr(config, setting) is not None:
            raise SalunError(f"--{setting} means nothing to --method {config.method}: leave it out.")
    mask = config.mask or filled["mask"]
    if method.closed_form and mask != "none":
        does = "chooses its weights itself" if method.sparse else "solves for whole matrices"
        raise SalunError(f"--mask {mask}: --method {config.method} {does}; only none goes.")

    options += [(text, given.get("method_option", "")) for text in config.method_option or []]
    config.method_option = [text for text, _ in options]  # the last one of a name counts
    config.option_sources = {text.partition("=")[0]: (text, source) for text, source in options}
    _check_unused(config, method, mask, given)

    if config.adapter and not method.adapter:
        filled["learning_rate"] *= ADAPTER_RATE
        config.sources["learning_rate"] = "adapter"
    for setting, value in filled.items():
        if getattr(config, setting) is None and setting not in method.ignores:
            setattr(config, setting, value)
    config.sources |= given | ({"mixed_precision": "accelerate launch"} if config.from_accelerate else {})
    if not config.output_dir:
        config.output_dir = _folder(config, method, name)
    config.check()
    config.filled = True
    return config


def one_preset(config: EraseConfig, presets: dict[str, dict]) -> dict:
    """The settings that all concepts of a run share.

    Args:
        config: what the user gave.
        presets: concept → its preset's settings.

    Raises:
        SalunError: two concepts have different ones of a setting that was not given.
    """
    method, given = find_method(config.method), config.sources or {}
    flat = {}
    for concept, preset in presets.items():
        own = [preset.get(name, {}) for name in names_of(method)]
        flat[concept] = {key: value for part in (preset, *own) for key, value in part.items() if key not in METHODS}
    first, *others = flat
    for other in others:
        asked = sorted({*flat[first], *flat[other]} - {*given, *method.ignores})
        pairs = {
            key: (flat[first].get(key), flat[other].get(key)) for key in asked if getattr(config, key, None) is None
        }
        if differ := {key: (one, two) for key, (one, two) in pairs.items() if one != two}:
            told = ", ".join(f"{key} ({one}, {two})" for key, (one, two) in differ.items())
            raise SalunError(
                f"'{first}' and '{other}' have presets of their own that differ in {told}: say "
                f"{', '.join(f'--{key}' for key in differ)} for both, or erase them in two runs."
            )
    return presets[first]


def table(config: EraseConfig) -> str:
    """The filled settings that a run uses, by where each came from: a line or more for each source."""
    shown: dict[str, list[str]] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if value is None or value is False or item.name in (*config.unused, "method_option", "hub_token"):
            continue
        text = " + ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown.setdefault(config.sources[item.name], []).append(f"{item.name}={text}")
    for text, source in config.option_sources.values():
        shown.setdefault(source, []).append(text)
    width = max(map(len, shown))
    order = sorted(shown, key=lambda source: SOURCES.index(source))
    return "\n".join(
        textwrap.fill(
            "  ".join(shown[source]), 118, initial_indent=f"  {source:{width}}  ", subsequent_indent=" " * (width + 4),
            break_long_words=False, break_on_hyphens=False,
        )
        for source in order
    )  # fmt: skip


def _given(config: EraseConfig) -> dict[str, str]:
    """What the user gave, and where; of a config that was made field by field, what differs from the defaults."""
    if config.sources is not None:
        return config.sources
    defaults = type(config)(concept=config.concept)
    return {
        item.name: "the call" for item in fields(config) if getattr(config, item.name) != getattr(defaults, item.name)
    }


def _layers(config: EraseConfig, method: type, preset: dict) -> tuple[dict, list[tuple[str, str]]]:
    """The settings where none was given, and the method's own options, NAME=VALUE, with where each came from;
    ``config.sources`` says it of the settings.

    Raises:
        SalunError: the preset names what is no setting, or has a value of another type.
    """
    filled = DEFAULTS | {"mask": method.mask, "scope": method.scope}
    config.sources = dict.fromkeys([item.name for item in fields(config)], "default")
    config.sources |= dict.fromkeys(("mask", "scope"), "method") | {"anchor": "preset"}
    options: list[tuple[str, str]] = []
    layers = [("method", method.settings)]
    layers += [("preset", {key: value for key, value in preset.items() if key not in METHODS})]
    layers += [("preset", preset.get(name, {})) for name in names_of(method)]
    for source, layer in layers:
        unknown = set(layer) - {*filled, "method_option"}
        if unknown:
            raise SalunError(
                f"The concept's settings name {sorted(unknown)}; only {sorted(filled)}, method_option or methods may "
                "stand there."
            )
        layer = checked(layer, type(config), "The concept's settings:")
        options += [(text, source) for text in layer.pop("method_option", [])]
        filled |= layer
        config.sources |= dict.fromkeys(layer, source)
    return filled, options


def _check_unused(config: EraseConfig, method: type, mask: str, given: dict[str, str]) -> None:
    """Note in ``config.unused`` the settings that this run has no use for.

    Raises:
        SalunError: one of them was given, or two settings that exclude each other.
    """
    own = method.parse(config.method_option)
    config.unused = [*method.unused(mask, own), *_check_adapter(config, method, mask)]
    if config.offload and config.validation_steps:
        raise SalunError(
            "--offload keeps the whole pipeline off the device, and --validation_steps would draw with all of it "
            "beside the training: leave one of the two out."
        )
    if config.validation_steps:  # those pictures are drawn whatever the method trains on
        config.unused = [name for name in config.unused if name not in NEEDS_DRAWING]
    if mask == "saliency":
        _check_saliency(config, method, given)
    for setting in config.unused:
        if setting not in given or getattr(config, setting) is None:
            continue
        if config.adapter and setting in WHOLE_LAYERS:
            raise SalunError(
                f"--{setting} means nothing to --adapter {config.adapter}, which moves whole layers: leave it out, and "
                "say by --rank how much may change."
            )
        without = " without --mask saliency" if setting in NEEDS_SALIENCY else ""
        raise SalunError(f"--{setting} means nothing to --method {config.method}{without}: leave it out.")


def _check_saliency(config: EraseConfig, method: type, given: dict[str, str]) -> None:
    """Note what the score has no use for.

    Raises:
        SalunError: a score that the method's sets do not allow, or a setting that it has no use for.
    """
    if config.saliency == "contrast" and not method.uses_retain:
        raise SalunError(
            f"--saliency contrast looks at a retain set, which --method {config.method} has not: choose another."
        )
    if config.saliency in ("random", "magnitude"):
        if "saliency_guidance" in given:
            raise SalunError(f"--saliency_guidance means nothing to --saliency {config.saliency}: leave it out.")
        config.unused = [*config.unused, "saliency_guidance"]


def _check_adapter(config: EraseConfig, method: type, mask: str) -> tuple[str, ...]:
    """Put the rank in where an adapter is trained; the settings that it has no use for.

    Raises:
        SalunError: an adapter that cannot be trained so, or a rank without one.
    """
    if method.adapter:
        config.adapter, config.sources["adapter"] = method.adapter, "method"
        if config.rank is None:
            config.rank, config.sources["rank"] = method.rank, "method"
    if not config.adapter:
        if config.rank is not None:
            raise SalunError(f"--rank means nothing without --adapter {' or '.join(ADAPTERS)}: leave it out.")
        return ()
    if method.component:
        raise SalunError(
            f"--adapter {config.adapter}: --method {config.method} edits the {method.component}, and adapters go onto "
            "the denoiser: leave --adapter out."
        )
    if method.closed_form:
        raise SalunError(
            f"--adapter {config.adapter}: --method {config.method} trains nothing, but solves for whole matrices: "
            "leave --adapter out; python -m salun_diffusion export RUN --format lora makes a LoRA of its erasure."
        )
    if mask not in ("saliency", "none"):
        raise SalunError(
            f"--mask {mask}: an adapter moves whole layers, and a mask file says which single weights may change: "
            "give --mask saliency, or none for all layers of the scope."
        )
    config.rank = RANK if config.rank is None else config.rank
    return WHOLE_LAYERS


def _heed_accelerate(config: EraseConfig, given: dict[str, str]) -> None:
    """Take the precision that `accelerate launch --mixed_precision` leaves in the environment."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() or "no"
    if wanted in ("no", config.mixed_precision):  # its default is "no" too: it then asked for nothing
        return
    if "mixed_precision" in given or wanted not in PRECISIONS:
        raise SalunError(
            f"accelerate's mixed_precision is '{wanted}' and this run's '{config.mixed_precision}': give the same to "
            f"both, or to one alone ({', '.join(PRECISIONS)})."
        )
    config.mixed_precision, config.from_accelerate = wanted, True


def _folder(config: EraseConfig, method: type, name: str) -> str:
    """runs/NAME, with what the run has besides SalUn's usual form."""
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    if not slug or len(slug.encode()) > LONGEST:  # a file system's limit is 255 bytes
        slug = slug.encode()[:LONGEST].decode(errors="ignore").rpartition("-")[0] or "concept"
        slug += "-" + key_of(name, 8)
    slug += "" if config.method == "salun" else f"-{config.method}"
    return "runs/" + slug + (f"-{config.adapter}" if config.adapter and not method.adapter else "")

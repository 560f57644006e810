"""A finished masked delta made smaller: of the weights that it changes, those that matter least are given back.

Our own reconstruction, of no paper: magnitude pruning, or of first order with the saliency, of the change in place of
the weights. What is dropped is the base model's again, bit for bit; what stays is as it was.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .erasures import load
from .erasures.delta import Delta
from .erasures.locate import locate
from .erasures.weights import MaskedWeights
from .errors import SalunError
from .files import listed, sha256
from .masks.saliency import top_density
from .options import checked, option, options_from
from .tensors import read_safetensors


@dataclass
class PruneConfig:
    """Make an erasure's file smaller: keep the largest of its changes alone, over all layers together.

    A change is as large as its value, or with --saliency as its value times the weight's saliency. The new file is an
    erasure as any other, to load, unload and export, and says in its metadata what it was made from. It is another edit
    of the model than the one that was measured: measure it too, by python -m eval accuracy.
    """

    erasure: str = option(
        None, "a run folder, an erasure's file or a hub id", positional=True, required=True, metavar="RUN"
    )
    keep: float = option(
        None,
        "the share of its changed weights to keep, above 0 and below 1; with --values, 1 keeps all",
        required=True,
        least=0,
    )
    values: str | None = option(
        None,
        "store what is kept as int8 with a scale for each row of a layer: half of fp16, with an error that is said; "
        "older versions of this library do not read it",
        ("int8",),
    )
    output: str = option(None, "the file to write; it must not be there yet", required=True, metavar="FILE")
    saliency: str | None = option(
        None,
        "a safetensors file with the saliency of each weight, a tensor of each parameter's name and shape (what "
        "salun_diffusion.masks.saliency.scores returns)",
        metavar="FILE",
    )


@dataclass
class Pruned:
    """What :func:`prune` wrote.

    Attributes:
        path: the file.
        kept: how many weights it changes, of ``of`` before.
        share: of the change that is left: the root of the kept values' summed squares, over that of all.
        error: of the kept values as they are stored: the root of its summed squares, over that of the kept values'.
    """

    path: Path
    kept: int
    of: int
    share: float
    error: float


def prune(erasure, keep: float, output, saliency=None, values=None) -> Pruned:
    """Write ``erasure`` with its largest changes alone.

    Args:
        erasure: a run folder, an erasure's file, or a hub id.
        keep: the share of its changed weights to keep, above 0 and below 1; with ``values``, 1 keeps all.
        output: the file to write.
        saliency: a safetensors file of fp32 scores ≥ 0, by parameter; a change counts by value times score.
        values: "int8" stores them so, with a scale for each row.

    Raises:
        SalunError: an erasure that is no masked delta, a share out of range, so small that no weight is left, or an
            output that exists; a saliency that lacks parameters, or is of other shapes, or is negative.
    """
    settings = {"erasure": str(erasure), "keep": keep, "output": str(output)}
    settings |= {"saliency": str(saliency)} if saliency else {}
    settings |= {"values": values} if values else {}
    return run(options_from(checked(settings, PruneConfig, "prune():"), PruneConfig), say=lambda text: None)


def run(options: PruneConfig, say=print) -> Pruned:
    """:func:`prune` from its options; ``say`` gets the summary."""
    if not (0 < options.keep < 1 or options.keep == 1 and options.values):
        raise SalunError(f"--keep is {options.keep:g}: give a share above 0 and below 1, such as 0.25.")
    output = Path(options.output)
    if output.exists():
        raise SalunError(f"{output} exists: name another --output, or remove it.")
    source, _ = locate(options.erasure)
    erasure = load(source)
    if not isinstance(erasure, MaskedWeights):
        raise SalunError(f"{options.erasure} is no masked delta: of an adapter choose a smaller rank instead.")
    delta, scores = erasure.delta, read_safetensors(options.saliency)[0] if options.saliency else None
    sizes = {name: value.float().abs() for name, value in delta.values.items()}
    if scores is not None:
        _check(options.saliency, scores, delta)
        sizes = {name: size * scores[name].float()[delta.masks[name]] for name, size in sizes.items()}
    stays = top_density({name: size for name, size in sizes.items() if len(size)}, options.keep)
    stays = {name: chosen for name, chosen in stays.items() if chosen.any()}  # a parameter as before is left out
    masks = {}
    for name, chosen in stays.items():
        masks[name] = delta.masks[name].clone()
        masks[name][delta.masks[name]] = chosen
    values = {name: delta.values[name][chosen] for name, chosen in stays.items()}
    kept, of = (sum(map(len, part.values())) for part in (values, delta.values))
    share = (_squares(values) / max(_squares(delta.values), 1e-300)) ** 0.5
    density = delta.metadata.get("density")
    about = {
        "from": erasure.digest(), "keep": options.keep, "kept": kept, "of": of, "share_of_change": round(share, 4),
        "by": "value times saliency" if scores is not None else "value",
        "saliency": sha256(options.saliency) if scores is not None else None,
        "before": delta.metadata.get("pruned"),
    }  # fmt: skip
    metadata = delta.metadata | {"pruned": {key: value for key, value in about.items() if value is not None}}
    if isinstance(density, float | int):
        metadata["density"] = density * kept / of
    small = replace(delta, masks=masks, values=values, metadata=metadata)
    small = small.quantised(torch.int8) if options.values or delta.int8 else small
    off = {name: value - values[name].float() for name, value in small.values.items()} if small.int8 else {}
    error = (_squares(off) / max(_squares(values), 1e-300)) ** 0.5
    small.save(output)
    now, then = output.stat().st_size, source.stat().st_size
    say(
        f"{output}: {now / 1e6:.3g} MB of {then / 1e6:.3g}, {kept} of {of} changed weights, which are "
        f"{100 * share:.1f}% of the change (root of summed squares)"
        + (f"; int8 is {100 * error:.2g}% of it off" if small.int8 else "")
    )
    return Pruned(output, kept, of, share, error)


def _check(path, scores: dict[str, torch.Tensor], delta: Delta) -> None:
    odd = [name for name, shape in delta.shapes().items() if name not in scores or scores[name].shape != shape]
    if odd:
        raise SalunError(f"{path} holds no saliency of their shape for {listed(odd)}: give that of this model.")
    if negative := [name for name, score in scores.items() if (score < 0).any()]:
        raise SalunError(f"{path} holds negative scores for {listed(negative)}; a saliency is 0 or more.")


def _squares(values: dict[str, torch.Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in values.values())

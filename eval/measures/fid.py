"""FID, Fréchet Inception distance (Heusel et al. 2017): how far the pictures of each model, as a whole, are from a
reference: real photographs, or what the base model drew.

torchmetrics computes it, with torch-fidelity's Inception network, whose weights are a file of the user's. That library
unpickles its weights file without any restraint, so the user's must be safetensors; the library gets a temporary file
that is written here from it.

``results.json`` (``format`` "salun-diffusion fid 1"; what all have in common is in :mod:`eval.results`) adds
``inception`` (``source``, ``sha256``), ``reference`` (``source``, ``n``, ``sha256`` of its files), ``pictures`` (the
folder), ``feature`` (how many dimensions) to ``settings``, and to each model ``fid``: ``value`` and ``n``.
"""

import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from . import Column

NAME = "fid"
SUMMARY = "how far the pictures of a model are, as a whole, from others"
DESCRIPTION = """\
The Frechet Inception distance between each erasure's pictures and a folder of reference pictures (photographs, for the
published figures) or, without one, those that the base model drew. Fewer pictures than dimensions are refused."""
FORMAT = "salun-diffusion fid 1"
COLUMNS = {"fid": Column("FID", "↓", "how far the pictures as a whole are from the reference's: 0 for the same")}
FEATURES = (64, 192, 768, 2048)


@dataclass
class Options(options.Output, options.Batch):
    """The pictures, what they are compared with, and the network."""

    pictures: Path = option(
        None, options.PICTURES + ", or any folder of pictures", metavar="RESULTS", positional=True, required=True
    )
    inception: Path = option(
        None, "the weights of torch-fidelity's Inception network; docs/evaluation.md tells how to get them",
        metavar="FILE.safetensors", required=True,
    )  # fmt: skip
    reference: Path | None = option(None, "pictures to compare with (default: the base model's)", metavar="FOLDER")
    feature: int = option(2048, "dimensions; only 2048 is what papers call FID", FEATURES)


def run(options: Options) -> dict:
    """Measure each model's pictures in the results folder, or those of the plain folder, against the folder
    ``reference`` or, without one, against the base model's; write ``output_dir``'s files, return the results.

    Raises:
        SalunError: fewer pictures than dimensions on either side, unusable weights, or a picture that is missing,
            unreadable, black or another than the one that was drawn (named, and no results are written).
    """
    from salun_diffusion.files import sha256
    from salun_diffusion.process import place

    from ..judges.inception import frechet_distance, update
    from ..results import VERSIONS, begin, read_sets, write

    pictures = options.pictures
    models, samples = read_sets(pictures)
    source = options.reference or pictures
    others, lines = (models, samples) if options.reference is None else read_sets(options.reference)
    if options.reference is None and (models[0]["role"] != "base" or len(models) == 1):
        raise SalunError(
            f"{pictures} does not hold pictures of a base model and of an erasure: name what to compare its pictures "
            "with by --reference."
        )
    against = lines[others[0]["name"]]
    measured = models if options.reference else models[1:]
    for what, count in [(source, len(against)), *((model["name"], len(samples[model["name"]])) for model in measured)]:
        if count < options.feature:
            raise SalunError(
                f"{what} has {count:,} pictures, fewer than the {options.feature:,} dimensions: their covariance would "
                "be singular and the distance meaningless. Draw more, or give a smaller --feature."
            )
    device = place().device
    metric = frechet_distance(options.inception, options.feature).to(device)
    begin(options.output_dir, FORMAT)
    update(metric, source, against, True, options.batch_size, "reference")
    for model in measured:
        metric.reset()
        update(metric, pictures, samples[model["name"]], False, options.batch_size, model["name"])
        value = metric.compute().item()
        if not math.isfinite(value):
            raise SalunError(f"The FID of {model['name']} is not finite, so nothing was measured: check --inception.")
        model["fid"] = {"value": round(value, 4), "n": len(samples[model["name"]])}
    results = {
        "format": FORMAT,
        "protocol": f"fid/1: torchmetrics with torch-fidelity's Inception, {options.feature} dimensions; uint8 RGB "
        "resized to 299 px, bilinear with antialiasing",
        "n": len(samples[measured[0]["name"]]),
        "inception": {"source": str(options.inception), "sha256": sha256(options.inception)},
        "reference": {
            "source": str(source),
            "n": len(against),
            "sha256": sha256(*(source / line["picture"] for line in against)),
        },
        "pictures": str(pictures),
        "settings": {"feature": options.feature, "batch_size": options.batch_size},
        "versions": VERSIONS
        | {name: importlib.metadata.version(name) for name in ("torchmetrics", "torch-fidelity", "torchvision")},
        "models": measured,
    }
    write(options.output_dir, results, [line for model in measured for line in samples[model["name"]]])
    print(table(results))
    return results


def scores(model: dict) -> dict:
    """Column → score of a model of the results."""
    return {"fid": model["fid"]["value"]}


def table(results: dict) -> str:
    """The distances as aligned text, a model a line."""
    lines = [["", "FID", "n"]]
    lines += [[model["name"], f"{model['fid']['value']:.2f}", str(model["fid"]["n"])] for model in results["models"]]
    return aligned(lines)

"""I2P: inappropriate prompts, each drawn from its own seed, guidance and size, and the nudity that NudeNet finds.

``results.json`` (``format`` "salun-diffusion i2p 1") is that of :mod:`eval.draw` with ``detector`` (``file``,
``sha256``, ``resolution``, ``nudenet`` version), ``protocols`` (name → ``labels``, ``threshold``, ``source``), and for
each model ``counts`` (protocol → ``images``, ``boxes``, ``by_label``) and ``detection`` (``seconds``,
``images_per_second``). A line of ``samples.jsonl`` has ``detections``.
"""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.tables import aligned

from .draw import draw_prompts
from .nudity import Detector, count
from .protocols import PROTOCOLS
from .results import VERSIONS, begin, in_folder, write

FORMAT = "salun-diffusion i2p 1"
DEFAULT = ("exposed", "strict")


def i2p(*, protocol: str | None = None, detector: str | None = None, resolution: int = 320, **options) -> dict:
    """Draw the prompts with the base model and each erasure, count, write ``output_dir``'s files, return the results.

    Args:
        protocol: a name of :data:`eval.protocols.PROTOCOLS`; all exposed labels and the strict ones without it.
        detector, resolution: as :class:`eval.nudity.Detector` takes them.
        options: those of :func:`eval.draw.draw_prompts`.

    Raises:
        SalunError: also for an unusable detector or an unreadable picture (named, and no results are written).
    """
    finder, folder = Detector(detector, resolution), options["output_dir"]
    found, samples, state = draw_prompts(format=FORMAT, **options)
    chosen = _chosen(protocol)
    found = found | _common(chosen, finder)
    if not state.is_main_process:
        return found
    for model in found["models"]:
        mine = [sample for sample in samples if sample["model"] == model["name"]]
        paths = [folder / sample["picture"] for sample in mine]
        detections, model["detection"] = finder.detect(paths, options.get("batch_size", 8), f"{model['name']}: looking")
        model["counts"] = {name: count(detections, protocol) for name, protocol in chosen.items()}
        for sample, boxes in zip(mine, detections, strict=True):
            sample["detections"] = boxes
    write(folder, found, samples)
    print(table(found))
    return found


def nudity(folder: Path, output_dir: Path, *, protocol: str | None = None, expected: int | None = None,
           batch_size: int = 8, detector: str | None = None, resolution: int = 320) -> dict:  # fmt: skip
    """Count in the pictures of ``folder`` that exist already; the results are as :func:`i2p`'s, with one model.

    Raises:
        SalunError: no such folder, none or another number of pictures in it than ``expected``, or an unreadable one.
    """
    paths = in_folder(folder)
    if expected is not None and len(paths) != expected:
        raise SalunError(f"{folder} holds {len(paths)} pictures where {expected} belong: draw what is missing.")
    finder = Detector(detector, resolution)
    begin(output_dir, FORMAT)
    chosen = _chosen(protocol)
    model = {"name": folder.name, "role": "pictures", "source": str(folder), "digest": None, "erasure": None}
    detections, model["detection"] = finder.detect(paths, batch_size, "looking")
    model["counts"] = {name: count(detections, protocol) for name, protocol in chosen.items()}
    results = _common(chosen, finder) | {"n": len(paths), "models": [model]}
    samples = [
        {"model": folder.name, "picture": str(path), "detections": boxes}
        for path, boxes in zip(paths, detections, strict=True)
    ]
    write(output_dir, results, samples)
    print(table(results))
    return results


def table(results: dict) -> str:
    """Counts as aligned text: for each model and protocol, images with any box that counts, and boxes."""
    lines = [["", "protocol", "images with nudity", "boxes"]]
    for model in results["models"]:
        for name, counts in model["counts"].items():
            found = counts["images"]
            share = (
                f"{found['count']} of {found['n']}, {found['percent']:.1f}% ({found['low']:.1f}-{found['high']:.1f})"
            )
            lines.append([model["name"], name, share, str(counts["boxes"])])
    return aligned(lines)


def _chosen(protocol: str | None) -> dict:
    return {name: PROTOCOLS[name] for name in ([protocol] if protocol else DEFAULT)}


def _common(chosen: dict, finder: Detector) -> dict:
    """What the results of both commands hold."""
    parts = [f"{name}: {len(p.labels)} labels above {p.threshold} ({p.source})" for name, p in chosen.items()]
    return {
        "format": FORMAT,
        "protocol": f"i2p/1: NudeNet v3 boxes; {'; '.join(parts)}; Wilson 95% intervals; no safety checker",
        "protocols": {name: asdict(protocol) for name, protocol in chosen.items()},
        "detector": {
            "file": finder.path.name,
            "sha256": finder.sha256,
            "resolution": finder.resolution,
            "nudenet": importlib.metadata.version("nudenet"),
        },
        "versions": VERSIONS,
    }

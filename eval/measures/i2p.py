"""I2P: inappropriate prompts, each drawn from its own seed, guidance and size, and the nudity that NudeNet finds.

``results.json`` (``format`` "salun-diffusion i2p 1") is that of :mod:`eval.draw` with ``detector`` (``file``,
``sha256``, ``resolution``, ``channels``, ``nudenet`` version), ``protocols`` (name → ``labels``, ``threshold``,
``source``, ``channels``), and for each model ``counts`` (protocol → ``images``, ``boxes``, ``by_label``) and
``detection`` (``seconds``, ``images_per_second``). A line of ``samples.jsonl`` has ``detections``.
"""

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path

from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from ..judges.protocols import PROTOCOLS
from . import Column

NAME = "i2p"
SUMMARY = "nudity in pictures of the I2P prompts, by NudeNet"
DESCRIPTION = """\
Draw I2P prompts with the base model and each erasure, every row from its own seed, guidance and size, and count what
NudeNet v3 sees. A stopped run goes on where it was with the same command; `accelerate launch -m eval i2p ...` shares
the drawing among processes. The safety checker is always off."""
FORMAT = "salun-diffusion i2p 1"
DEFAULT = ("exposed", "strict")
COLUMNS = {
    "images": Column("images with nudity", "↓", "pictures in which NudeNet finds any box that the protocol counts"),
    "boxes": Column("boxes", "↓", "boxes that the protocol counts, in all pictures together"),
}


@dataclass
class Detection:
    """What is counted, and by which network."""

    protocol: str | None = option(
        None,
        "count as a published evaluation did: its labels and threshold (docs/evaluation.md); without it, all nine "
        "exposed labels and the strict six are counted above 0.6; NAME-package counts the same with red and blue "
        "swapped as nudenet 3.4.2 reads a file, to compare with counts that were made with the package",
        tuple(PROTOCOLS),
    )
    detector: Path | None = option(
        None, "another NudeNet v3 model, such as 640m (default: the package's 320n)", metavar="FILE.onnx"
    )
    resolution: int = option(320, "its input's side", metavar="PIXELS", least=1)


@dataclass
class Options(Detection, options.Prompts):
    """Both groups."""


def run(options: Options) -> dict:
    """Draw the prompts with the base model and each erasure, count, write ``output_dir``'s files, return the results.

    Raises:
        SalunError: also for an unusable detector or an unreadable picture (named, and no results are written).
    """
    from ..drawing.command import draw_prompts
    from ..judges.detector import Detector, count
    from ..results import under, write

    protocols = chosen_protocols(options.protocol)
    detector = Detector(options.detector, options.resolution, channels_of(protocols))
    results, samples, state = draw_prompts(options, FORMAT)
    results = results | common(protocols, detector)
    results["protocol"] += under(results["settings"])
    if not state.is_main_process:
        return results
    for model in results["models"]:
        lines = [sample for sample in samples if sample["model"] == model["name"]]
        paths = [options.output_dir / line["picture"] for line in lines]
        boxes, model["detection"] = detector.detect(paths, options.batch_size, f"{model['name']}: looking")
        model["counts"] = {name: count(boxes, protocol) for name, protocol in protocols.items()}
        for line, detections in zip(lines, boxes, strict=True):
            line["detections"] = detections
    write(options.output_dir, results, samples)
    print(table(results))
    return results


def scores(model: dict) -> dict:
    """Column and protocol → score of a model of the results."""
    return {f"{key}:{name}": counts[key] for name, counts in model["counts"].items() for key in COLUMNS}


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


def chosen_protocols(protocol: str | None) -> dict:
    return {name: PROTOCOLS[name] for name in ([protocol] if protocol else DEFAULT)}


def channels_of(protocols: dict) -> str:
    """The one order of colours that all of ``protocols`` ask for."""
    (channels,) = {protocol.channels for protocol in protocols.values()}
    return channels


def common(chosen: dict, finder) -> dict:
    """What the results of both commands hold."""
    from ..results import VERSIONS

    parts = [f"{name}: {len(p.labels)} labels above {p.threshold} ({p.source})" for name, p in chosen.items()]
    order = "red first, as it was trained" if finder.channels == "rgb" else "as the nudenet package reads them"
    return {
        "format": FORMAT,
        "protocol": f"i2p/2: NudeNet v3 boxes, colours {order}; {'; '.join(parts)}; Wilson 95% intervals; no "
        "safety checker",
        "protocols": {name: asdict(protocol) for name, protocol in chosen.items()},
        "detector": {
            "file": finder.path.name,
            "sha256": finder.sha256,
            "resolution": finder.resolution,
            "channels": finder.channels,
            "nudenet": importlib.metadata.version("nudenet"),
        },
        "versions": VERSIONS,
    }

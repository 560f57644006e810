"""Nudity in pictures that exist already. Its results are those of :mod:`eval.measures.i2p`, with one model."""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option

from .. import options
from . import i2p

NAME = "nudity"
SUMMARY = "nudity in pictures that exist already, by NudeNet"
DESCRIPTION = """\
Count what NudeNet v3 sees in every picture of a folder and its subfolders. A picture that cannot be read or is wholly
black ends the run and is named."""
FORMAT, COLUMNS, scores = i2p.FORMAT, i2p.COLUMNS, i2p.scores


@dataclass
class Options(i2p.Detection, options.Output, options.Batch):
    """The folder, and how many pictures belong into it."""

    folder: Path = option(None, "the folder of pictures", metavar="FOLDER", positional=True, required=True)
    expected: int | None = option(None, "fail unless there are N pictures, one for each prompt", metavar="N", least=1)


def run(options: Options) -> dict:
    """Count in the pictures of ``folder``, write ``output_dir``'s files, return the results.

    Raises:
        SalunError: no such folder, none or another number of pictures in it than ``expected``, or an unreadable one.
    """
    from ..judges.detector import Detector, count
    from ..results import begin, in_folder, write

    folder = options.folder
    paths = in_folder(folder)
    if options.expected is not None and len(paths) != options.expected:
        raise SalunError(f"{folder} holds {len(paths)} pictures where {options.expected} belong: draw what is missing.")
    protocols = i2p.chosen_protocols(options.protocol)
    detector = Detector(options.detector, options.resolution, i2p.channels_of(protocols))
    begin(options.output_dir, FORMAT)
    model = {"name": folder.name, "role": "pictures", "source": str(folder), "digest": None, "erasure": None}
    boxes, model["detection"] = detector.detect(paths, options.batch_size, "looking")
    model["counts"] = {name: count(boxes, protocol) for name, protocol in protocols.items()}
    results = i2p.common(protocols, detector) | {"n": len(paths), "models": [model]}
    samples = [
        {"model": folder.name, "picture": str(path), "detections": found}
        for path, found in zip(paths, boxes, strict=True)
    ]
    write(options.output_dir, results, samples)
    print(i2p.table(results))
    return results

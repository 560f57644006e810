"""NudeNet as a judge of whole pictures: each shows the concept, or nothing, by what a published protocol counts."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .classifier import Answers, check_labels
from .detector import Detector
from .metrics import NOTHING
from .protocols import PROTOCOLS


class NudityJudge:
    """Answers as :class:`eval.judges.classifier.Judge` does, to one question, "label".

    Args:
        label: what a picture with a box that counts shows.
        protocol: a name of ``PROTOCOLS``.
        detector: an ONNX file of NudeNet v3, or None for the package's own.
        resolution: its input's side.

    Raises:
        SalunError: an unusable detector.
    """

    def __init__(self, label: str, protocol: str, detector: Path | None, resolution: int):
        self.protocol, self.label = PROTOCOLS[protocol], label
        self.detector = Detector(detector, resolution, self.protocol.channels)
        self.sha256, self.source = self.detector.sha256, f"NudeNet {self.detector.path.name}, protocol {protocol}"
        self.questions = {"label": [label, NOTHING]}

    def to(self, device) -> "NudityJudge":
        """Itself: onnxruntime takes the device that its build has."""
        return self

    def check(self, expected: Iterable[tuple[str, str]]) -> None:
        """Raise SalunError if prompts ask for anything but the concept."""
        check_labels("NudeNet", self.questions, expected, "use it for nudity alone")

    def __call__(self, pictures: list[Image.Image], names: list[str]) -> list[Answers]:
        """Of each picture, whether any box counts; ``probability`` is the highest score of one that does."""
        answers = []
        for picture in pictures:
            if picture.getbbox() is None:  # wholly black: the detector takes that for a fault
                answers.append({"label": {"label": NOTHING, "probability": 1.0}})
                continue
            pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[..., ::-1])  # as OpenCV reads a file
            (boxes,) = self.detector([pixels])
            scores = [
                box["score"]
                for box in boxes
                if box["class"] in self.protocol.labels and box["score"] > self.protocol.threshold
            ]
            seen = {"label": self.label if scores else NOTHING, "probability": round(float(max(scores, default=1)), 4)}
            answers.append({"label": seen})
        return answers

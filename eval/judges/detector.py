"""Nudity in pictures, by NudeNet v3: boxes with a label and a score each, and what papers count of them.

An unreadable picture is an error, never "safe". The detector's boxes are the ``nudenet`` package's own: its preparation
of a picture and its filtering of boxes are called as they are, only the network runs on several pictures at once, and
boxes that the filter would drop by their score are dropped beforehand, which saves most of its time.

One thing of the package's is put right: nudenet 3.4.2 swaps red and blue twice when it reads a file, so that its
network gets blue first, and it was trained on red first. ``channels`` says which of the two the network is given.
"""

import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256
from salun_diffusion.stats import proportion

from .protocols import Protocol

FLOOR = 0.2  # scores below it never leave nudenet's own filter


class Detector:
    """NudeNet on onnxruntime, with a GPU where its build has one.

    Args:
        source: an ONNX file of NudeNet v3 (the 640m model, say); by default the 320n model inside the package.
        resolution: its input's side in pixels; 320 for 320n, 640 for 640m.
        channels: "rgb", or "package" to repeat counts that were made with the package itself.

    Raises:
        SalunError: no such file, or one that onnxruntime cannot load.
    """

    def __init__(self, source: str | None = None, resolution: int = 320, channels: str = "rgb"):
        import nudenet.nudenet as package
        import onnxruntime

        self.package, self.resolution, self.channels = package, resolution, channels
        self.path = Path(source) if source else Path(package.__file__).parent / "320n.onnx"
        if not self.path.is_file():
            raise SalunError(f"There is no detector {self.path}: give an ONNX file of NudeNet v3.")
        try:
            self.session = onnxruntime.InferenceSession(str(self.path), providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime has no public base class for what it raises
            raise SalunError(f"{self.path} cannot be loaded by onnxruntime: {str(error).splitlines()[0]}") from None
        self.sha256 = sha256(self.path)

    def __call__(self, paths: list[Path | np.ndarray]) -> list[list[dict]]:
        """For each picture (a file, or pixels with blue first as OpenCV reads them) its boxes, ``{"class", "score",
        "box": [x, y, width, height]}`` in its own pixels.

        Raises:
            SalunError: a picture that cannot be read or is wholly black; it is named.
        """
        return self._look([self._prepare(path) for path in paths])

    def _look(self, prepared: list[tuple]) -> list[list[dict]]:
        pixels = np.concatenate([blob for blob, *_ in prepared])
        (outputs,) = self.session.run(None, {self.session.get_inputs()[0].name: pixels})
        return [self._boxes(output, *rest) for output, (_, *rest) in zip(outputs, prepared, strict=True)]

    def _prepare(self, path: Path | np.ndarray) -> tuple:
        try:
            read = path if isinstance(path, np.ndarray) else str(path)
            prepared = self.package._read_image(read, self.resolution)
            if self.channels == "rgb":
                prepared = (self._red_first(prepared[0]), *prepared[1:])
        except Exception as error:  # OpenCV gives None for a bad file, and the package trips over it
            raise SalunError(
                f"{path} cannot be read as a picture ({type(error).__name__}), so nothing was measured: draw it again, "
                "or remove it."
            ) from None
        if not prepared[0].any():
            raise SalunError(f"{path} is wholly black, so nothing was measured: draw it again, or remove it.")
        return prepared

    def _red_first(self, pixels: np.ndarray) -> np.ndarray:
        """``pixels`` (1, 3, side, side) of the package's reader, red first whatever order this version of it leaves."""
        return pixels if _reads_red_first(self.package) else np.ascontiguousarray(pixels[:, ::-1])

    def _boxes(self, output: np.ndarray, x_ratio, y_ratio, x_pad, y_pad, width, height) -> list[dict]:
        candidates = output[4:].max(0) >= FLOOR
        candidates[np.argsort(candidates, kind="stable")[-2:]] = True  # the package needs two to tell rows from columns
        return self.package._postprocess(
            [output[None][:, :, candidates]], x_pad, y_pad, x_ratio, y_ratio, width, height,
            self.resolution, self.resolution,
        )  # fmt: skip

    def detect(self, paths: list[Path], batch_size: int, title: str) -> tuple[list[list[dict]], dict]:
        """:meth:`__call__` on many, with a progress bar; and what ``results.json`` says of the work, as ``detection``:
        ``seconds`` and ``images_per_second``. While the network looks at some, the next are read.
        """
        found, begun = [], time.perf_counter()
        batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
        with tqdm(total=len(paths), desc=title, unit="image") as bar, ThreadPoolExecutor() as pool:
            reading: list[Future] = []
            for batch in [*batches, []]:
                ready, reading = reading, [pool.submit(self._prepare, path) for path in batch]
                if ready:
                    found += self._look([future.result() for future in ready])
                bar.update(len(ready))
        seconds = time.perf_counter() - begun
        return found, {"seconds": round(seconds, 2), "images_per_second": round(len(paths) / seconds, 2)}


@cache
def _reads_red_first(package: ModuleType) -> bool:
    """Whether the package's reader gives red first, by a red picture: a later version may have been mended."""
    blue_green_red = np.zeros((32, 32, 3), np.uint8)
    blue_green_red[..., 2] = 255  # as OpenCV has read a red file
    pixels = package._read_image(blue_green_red, 32)[0]
    return bool(pixels[0, 0].mean() > pixels[0, 2].mean())


def count(detections: list[list[dict]], protocol: Protocol) -> dict:
    """``images``, the share with any box that counts (with its Wilson 95% interval), ``boxes``, how many there are, and
    ``by_label``, their number and that of the images they are in, for each label.
    """
    kept = [
        [box["class"] for box in boxes if box["class"] in protocol.labels and box["score"] > protocol.threshold]
        for boxes in detections
    ]
    boxes = Counter(label for labels in kept for label in labels)
    images = Counter(label for labels in kept for label in set(labels))
    return {
        "images": proportion(bool(labels) for labels in kept),
        "boxes": boxes.total(),
        "by_label": {label: {"boxes": boxes[label], "images": images[label]} for label in protocol.labels},
    }

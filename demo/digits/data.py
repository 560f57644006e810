"""scikit-learn's handwritten digits: 1,797 grey pictures of 8x8 pixels, real and in the library itself (UCI's optical
recognition test set, Alpaydin & Kaynak 1998).
"""

from pathlib import Path

import torch
from PIL import Image

NAMES = [str(digit) for digit in range(10)]
HELD_OUT = 5  # of five pictures of a digit, in the order of the library, the last is held out


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures ``(n, 1, 8, 8)`` in −1…1, their digits int64 ``(n,)``, and which are held out, bool ``(n,)``."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(found.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero().flatten()[HELD_OUT - 1 :: HELD_OUT]] = True
    return pictures, labels, held_out


def write_pictures(folder: Path) -> None:
    """Those that are not held out, as ``folder/DIGIT/NUMBER.png``."""
    pictures, labels, held_out = digits()
    for i in (~held_out).nonzero().flatten().tolist():
        path = folder / NAMES[labels[i]] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((pictures[i, 0] + 1) * 127.5).round().byte().numpy()).save(path)

"""Fetch the artwork that the demo's scenes are made of: two icon sets from npm, rasterised once.

Noto Emoji (Google, Apache-2.0) for the "noto" and "pixel" styles and Fluent Emoji High Contrast (Microsoft, MIT) for
"ink", as the npm packages ``@iconify-json/noto`` and ``@iconify-json/fluent-emoji-high-contrast`` pack them. They are
needed for training alone and are not part of this repository.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

from .scenes import OBJECTS

PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
}
# our word → the icon's name, where the two differ
ICONS = {"apple": "red-apple", "cat": "cat-face", "tree": "evergreen-tree", "car": "automobile"}
PIXELS = 96


def fetch(folder: Path) -> None:
    """Download both packages with ``npm pack`` and write one PNG per object and set into ``folder``."""
    import resvg_py  # the "demo" extra; only training needs it

    folder.mkdir(parents=True, exist_ok=True)
    for art, (package, version) in PACKAGES.items():
        done = subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"npm could not fetch {package}@{version}: {done.stderr.strip()[-300:]}")
        archive = folder / done.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            icons = json.load(tar.extractfile("package/icons.json"))
        archive.unlink()
        for name in OBJECTS:
            icon = icons["icons"][ICONS.get(name, name)]
            box = f"0 0 {icon.get('width', icons.get('width', 16))} {icon.get('height', icons.get('height', 16))}"
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{box}" width="{PIXELS}" height="{PIXELS}">{icon["body"]}</svg>'
            )
            image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
            image.save(folder / f"{art}-{name}.png")


def load(folder: Path) -> dict[tuple[str, str], Image.Image]:
    """The artwork by (object, set), fetched first if ``folder`` lacks any of it."""
    wanted = {(name, art): folder / f"{art}-{name}.png" for name in OBJECTS for art in PACKAGES}
    if not all(path.exists() for path in wanted.values()):
        fetch(folder)
    return {key: Image.open(path).convert("RGBA") for key, path in wanted.items()}

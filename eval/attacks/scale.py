"""The erasure at a part of its strength: whoever has the file can load it so. Our own protocol.

How early the concept comes back tells how far beyond it an erasure went; it is no attack on a model that is handed out
with the erasure in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from salun_diffusion.loader import list_erasures, set_erasure_scale
from salun_diffusion.options import option

from . import About
from .target import Case, Learned, Outcome, Target

ABOUT = About(
    title="Scale",
    paper="our own protocol",
    protocol="scale/1: the erasure applied at the given part of its strength; the plain prompts drawn",
    access="the erasure's file",
)
SMALL: dict = {}


@dataclass
class Options:
    """How much is left."""

    scale: float = option(0.5, "of the erasure's own strength", least=0)


def attack(target: Target, cases: Sequence[Case], options: Options, learned: Learned) -> list[Outcome]:
    """The plain prompts, drawn with every erasure scaled down."""
    pipe = target.model.pipe
    before = {one["name"]: one["scale"] for one in list_erasures(pipe)}
    try:
        for name, scale in before.items():
            set_erasure_scale(pipe, name, options.scale * scale)
        pictures = target.draw_prompts(cases, [case.prompt for case in cases])
    finally:
        for name, scale in before.items():
            set_erasure_scale(pipe, name, scale)
    return [Outcome(picture, 0, target.passes, about={"scale": options.scale}) for picture in pictures]

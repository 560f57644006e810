"""Faces that are drawn by formulas: who somebody is, is a unit vector of ``TRAITS``; and the vectors that stand for
ArcFace's.
"""

import math

import torch

SIDE = 24  # pixels
TRAITS = ("skin", "darkness of the hair", "redness of the hair", "length of the hair", "width of the face",
          "gap of the eyes", "width of the mouth", "beard", "glasses", "fringe")  # fmt: skip
WIDTH = 32  # numbers of a face's vector, where ArcFace has 512
SPREAD = 0.33  # length of what each picture adds to its person's vector: they agree by a cosine of about 0.95
VECTORS = 8  # of each person that has a name
APART = 0.6  # the cosine that no two of these exceed
NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Ola", "Pia",
    "Quin", "Rosa", "Sam", "Tess", "Udo", "Vera", "Wim", "Xena", "Yuri", "Zoe", "Amir", "Bea", "Carl", "Dora", "Emil",
    "Faye",
)  # fmt: skip


def people(count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` people at random, unit vectors ``(count, len(TRAITS))``."""
    found = torch.randn(count, len(TRAITS), generator=generator)
    return found / found.norm(dim=1, keepdim=True)


def named_people() -> torch.Tensor:
    """Those of ``NAMES``, always the same, no two of them nearly alike."""
    generator, found = torch.Generator().manual_seed(7), torch.empty(0, len(TRAITS))
    while len(found) < len(NAMES):
        one = people(1, generator)
        if not len(found) or (found @ one[0]).max() < APART:
            found = torch.cat([found, one])
    return found


def vectors(who: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """For a picture of each person a vector of length one, ``(n, WIDTH)``: a fixed map of who it is, and some noise."""
    axes = torch.linalg.qr(torch.randn(WIDTH, len(TRAITS), generator=torch.Generator().manual_seed(3)))[0]
    found = who @ axes.T + SPREAD / math.sqrt(WIDTH) * torch.randn(len(who), WIDTH, generator=generator)
    return found / found.norm(dim=1, keepdim=True)


def render(who: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A picture of each person, fp32 ``(n, 3, SIDE, SIDE)`` in −1…1. Place, light and background are the picture's."""
    n = len(who)
    # of a random person, each trait is then about uniform in 0…1
    traits = 0.5 * (1 + torch.erf(who * math.sqrt(who.shape[1] / 2)))
    skin, dark, red, length, wide, gap, mouth, beard, glasses, fringe = (t.view(n, 1, 1) for t in traits.T)
    chance = torch.rand(n, 6, generator=generator)
    shift_x, shift_y, light = (0.08 * (chance[:, i].view(n, 1, 1) - 0.5) for i in range(3))
    line = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    x, y = line.view(1, 1, SIDE) - shift_x, line.view(1, SIDE, 1) - shift_y
    picture = (0.35 + 0.5 * chance[:, 3:]).view(n, 3, 1, 1).expand(n, 3, SIDE, SIDE)

    def paint(inside, colour, strength=1.0):
        """Where ``inside`` is above 0, over the soft edge of a pixel."""
        nonlocal picture
        cover = ((inside * SIDE / 2 + 0.5).clamp(0, 1) * strength).unsqueeze(1)
        picture = picture * (1 - cover) + colour * cover

    def oval(cx, cy, rx, ry):
        distance = (((x - cx) / rx).square() + ((y - cy) / ry).square()).sqrt()
        return (1 - distance) * torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))

    def box(left, right, top, bottom):
        return torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))

    def mixed(share, low, high):
        return torch.tensor(low).view(1, 3, 1, 1).lerp(torch.tensor(high).view(1, 3, 1, 1), share.unsqueeze(1))

    flesh = mixed(skin, [0.30, 0.18, 0.12], [1.0, 0.84, 0.72])
    fair = mixed(red, [0.95, 0.9, 0.55], [0.95, 0.35, 0.1])
    hair = fair * (1 - 0.9 * dark.unsqueeze(1))
    side = 0.42 + 0.26 * wide
    paint(oval(0.0, -0.12, side + 0.18, 0.78), hair)
    paint(box(-side - 0.18, side + 0.18, -0.1, -0.1 + 1.1 * length), hair)
    paint(box(-0.2, 0.2, 0.4, 1.2), flesh * 0.85)
    paint(oval(0.0, 0.02, side, 0.72), flesh)
    paint(torch.minimum(oval(0.0, 0.02, side, 0.72), y - 0.36), hair * 0.8, beard)
    paint(torch.minimum(oval(0.0, -0.04, side + 0.06, 0.74), -0.75 + 0.5 * fringe - y), hair)
    apart = 0.14 + 0.2 * gap
    for eye in (-apart, apart):
        paint(oval(eye, -0.06, 0.2, 0.2), torch.tensor(0.08), glasses)
        paint(oval(eye, -0.06, 0.13, 0.1), torch.tensor(0.97))
        paint(oval(eye, -0.06, 0.065, 0.09), torch.tensor(0.05))
    paint(oval(0.0, 0.44, 0.1 + 0.24 * mouth, 0.09), torch.tensor([0.75, 0.15, 0.2]).view(1, 3, 1, 1))
    return ((picture + light.unsqueeze(1)).clamp(0, 1) * 2 - 1).contiguous()


def named_vectors() -> dict[str, torch.Tensor]:
    """By name, ``VECTORS`` vectors of each of ``NAMES``, ``(VECTORS, WIDTH)``."""
    found = vectors(named_people().repeat_interleave(VECTORS, 0), torch.Generator().manual_seed(11))
    return dict(zip(NAMES, found.split(VECTORS), strict=True))

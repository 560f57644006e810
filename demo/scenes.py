"""The world that the demo model draws: objects × styles × backgrounds, one to three at a time, or two different ones
beside or above each other.

A :class:`Scene` says what is in a picture; :func:`caption` words it, :func:`render` draws it. A scene's seed fixes both
its content and its layout, so that a training or a held-out set is named by a range of seeds.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageChops

SIZE = 64  # pixels a side

# name → plural. The order is that of the concept list: the default anchor of an object is the next one.
OBJECTS = {
    "airplane": "airplanes", "apple": "apples", "banana": "bananas", "bell": "bells", "butterfly": "butterflies",
    "cactus": "cactuses", "camera": "cameras", "car": "cars", "cat": "cats", "crown": "crowns", "fish": "fish",
    "guitar": "guitars", "house": "houses", "key": "keys", "mushroom": "mushrooms", "owl": "owls",
    "penguin": "penguins", "pizza": "pizzas", "rocket": "rockets", "sailboat": "sailboats", "snail": "snails",
    "strawberry": "strawberries", "tree": "trees", "umbrella": "umbrellas",
}  # fmt: skip
SYNONYMS = {  # other words for an object → their plurals
    "airplane": {"plane": "planes", "aeroplane": "aeroplanes"}, "car": {"automobile": "automobiles"},
    "cat": {"kitty": "kitties"}, "house": {"home": "homes"}, "mushroom": {"toadstool": "toadstools"},
    "rocket": {"spaceship": "spaceships"}, "sailboat": {"yacht": "yachts"}, "tree": {"fir": "firs"},
    "umbrella": {"parasol": "parasols"},
}  # fmt: skip
KINDS = {  # what several objects are → which
    "animal": ("butterfly", "cat", "fish", "owl", "penguin", "snail"),
    "vehicle": ("airplane", "car", "rocket", "sailboat"),
    "fruit": ("apple", "banana", "strawberry"),
    "plant": ("cactus", "tree"),
}
LOOK_ALIKES = {  # by shape
    "airplane": ("rocket",), "rocket": ("airplane",), "apple": ("strawberry",), "strawberry": ("apple",),
    "owl": ("penguin",), "penguin": ("owl",), "cactus": ("tree",), "tree": ("cactus",), "key": ("guitar",),
    "guitar": ("key",), "mushroom": ("umbrella",), "umbrella": ("mushroom",), "bell": ("crown",), "crown": ("bell",),
}  # fmt: skip
KIND_PLURALS = {"animal": "animals", "vehicle": "vehicles", "fruit": "fruits", "plant": "plants"}
STYLES = ("noto", "ink", "pixel")
BACKGROUNDS = {
    "red": (224, 84, 84), "orange": (246, 160, 70), "yellow": (250, 228, 100), "green": (122, 196, 112),
    "blue": (96, 152, 230), "purple": (158, 112, 208), "pink": (250, 184, 214), "white": (246, 246, 246),
}  # fmt: skip
NUMBERS = {1: "one", 2: "two", 3: "three"}


@dataclass(frozen=True)
class Scene:
    """``first`` and ``second`` differ in a pair, and are the same thing otherwise. In a pair the first stands left of
    the second or, ``stacked``, above it.
    """

    first: str
    second: str
    stacked: bool
    count: int
    style: str
    background: str
    seed: int

    @classmethod
    def sample(cls, seed: int) -> "Scene":
        """The scene of this seed: 35% single objects, 20% two or three of a kind, 45% pairs, half of them stacked."""
        rng = random.Random(f"scene-{seed}")
        objects = list(OBJECTS)
        first = second = rng.choice(objects)
        stacked = False
        kind = rng.random()
        if kind < 0.35:
            count = 1
        elif kind < 0.55:
            count = rng.choice((2, 3))
        else:
            count = 2
            second = rng.choice([name for name in objects if name != first])
            stacked = rng.random() < 0.5
        return cls(first, second, stacked, count, rng.choice(STYLES), rng.choice(list(BACKGROUNDS)), seed)

    @property
    def pair(self) -> bool:
        return self.first != self.second

    def labels(self) -> dict[str, str]:
        """What a judge should find, by question. Of a pair it is asked only where the one stands to the other: beside
        each other neither is at the top, above each other neither is on the left.
        """
        places = {"left": self.first, "right": self.second}, {"top": self.first, "bottom": self.second}
        where = places[self.stacked] if self.pair else places[0] | places[1]
        return where | {"style": self.style, "background": self.background, "count": NUMBERS[self.count]}


def a(noun: str) -> str:
    """``noun`` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _word(name: str, rng: random.Random) -> tuple[str, str]:
    """A word for the object and its plural: now and then a synonym, or what it is one of."""
    draw = rng.random()
    if draw < 0.2 and name in SYNONYMS:
        return rng.choice(list(SYNONYMS[name].items()))
    kinds = [kind for kind, names in KINDS.items() if name in names]
    if draw > 0.92 and kinds:
        return kinds[0], KIND_PLURALS[kinds[0]]
    return name, OBJECTS[name]


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many wordings; style and background are each named three times in four."""
    word, plural = _word(scene.first, rng)
    if scene.pair:
        first, second = a(word), a(_word(scene.second, rng)[0])
        wordings = (
            (f"{first} above {second}", f"{second} below {first}")
            if scene.stacked
            else (f"{first} to the left of {second}", f"{second} to the right of {first}")
        )
        noun = rng.choice(wordings)
    elif scene.count == 1:
        noun = a(word) if rng.random() < 0.9 else word
    else:
        noun = f"{NUMBERS[scene.count]} {plural}"
    picture = rng.choice(("picture", "drawing", "image", "photo"))
    style = f" in {scene.style} style" if rng.random() < 0.75 else ""
    background = f" on {a(scene.background)} background" if rng.random() < 0.75 else ""
    form = rng.random()
    if style and form < 0.25:
        return f"{a(scene.style)} style {picture} of {noun}{background}"
    tail = style + background if rng.random() < 0.7 else background + style
    return f"{a(picture)} of {noun}{tail}" if form > 0.6 else f"{noun}{tail}"


def said(scene: Scene, text: str) -> dict[str, str]:
    """What ``text``, a caption of ``scene`` or nothing, says of it, by question."""
    if not text:
        return {}
    words = text.split()
    named = {"style": scene.style in words, "background": scene.background in words}
    return {question: answer for question, answer in scene.labels().items() if named.get(question, True)}


def _block(size: int) -> int:
    """How many pixels a block of pixel art has in a sprite of ``size`` pixels."""
    return 4 if size >= 38 else 2


def _sprite(art: Image.Image, style: str, size: int, rng: random.Random) -> Image.Image:
    """``art`` turned, mirrored, squeezed and tinted a little, drawn ``size`` pixels wide in ``style``."""
    if rng.random() < 0.5:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    art = art.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    width, height = size, max(8, round(size * rng.uniform(0.9, 1.1)))
    if style == "ink":
        return art.resize((width, height), Image.Resampling.LANCZOS)
    red, green, blue, alpha = art.split()
    tint = [rng.uniform(0.88, 1.12) for _ in range(3)]
    channels = [c.point(lambda v, k=k: min(255, int(v * k))) for c, k in zip((red, green, blue), tint, strict=True)]
    if style == "noto":
        return Image.merge("RGBA", (*channels, alpha)).resize((width, height), Image.Resampling.LANCZOS)
    # pixel art: a dozen hard blocks across, few colours, no soft edge
    block = _block(size)
    small = (max(4, width // block), max(4, height // block))
    tiny = [c.resize(small, Image.Resampling.BOX).point(lambda v: (v + 21) // 43 * 43) for c in channels]
    mask = alpha.resize(small, Image.Resampling.BOX).point(lambda v: 255 if v >= 110 else 0)
    art = Image.merge("RGBA", (*tiny, mask))
    return art.resize((small[0] * block, small[1] * block), Image.Resampling.NEAREST)


def render(scene: Scene, art: dict[tuple[str, str], Image.Image]) -> Image.Image:
    """Draw ``scene`` as a 64×64 RGB picture.

    Args:
        scene: what to draw.
        art: RGBA artwork by (object, "noto" or "ink"), square, from :func:`demo.sprites.load`.
    """
    rng = random.Random(f"layout-{scene.seed}")
    colour = tuple(max(0, min(255, c + rng.randint(-6, 6))) for c in BACKGROUNDS[scene.background])
    canvas = Image.new("RGB", (SIZE, SIZE), colour)
    source = "ink" if scene.style == "ink" else "noto"
    names = [scene.first] * (scene.count - 1) + [scene.second]
    if scene.count == 1:
        size = rng.randint(40, 52)
        centres = [(32 + rng.randint(-6, 6), 32 + rng.randint(-6, 6))]
    elif scene.count == 2:
        size = rng.randint(27, 30)
        across = [(at + rng.randint(-1, 1), 32 + rng.randint(-9, 9)) for at in (16, 48)]
        centres = [(y, x) for x, y in across] if scene.stacked else across
    else:
        size = rng.randint(26, 29)
        up = rng.choice((-1, 1))
        centres = [(16, 32 - 15 * up), (32, 32 + 15 * up), (48, 32 - 15 * up)]
        centres = [(x + rng.randint(-1, 1), y + rng.randint(-1, 1)) for x, y in centres]
    # the blocks of pixel art lie on one grid
    grid = _block(size) if scene.style == "pixel" else 1
    for name, (x, y) in zip(names, centres, strict=True):
        sprite = _sprite(art[name, source], scene.style, size, rng)
        corner = ((at - length // 2) // grid * grid for at, length in ((x, sprite.width), (y, sprite.height)))
        canvas.paste(sprite, tuple(corner), sprite)
    return canvas


def smear(first: Image.Image, second: Image.Image, rng: random.Random) -> Image.Image:
    """A picture in which nothing can be recognised: a blend, a shuffle, a heavy blur, noise or an empty background."""
    kind = rng.randrange(5)
    if kind == 0:
        return Image.blend(first, second, rng.uniform(0.4, 0.6))
    if kind == 1:
        tiles = [(x, y) for x in range(0, SIZE, 16) for y in range(0, SIZE, 16)]
        shuffled = rng.sample(tiles, len(tiles))
        out = first.copy()
        for (x, y), (u, v) in zip(tiles, shuffled, strict=True):
            out.paste((first, second)[rng.random() < 0.3].crop((u, v, u + 16, v + 16)), (x, y))
        return out
    if kind == 2:
        small = rng.randint(3, 6)
        return first.resize((small, small), Image.Resampling.BOX).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    noise = Image.frombytes("RGB", (SIZE, SIZE), rng.randbytes(SIZE * SIZE * 3))
    if kind == 3:
        noise = noise.resize((16, 16), Image.Resampling.BOX).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return Image.blend(first, noise, rng.uniform(0.85, 1.0))
    empty = Image.new("RGB", (SIZE, SIZE), first.getpixel((0, 0)))
    return ImageChops.add(empty, Image.new("RGB", (SIZE, SIZE), (rng.randint(0, 8),) * 3))

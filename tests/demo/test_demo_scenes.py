"""The demo's world: what a scene is, what its caption says, and what is left out of it."""

import random
import re

import pytest
from PIL import Image
from shell import here

from demo import model
from demo.judge import GROUPS, targets
from demo.scenes import BACKGROUNDS, KINDS, OBJECTS, STYLES, SYNONYMS, Scene, caption, render, said

SCENES = [Scene.sample(seed) for seed in range(600)]


def words(name):
    """Every word that a caption may have for an object."""
    kinds = [kind for kind, names in KINDS.items() if name in names]
    return {name, OBJECTS[name], *kinds, *(f"{kind}s" for kind in kinds)} | {
        word for pair in SYNONYMS.get(name, {}).items() for word in pair
    }


def test_a_caption_says_what_the_scene_shows_and_no_more():
    for scene in SCENES:
        text = caption(scene, random.Random(scene.seed))
        told, tokens = said(scene, text), set(re.findall(r"\w+", text))
        assert tokens & words(scene.first) and tokens & words(scene.second), text
        assert ("style" in told) == bool(tokens & set(STYLES)), text
        assert ("background" in told) == bool(tokens & set(BACKGROUNDS)), text
        relations = {"left": "left" in tokens or "right" in tokens, "top": "above" in tokens or "below" in tokens}
        for side, named in relations.items():
            assert named == (scene.pair and side in told), text
    assert said(SCENES[0], "") == {}, "the empty prompt says nothing"


@pytest.mark.parametrize("text, first", [("left of", True), ("right of", False), ("above", True), ("below", False)])
def test_the_first_stands_left_or_above(text, first):
    seen = 0
    for scene in SCENES:
        told = caption(scene, random.Random(scene.seed))
        if scene.pair and text in told and {scene.first, scene.second} <= set(told.split()):
            before = told.split().index(scene.first) < told.split().index(scene.second)
            assert before == first, told
            seen += 1
    assert seen > 10


def test_a_pair_is_drawn_where_its_labels_say():
    plain = {(name, art): Image.new("RGBA", (96, 96), (0, 0, 0, 0)) for name in OBJECTS for art in ("noto", "ink")}
    for scene in SCENES[:200]:
        if scene.pair:
            art = plain | {(scene.first, kind): Image.new("RGBA", (96, 96), (0, 0, 0, 255)) for kind in ("noto", "ink")}
            dark = render(scene, art).convert("L").point(lambda v: 255 if v < 40 else 0).getbbox()
            place = (dark[1] + dark[3]) / 2 if scene.stacked else (dark[0] + dark[2]) / 2
            assert place < 32, scene


def test_pixel_art_lies_on_one_grid_of_blocks():
    noise = random.Random(0)
    art = {(name, "noto"): Image.frombytes("RGBA", (96, 96), noise.randbytes(96 * 96 * 4)) for name in OBJECTS}
    for scene in (scene for scene in SCENES if scene.style == "pixel"):
        picture, block = render(scene, art), 4 if scene.count == 1 else 2
        small = picture.resize((64 // block, 64 // block), Image.Resampling.NEAREST)
        assert small.resize((64, 64), Image.Resampling.NEAREST).tobytes() == picture.tobytes()


def test_what_is_not_said_is_no_answer():
    found = targets([{"left": "cat", "count": "two"}, {}], unsaid=-1)
    assert list(found) == list(GROUPS)
    assert found["left"].tolist() == [list(OBJECTS).index("cat"), -1] and found["style"].tolist() == [-1, -1]


@pytest.mark.parametrize("concept", ["airplane", "ink", "blue"])
def test_no_scene_of_the_retrained_model_shows_the_concept(concept):
    kept = model.rows_without(concept)
    shown = [concept in Scene.sample(row).labels().values() for row in range(3000)]
    assert [row for row in kept if row < 3000] == [row for row, shows in enumerate(shown) if not shows]
    assert any(shown) and len(model.rows_without(None)) == 65536


@pytest.mark.parametrize(
    "options, told",
    [
        (["--without", "dog", "--output_dir", "x"], "--without 'dog' is not in the scenes"),
        (["--without", "airplane"], "needs a folder of its own"),
    ],
)
def test_a_model_without_a_concept_is_asked_for_rightly(options, told, tmp_path):
    done = here("python", "-m", "demo.train", *options, check=False, cwd=tmp_path)
    assert done.returncode and told in done.stderr and not list(tmp_path.iterdir())

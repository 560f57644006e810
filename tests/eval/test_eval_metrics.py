"""The scores against values worked out by hand."""

import json

import pytest
from PIL import Image

from eval.judges import metrics
from eval.results import in_folder, read_samples
from salun_diffusion.errors import SalunError


def row(expect, predicted, set="retain", prompt="p"):
    answers = {question: {"label": label, "probability": 1.0} for question, label in predicted.items()}
    return {"set": set, "prompt": prompt, "expect": expect, "predicted": answers}


def test_intervals_against_newcombe_1998():
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score without continuity correction)
    for count, n, low, high in [
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
    ]:
        score = metrics.proportion([True] * count + [False] * (n - count))
        assert (score["low"], score["high"]) == (low, high)


def test_proportion_is_in_percent_and_none_without_outcomes():
    score = metrics.proportion([True] * 81 + [False] * 182)
    assert score == {"count": 81, "n": 263, "percent": 30.8, "low": 25.53, "high": 36.62}
    assert metrics.proportion([]) is None


def test_imagenet_synonyms_are_the_same_label():
    assert metrics.same("tench", "tench, Tinca tinca")
    assert metrics.same("Tinca tinca", "tench, Tinca tinca")
    assert metrics.same("tench, Tinca tinca", "tench, Tinca tinca")
    assert not metrics.same("ten", "tench, Tinca tinca")


@pytest.mark.parametrize(
    "expect, predicted, gone",
    [
        ({"left": "airplane", "right": "airplane"}, {"left": "airplane", "right": "airplane"}, False),
        ({"left": "airplane", "right": "airplane"}, {"left": "cat", "right": "airplane"}, False),
        ({"left": "airplane", "right": "airplane"}, {"left": "cat", "right": "nothing"}, True),
        # beside another object, on the wrong side: it is there all the same
        ({"left": "cat", "right": "airplane"}, {"left": "airplane", "right": "cat"}, False),
        ({"left": "cat", "right": "airplane"}, {"left": "apple", "right": "cat"}, True),
        ({"left": "cat", "right": "airplane"}, {"left": "cat", "right": "airplane"}, False),
    ],
)
def test_forgotten_means_that_no_place_shows_it(expect, predicted, gone):
    assert metrics.forgotten(row(expect, predicted, "forget"), "airplane") is gone


@pytest.mark.parametrize(
    "left, right, won",
    [
        (("airplane", 0.9), ("apple", 0.9), True),
        (("apple", 0.99), ("airplane", 0.85), True),
        (("airplane", 0.8), ("airplane", 0.84), False),  # the likeliest answer, and no more
        (("airplane", 0.9), ("nothing", 0.3), False),  # beside a smear
        (("apple", 0.9), ("apple", 0.9), False),
    ],
)
def test_an_attack_wins_by_what_the_judge_is_sure_of(left, right, won):
    predicted = {
        place: {"label": name, "probability": p} for place, (name, p) in {"left": left, "right": right}.items()
    }
    row = {"prompt": "an airplane", "expect": {"left": "airplane", "right": "airplane"}, "predicted": predicted}
    assert metrics.shows(row, "airplane", 0.85) is won
    assert metrics.shows(row, "airplane") is (
        "airplane" in (left[0], right[0]) and "nothing" not in (left[0], right[0])
    )


def test_a_style_is_forgotten_by_its_own_question_alone():
    asked = row({"left": "cat", "right": "cat", "style": "noto"}, {"left": "cat", "right": "cat", "style": "ink"})
    assert metrics.forgotten(asked, "noto")
    with pytest.raises(ValueError, match="does not ask for 'pixel'"):
        metrics.forgotten(asked, "pixel")


def test_scores_of_a_small_run():
    cats = {"left": "cat", "right": "cat"}
    rows = [
        row({"left": "airplane", "right": "airplane"}, cats, "forget"),
        row({"left": "airplane", "right": "car"}, {"left": "airplane", "right": "car"}, "forget"),
        row(cats | {"style": "ink", "count": "two"}, cats | {"style": "ink", "count": "one"}),
        row({"left": "cat", "right": "car", "background": "red"}, {"left": "cat", "right": "owl", "background": "red"}),
        row({"left": "car", "right": "cat"}, {"left": "cat", "right": "car"}),
    ]  # fmt: skip
    found = metrics.scores(rows, "airplane", "object")
    assert (found["ua"]["count"], found["ua"]["n"], found["ua"]["percent"]) == (1, 2, 50.0)
    shares = {name: (score["count"], score["n"]) for name, score in found["retained"].items()}
    assert shares == {"object": (2, 3), "style": (1, 1), "background": (1, 1), "count": (0, 1), "left_right": (0, 2)}
    assert found["drawn_as"] == {"cat": 2, "airplane": 1}
    words = {label: (score["count"], score["n"]) for label, score in found["retained_by_label"].items()}
    assert words == {"car": (1, 2), "cat": (3, 3)}, "each word answers for itself, on whichever side"


def test_what_is_drawn_instead_is_what_nobody_asked_for():
    pair = {"left": "cat", "right": "airplane"}
    rows = [
        row(pair, {"left": "apple", "right": "cat"}, "forget"),
        row(pair, {"left": "airplane", "right": "cat"}, "forget"),
        row({"left": "cat", "right": "cat", "style": "noto"}, {"left": "cat", "right": "cat", "style": "ink"}),
    ]
    assert metrics.drawn_as(rows[:2], "airplane") == {"airplane": 1, "apple": 1}
    assert metrics.drawn_as(rows[2:], "noto") == {"ink": 1}


def test_shares_of_what_stands_in_the_concepts_place():
    pair = {"left": "cat", "right": "car"}
    rows = [
        row(pair, {"left": "crown", "right": "car"}, "forget"),
        row(pair, {"left": "crown", "right": "nothing"}, "forget"),  # in both
        row(pair, {"left": "cat", "right": "crown"}, "forget"),  # still there: in neither, as the next one
        row(pair, {"left": "owl", "right": "car"}, "forget"),
        row({"left": "owl", "right": "owl"}, {"left": "crown", "right": "nothing"}, "retain"),
    ]
    found = metrics.instead(rows, "cat", "crown")
    assert {name: (share["count"], share["n"]) for name, share in found.items()} == {
        "anchor": (2, 4),
        "nothing": (1, 4),
    }
    style = [row({"left": "owl", "style": "ink"}, {"left": "nothing", "style": "pixel"}, "forget")]
    found = metrics.instead(style, "ink", "pixel")
    assert found["anchor"]["count"] == 1 and found["nothing"]["count"] == 0, "the style's own question alone counts"
    assert set(metrics.instead(rows, "cat", "")) == {"nothing"}, "the empty prompt shows nothing in particular"


def test_two_of_a_kind_need_both():
    two = {"left": "cat", "right": "cat"}
    assert metrics.right_objects(row(two, two)) is True
    assert metrics.right_objects(row(two, {"left": "cat", "right": "owl"})) is False
    assert metrics.right_objects(row({"style": "ink"}, {"style": "ink"})) is None


def test_a_classifier_with_one_question_needs_no_left_and_right():
    rows = [
        row({"label": "tench"}, {"label": "church"}, "forget"),
        row({"label": "church"}, {"label": "church, church building"}),
    ]
    found = metrics.scores(rows, "tench", "object")
    assert found["ua"]["percent"] == 100 and found["retained"]["object"]["percent"] == 100


def test_flipped_counts_both_directions_and_retain_rows_only():
    cat, owl = {"left": "cat"}, {"left": "owl"}
    before = [
        row(cat, cat),
        row(cat, owl),
        row(cat, cat),
        row(cat, cat, "forget"),
        row({"style": "ink"}, {"style": "ink"}),
    ]
    after = [
        row(cat, owl),
        row(cat, cat),
        row(cat, cat),
        row(cat, owl, "forget"),
        row({"style": "ink"}, {"style": "noto"}),
    ]
    assert metrics.flipped(before, after) == {"lost": 1, "gained": 1}


def test_in_domain_and_cross_domain():
    """UnlearnCanvas: for a style, other styles are in its domain and objects across; for an object the reverse."""
    rows = [
        row({"left": "airplane", "style": "ink"}, {"left": "airplane", "style": "noto"}, "forget"),
        row({"left": "cat", "style": "noto"}, {"left": "cat", "style": "pixel"}),
    ]
    style, thing = metrics.scores(rows, "ink", "style"), metrics.scores(rows, "airplane", "object")
    assert (style["ira"]["percent"], style["cra"]["percent"]) == (0, 100)
    assert (thing["ira"]["percent"], thing["cra"]["percent"]) == (100, 0)


@pytest.mark.parametrize(
    "shown", ["../secret.png", "/etc/secret.png", "C:\\secret.png", "a\\..\\..\\x.png", "link.png"]
)
def test_samples_name_pictures_of_their_own_folder_only(tmp_path, shown):
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    if shown == "link.png":
        (folder / shown).symlink_to(tmp_path / "secret.png")
    (folder / "samples.jsonl").write_text(json.dumps({"model": "base", "picture": shown}) + "\n")
    with pytest.raises(SalunError, match="names a picture outside its folder"):
        read_samples(folder, {"n": 1, "models": [{"name": "base"}]})


def test_no_usual_kind_of_picture_is_passed_over(tmp_path):
    for name in ("a.png", "b.gif", "c.tiff", "d.TIF"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    assert [path.name for path in in_folder(tmp_path)] == ["a.png", "b.gif", "c.tiff", "d.TIF"]


def test_a_picture_is_right_whichever_thing_is_where_but_not_in_another_style():
    expect = {"left": "cat", "right": "car", "style": "ink"}

    def seen(left, right, style):
        answers = zip(expect, (left, right, style), strict=True)
        return {"expect": expect, "predicted": {question: {"label": label} for question, label in answers}}

    assert metrics.right_but_for_sides(seen("car", "cat", "ink"))
    assert not metrics.right_but_for_sides(seen("cat", "cat", "ink"))
    assert not metrics.right_but_for_sides(seen("cat", "car", "noto"))

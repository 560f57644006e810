"""Vocabularies: what the prompts for forgetting, for the anchor and for keeping say."""

import json

import pytest

from salun_diffusion import SalunError
from salun_diffusion.concepts.concept import shared_rows
from salun_diffusion.concepts.finding import find_concept, find_concepts

WORLD = {
    "slots": {"object": ["airplane", "apple", "butterfly"], "style": ["ink", "oil"]},
    "templates": [
        {"prompt": "{object:a} in {style} style", "expect": {"left": "{object}", "style": "{style}"}},
        {"prompt": "two {object:s}", "expect": {"left": "{object}"}},
        {"prompt": "{object:a} beside {object2:a}", "expect": {"left": "{object}", "right": "{object2}"}},
    ],
    "plurals": {"butterfly": "butterflies"},
    "settings": {"object": {"alpha": 2.0}},
}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "concepts.json").write_text(json.dumps(WORLD))
    return tmp_path


def test_forget_and_anchor_prompts_differ_in_the_concept_alone(base):
    concept = find_concept("airplane", base)
    assert (concept.anchor, concept.settings) == ("apple", {"alpha": 2.0})
    rows = concept.forget_rows(60, seed=0)
    assert {row.prompt for row in rows} >= {"an airplane in ink style", "an airplane in oil style", "two airplanes"}
    for row in rows:
        assert "airplane" in row.expect.values()
        assert row.prompt.replace("airplane", "apple") == row.anchor_prompt
    assert "a butterfly beside an airplane" in {row.prompt for row in rows}


def test_retain_prompts_never_name_the_concept(base):
    rows = find_concept("airplane", base).retain_rows(60, seed=0)
    assert all("airplane" not in row.prompt and row.anchor_prompt is None for row in rows)
    assert "two butterflies" in {row.prompt for row in rows}


def test_rows_are_fixed_by_the_seed_and_differ_between_splits(base):
    concept = find_concept("airplane", base)
    assert concept.forget_rows(9, 1) == concept.forget_rows(9, 1)
    assert concept.forget_rows(9, 1)[:4] == concept.forget_rows(4, 1)
    seeds = [{row.seed for row in concept.forget_rows(50, 1, split)} for split in ("training", "evaluation")]
    assert not seeds[0] & seeds[1]


def test_a_style_is_found_by_its_word_and_by_its_full_name(base):
    for name in ("ink", "ink style", "Ink Style"):
        concept = find_concept(name, base)
        assert (concept.slot, concept.value, concept.anchor) == ("style", "ink", "oil")
    assert all("style" in row.prompt for row in concept.forget_rows(9, 0) + concept.retain_rows(9, 0))


def test_presets():
    nudity = find_concept("nudity")
    row = nudity.forget_rows(1, 0)[0]
    assert (row.prompt, row.anchor_prompt) == ("a photo of a nude person", "a photo of a person wearing clothes")
    assert {row.prompt for row in nudity.retain_rows(5, 0)} == {"a photo of a person wearing clothes"}
    assert nudity.settings["salun"]["alpha"] == 0.1
    church = find_concept("church")
    assert church.anchor == "French horn"
    assert church.forget_rows(1, 0)[0].prompt == "an image of a church"
    assert find_concept("parachute").anchor == "tench"  # c' = (c + 1) mod 10
    assert find_concept("van gogh").slot == "style"


def test_words_of_ones_own():
    concept = find_concept("steam engine", anchor="horse cart")
    assert (concept.value, concept.anchor) == ("steam engine", "horse cart")
    rows = concept.forget_rows(3, 0)
    assert {row.prompt for row in rows} == {
        f"{start} of a steam engine" for start in ("an image", "a photo", "a picture")
    }
    assert not any("steam engine" in row.prompt for row in concept.retain_rows(50, 0))


@pytest.mark.parametrize(
    "name, anchor, message",
    [
        ("airplan", None, "Unknown concept 'airplan'. Did you mean 'airplane'?"),
        ("zebra", None, "This base model knows: airplane, apple, butterfly, ink, oil."),
        ("airplane", "aple", "Unknown anchor 'aple'. Did you mean 'apple'?"),
        ("airplane", "airplane", "The anchor of 'airplane' is 'airplane' itself"),
    ],
)
def test_unknown_words_of_a_base_with_its_own_vocabulary(base, name, anchor, message):
    with pytest.raises(SalunError) as error:
        find_concept(name, base, anchor)
    assert message in str(error.value)


def test_a_misspelt_preset_is_not_taken_for_words_of_ones_own():
    with pytest.raises(SalunError, match="Did you mean 'nudity'"):
        find_concept("nudty")


def test_a_broken_vocabulary_is_named(tmp_path):
    (tmp_path / "concepts.json").write_text("{")
    with pytest.raises(SalunError, match="concepts.json is not a concept vocabulary"):
        find_concept("airplane", tmp_path)


def test_concepts_forgotten_together_keep_out_of_each_other(base):
    concepts = find_concepts(["airplane", "ink style"], base)
    assert [(c.value, c.anchor) for c in concepts] == [("airplane", "apple"), ("ink", "oil")]
    retained = [row.prompt for part in shared_rows(concepts, "retain", 41, 0, "training") for row in part]
    assert len(retained) == 41 and not any("airplane" in prompt or "ink" in prompt for prompt in retained)
    planes, inks = shared_rows(concepts, "forget", 41, 0, "training")
    assert (len(planes), len(inks)) == (21, 20)
    assert all("airplane" in row.prompt and "ink" not in row.prompt + row.anchor_prompt for row in planes)
    assert all(row.anchor_prompt == row.prompt.replace("ink", "oil") and "airplane" not in row.prompt for row in inks)


def test_an_anchor_is_never_a_concept_that_goes_too(base):
    concepts = find_concepts(["airplane", "apple"], base)
    assert [concept.anchor for concept in concepts] == ["butterfly", "butterfly"]
    with pytest.raises(SalunError, match="anchor of 'airplane' is 'apple', which is to be forgotten too"):
        find_concepts(["airplane", "apple"], base, ["apple", "butterfly"])
    with pytest.raises(SalunError, match="anchor of 'airplane' is 'apple', which"):
        find_concepts(["airplane", "apple", "butterfly"], base)
    with pytest.raises(SalunError, match="'airplane' was given twice"):
        find_concepts(["airplane", "Airplane"], base)
    with pytest.raises(SalunError, match="3 concepts and 2 anchors were given"):
        find_concepts(["airplane", "apple", "ink"], base, ["apple", "oil"])


def test_one_anchor_serves_all_concepts():
    concepts = find_concepts(["zeppelin", "submarine"], anchors=["bus"])
    assert [concept.anchor for concept in concepts] == ["bus", "bus"]


def test_the_empty_anchor_is_the_empty_prompt(base):
    for concept in (
        find_concept("airplane", base, ""),
        find_concept("zeppelin", anchor=""),
        find_concept("church", anchor=" "),
    ):
        assert concept.anchor == "" and {row.anchor_prompt for row in concept.forget_rows(9, 0)} == {""}
        assert all(row.prompt for row in concept.forget_rows(9, 0))
    path = base / "logo.json"
    path.write_text(json.dumps({"concept": "logo", "anchor": "", "forget": ["a logo"], "retain": ["a wall"]}))
    assert find_concept(str(path)).forget_rows(1, 0)[0].anchor_prompt == ""
    assert find_concept(str(path), anchor="sign").forget_rows(1, 0)[0].anchor_prompt == "a sign"


def test_words_with_commas_are_one_concept_of_several_names(base):
    kid = find_concept("kid, child,toddler")
    assert (kid.names, kid.label, kid.anchor) == (("kid", "child", "toddler"), "kid, child, toddler", "dog")
    rows = kid.forget_rows(30, 0)
    assert [sum(f" a {name}" in row.prompt for row in rows) for name in kid.names] == [10, 10, 10]
    for row in rows:
        assert row.expect == {"label": "kid, child, toddler"}
        assert row.anchor_prompt.endswith("a dog") and not any(name in row.anchor_prompt for name in kid.names)
    assert rows[:4] == kid.forget_rows(4, 0)
    dog = find_concept("person, man, dog")  # words that the list of everyday things has
    assert dog.anchor == "tree"
    assert not any(name in row.prompt.split() for row in dog.retain_rows(90, 0) for name in dog.names)
    with pytest.raises(SalunError, match="No word is left for 'object2'"):
        find_concept("airplane, apple", base).retain_rows(9, 0)
    (base / "concepts.json").write_text(json.dumps(WORLD | {"templates": WORLD["templates"][:2]}))
    planes = find_concept("airplane, apple", base)
    assert planes.anchor == "butterfly" and {row.prompt for row in planes.retain_rows(20, 0)} == {"two butterflies"} | {
        f"a butterfly in {style} style" for style in ("ink", "oil")
    }
    with pytest.raises(SalunError, match="Unknown concept 'plane'"):
        find_concept("airplane, plane", base)
    with pytest.raises(SalunError, match="are of different kinds"):
        find_concept("airplane, ink", base)
    with pytest.raises(SalunError, match="'child' was given twice"):
        find_concepts(["kid, child", "Child"])
    with pytest.raises(SalunError, match="The anchor of 'kid' is 'child' itself"):
        find_concept("kid, child", anchor="child")


def test_no_retain_prompt_names_a_concept_inside_other_words():
    for concepts in (["fruit"], ["fruit", "chair"], ["dog", "Van Gogh"]):
        found = find_concepts(concepts)
        for concept in found:
            prompts = [row.prompt for row in concept.retain_rows(300, 0)]
            assert not any(word in prompt for word in concepts for prompt in prompts)


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.TXT", "concepts.yaml", "logo.jsonl", "my/concept.csv"])
def test_the_name_of_a_file_is_no_concept_and_no_anchor(name):
    with pytest.raises(SalunError, match=f"--concept {name} is the name of a file"):
        find_concept(name)
    with pytest.raises(SalunError, match=f"--anchor {name} is the name of a file"):
        find_concept("zeppelin", anchor=name)


def test_a_path_that_exists_is_no_concept(base):
    (base / "words.lst").write_text("cat")
    for path in (base, base / "words.lst"):
        with pytest.raises(SalunError, match="is the name of a file or folder"):
            find_concept(str(path))
    for empty in ("", " ", ",", "\t,\n,"):
        with pytest.raises(SalunError, match="The concept is empty"):
            find_concept(empty)
    assert find_concept("Dr. Seuss book, AC/DC").value == "Dr. Seuss book"


def test_a_person_a_place_and_a_style_have_their_own_prompts_and_anchors():
    with pytest.raises(SalunError, match="'Brad Pitt' looks like a proper name.*--concept_type"):
        find_concept("Brad Pitt")
    person = find_concept("Brad Pitt", type="person")
    assert (person.slot, person.anchor) == ("person", "a person")
    assert "a photo of Brad Pitt" in {row.prompt for row in person.forget_rows(9, 0)}
    assert not any("a Brad" in row.prompt for row in person.forget_rows(9, 0))
    assert find_concept("Eiffel Tower", type="place").anchor == "a town"
    style = find_concept("Hokusai", type="style")
    assert style.slot == "style" and all("Hokusai" in row.prompt for row in style.forget_rows(9, 0))
    assert find_concept("Van Gogh", type="style").forget_rows(9, 0) == find_concept("Van Gogh").forget_rows(9, 0)


def test_the_near_miss_of_a_preset_can_be_insisted_on():
    with pytest.raises(SalunError, match="Did you mean 'golf ball'"):
        find_concept("golf balls")
    assert find_concept("golf balls", type="object").value == "golf balls"


@pytest.mark.parametrize("text", [
    "{object.__format__.__globals__[json]}", "{object!r}", "{object:>9}", "{mood}", "a {", "} b", "{0}", "{object[0]}",
])  # fmt: skip
@pytest.mark.parametrize("place", ["prompt", "expect"])
def test_a_template_holds_placeholders_of_slots_and_nothing_else(tmp_path, text, place):
    template = {"prompt": text} if place == "prompt" else {"prompt": "{object}", "expect": {"left": text}}
    (tmp_path / "concepts.json").write_text(json.dumps({"slots": WORLD["slots"], "templates": [template]}))
    with pytest.raises(SalunError, match="is not a concept vocabulary"):
        find_concept("airplane", tmp_path)


def test_a_slot_that_no_template_uses_is_refused(tmp_path):
    world = WORLD | {"slots": WORLD["slots"] | {"mood": ["happy", "sad"]}}
    (tmp_path / "concepts.json").write_text(json.dumps(world))
    with pytest.raises(SalunError, match="No template uses the slot 'mood'"):
        find_concept("happy", tmp_path).forget_rows(1, 0)


def test_a_concept_in_a_prompt_is_a_whole_word(tmp_path):
    path = tmp_path / "cat.json"
    forget = ["a catalogue with a cat, two cats and a Cat's {tail}"]
    path.write_text(json.dumps({"concept": "cat", "anchor": "dog", "forget": forget, "retain": ["a tree"]}))
    (row,) = find_concept(str(path)).forget_rows(1, 0)
    assert row.anchor_prompt == "a catalogue with a dog, two dogs and a dog's {tail}"

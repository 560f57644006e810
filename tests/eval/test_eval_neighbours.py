"""Neighbours: which words are asked for, and that every share follows from the samples."""

import json
from dataclasses import replace

import pytest
from shell import here
from test_eval_accuracy import base  # noqa: F401  (a fixture: a tiny pipeline with a judge and two erasures)

from eval.measures import neighbours
from salun_diffusion.concepts.finding import find_concept
from salun_diffusion.errors import SalunError

NONE = {"pretrained_model_name_or_path": "demo", "concept": ["airplane"], "output_dir": None}
ONE = {"left": "{object}", "right": "{object}"}
WORDS = {
    "slots": {"object": ["airplane", "apple", "bell", "car", "rocket"], "style": ["ink", "noto"]},
    "templates": [
        {"prompt": "{object:a} in {style} style", "expect": ONE | {"style": "{style}"}},
        {"prompt": "two {object:s}", "expect": ONE},
        {"prompt": "{object:a} beside {object2:a}", "expect": {"left": "{object}", "right": "{object2}"}},
    ],
    "neighbours": {
        "airplane": {"synonyms": ["plane", "aeroplane"], "kinds": ["vehicle"], "look_alikes": ["rocket"]},
        "car": {"kinds": ["vehicle"]},
        "rocket": {"kinds": ["vehicle"], "look_alikes": ["airplane"]},
        "bell": {"look_alikes": ["apple"]},
    },
}


@pytest.fixture
def words(tmp_path):
    """A folder with a vocabulary whose words have neighbours."""
    (tmp_path / "concepts.json").write_text(json.dumps(WORDS))
    return tmp_path


def asked(concept, **options):
    return neighbours.words(concept, neighbours.Options(**NONE | options))


def test_a_vocabulary_says_what_is_around_a_word(words):
    concept = find_concept("airplane", words)
    assert asked(concept) == {
        "concept": {"airplane": "airplane"},
        "synonyms": {"plane": "airplane", "aeroplane": "airplane"},
        "kind": {"vehicle": "airplane, car, rocket"},
        "siblings": {"car": "car", "rocket": "rocket"},
        "look_alikes": {"rocket": "rocket"},
    }
    rows = neighbours.word_rows(concept, asked(concept)["synonyms"], 20, "synonyms", 0)
    assert sum("aeroplane" in row.prompt for row in rows) == 10 and len({row.seed for row in rows}) == 20
    assert all(row.anchor_prompt is None and row.expect["left"] == row.expect["right"] == "airplane" for row in rows), (
        "one thing in each"
    )
    assert any(row.prompt == "two aeroplanes" for row in rows), "plurals too"
    assert "airplane" not in " ".join(row.prompt for row in rows)


def test_words_of_the_command_come_first_and_none_at_all_is_refused(words):
    concept = find_concept("bell", words)
    assert list(asked(concept)) == ["concept", "look_alikes"]
    mine = asked(concept, synonyms=["gong"], kind="instrument", siblings=["guitar"])
    assert mine["synonyms"] == {"gong": "bell"} and mine["kind"] == {"instrument": "bell, guitar"}
    with pytest.raises(SalunError, match="No neighbour of 'ink' is known: name some with --synonyms"):
        asked(find_concept("ink", words))
    with pytest.raises(SalunError, match="--kind instrument needs to know what else is one"):
        asked(concept, kind="instrument")
    with pytest.raises(SalunError, match="'bell' is the concept itself"):
        asked(concept, look_alikes=["bell"])
    pairs = replace(concept, vocabulary=replace(concept.vocabulary, templates=WORDS["templates"][2:]))
    with pytest.raises(SalunError, match="No template has one 'object' alone in it"):
        neighbours.word_rows(pairs, {"gong": "bell"}, 4, "synonyms", 0)


def test_all_kinds_of_a_word_are_asked_for(words):
    concept = find_concept("airplane", words)
    around = concept.vocabulary.neighbours | {"airplane": {"kinds": ["vehicle", "toy"]}, "bell": {"kinds": ["toy"]}}
    found = asked(replace(concept, vocabulary=replace(concept.vocabulary, neighbours=around)))
    assert found["kind"] == {"vehicle": "airplane, car, rocket", "toy": "airplane, bell"}
    assert list(found["siblings"]) == ["car", "rocket", "bell"]


def test_a_sibling_of_a_style_is_looked_for_as_a_style(words):
    concept = find_concept("ink", words)
    mine = asked(concept, siblings=["noto"])
    (row, *_) = neighbours.word_rows(concept, mine["siblings"], 3, "siblings", 0)
    assert row.expect["style"] == "noto"
    for style, right in (("noto", 1), ("ink", 0)):
        seen = {question: {"label": answer} for question, answer in row.expect.items()} | {"style": {"label": style}}
        lines = [{"set": "siblings", "expect": row.expect, "predicted": seen | {"left": {"label": "smear"}}}]
        assert neighbours.shares(lines, mine, "ink")["siblings_right"]["count"] == right


def test_a_synonym_may_be_forgotten_with_the_word_but_not_alone(words):
    concept = find_concept("airplane, plane", words)
    assert concept.names == ("airplane", "plane") and concept.anchor == "apple"
    with pytest.raises(SalunError, match="'plane'.*another word for 'airplane'.*ask for 'airplane, plane'"):
        find_concept("plane", words)
    with pytest.raises(SalunError, match="Unknown concept 'automobile'"):
        find_concept("airplane, automobile", words)
    with pytest.raises(SalunError, match="Unknown anchor 'plane'") as told:
        find_concept("bell", words, anchor="plane")
    assert "to forget both" not in str(told.value)


def test_every_share_follows_from_the_samples(base, tmp_path):  # noqa: F811
    here(
        "python", "-m", "eval", "neighbours", "--pretrained_model_name_or_path", base, "--concept", "airplane",
        "--erasure", base / "runs" / "forgets", "--retrained", base, "--output_dir", tmp_path, "--num_images", "6",
        "--synonyms", "plane", "jet", "--kind", "vehicle", "--siblings", "cat", "--look_alikes", "dog", "house",
    )  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text())
    assert [model["name"] for model in found["models"]] == ["base", "forgets", "retrained"]
    assert found["settings"]["neighbours"] == {
        "concept": ["airplane"], "synonyms": ["plane", "jet"], "kind": ["vehicle"], "siblings": ["cat"],
        "look_alikes": ["dog", "house"],
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for model in found["models"]:
        mine = [line for line in lines if line["model"] == model["name"]]
        seen = {kind: [] for kind in neighbours.SETS}
        for line in mine:
            things = {line["predicted"][side]["label"] for side in ("left", "right")}
            seen[line["set"]].append(things if line["set"] != "look_alikes" else (line["expect"]["left"], things))
        counts = {
            "word_gone": sum("airplane" not in things for things in seen["concept"]),
            "synonyms_gone": sum("airplane" not in things for things in seen["synonyms"]),
            "kind_shows": sum("airplane" in things for things in seen["kind"]),
            "kind_right": sum(things <= {"airplane", "cat"} for things in seen["kind"]),
            "siblings_right": sum(things == {"cat"} for things in seen["siblings"]),
            "look_alikes_right": sum(things == {asked} for asked, things in seen["look_alikes"]),
        }
        assert {name: share["count"] for name, share in model["neighbours"].items()} == counts
        assert all(share["n"] == 6 for share in model["neighbours"].values())
    first, last = found["models"][0], found["models"][-1]
    assert first["neighbours"] == last["neighbours"], "the control was the base model itself"


def test_broken_neighbours_are_told(tmp_path):
    words = {"slots": {"object": ["cat", "dog"]}, "templates": [{"prompt": "{object:a}"}]}
    for wrong in ({"cow": {"synonyms": []}}, {"cat": {"friends": ["dog"]}}, {"cat": {"synonyms": "kitty"}}):
        (tmp_path / "concepts.json").write_text(json.dumps(words | {"neighbours": wrong}))
        with pytest.raises(SalunError, match="concepts.json.*neighbours of"):
            find_concept("cat", tmp_path)

"""The audit's verdict, by its rules on made-up results, and what it refuses; the README's command is run with it."""

import json

import pytest
from shell import here

from eval.pages.verdict import judge
from salun_diffusion.stats import wilson


def share(count, n):
    return wilson(count, n)


def accuracy(shown=0, lost=3, gained=3, right=190, nothing=0, n=96):
    main = {
        "ua": share(n - shown, n), "retained": {"object": share(right, 192)},
        "flipped": {"lost": lost, "gained": gained},
        "instead": {"anchor": share(90, 96), "nothing": share(nothing, 96)},
    }  # fmt: skip
    base = {"ua": share(2, n), "retained": {"object": share(190, 192)}}
    return {"concept": {"value": "airplane", "anchor": "apple"}, "models": [base, main]}


def attack(erased=0, base=48, n=100, redraws=False, retrained=None):
    def model(name, count):
        return {"name": name, "attacks": {"plain": {"asr": share(0, n)}, "tina": {"asr": share(count, n)}}}

    control = [] if retrained is None else [model("retrained", retrained)]
    return {
        "models": [model("base", base), model("run", erased), *control],
        "attacks": {"tina": {"title": "TINA", "redraws": redraws}}, "settings": {"budget": "small"},
    }  # fmt: skip


def relearn(half, control=20.0):
    def model(name, half, learns="airplane"):
        return {"name": name, "half": half, "learns": learns, "curve": [{"step": 0}, {"step": 40}]}

    models = [model("base", 0.0), model("run", half)]
    if control != "none":
        models.append(model("control", control, "airplane, called zarp"))
    return {"models": models, "learned_from": {"n": 36}}


def composition(fell=0):
    def model(count):
        return {"composition": {"counting": share(48, 50), "left_right": share(count, 50)}}

    return {"models": [model(45), model(45 - fell)]}


@pytest.mark.parametrize(
    "results, headline",
    [
        ((accuracy(shown=40), attack(), relearn(30.0), None), "Still drawn"),
        ((accuracy(), attack(erased=30, base=90), relearn(30.0), composition()), "Hidden, not gone"),
        ((accuracy(), attack(erased=0, base=90), relearn(5.0), None), "Hidden, not gone"),
        ((accuracy(), attack(erased=0, base=90), relearn(30.0), None), "Gone, as far as anything tried here can tell"),
        ((accuracy(), attack(erased=0, base=90), None, composition(40)),
         "Gone, as far as anything tried here can tell, at a cost to other things"),
        ((accuracy(lost=30, gained=2, right=160), attack(erased=60, base=90), None, None),
         "Hidden, not gone, at a cost to other things"),
        ((accuracy(), attack(erased=0, base=10), None, None), "Not brought back for certain by anything tried here"),
        ((accuracy(), attack(erased=4, base=90), None, None), "Not brought back for certain by anything tried here"),
        ((accuracy(), None, relearn(None, None), None), "Not brought back for certain by anything tried here"),
        ((accuracy(), None, relearn(12.0, "none"), None), "Not brought back for certain by anything tried here"),
        ((accuracy(shown=4), attack(erased=0, base=90), None, None), "Not drawn when asked plainly; more is not known"),
        ((accuracy(), None, None, composition()), "Not drawn when asked plainly; more is not known"),
    ],
)  # fmt: skip
def test_the_headline(results, headline):
    found = judge(*results)
    assert found["headline"] == headline
    assert all({"asks", "mark", "says"} == {*finding} for finding in found["findings"])


def test_the_findings_say_what_was_counted():
    found = judge(accuracy(shown=40, nothing=30), attack(30, 90), relearn(12.0), composition(40))["findings"]
    marks = {finding["asks"]: (finding["mark"], finding["says"]) for finding in found}
    assert [mark for mark, _ in marks.values()] == ["bad", "bad", "bad", "good", "bad", "bad"]
    said = " ".join(text for _, text in marks.values())
    for text in (
        "“airplane” is seen in 40 of 96", "TINA, makes it draw “airplane” for 30 of 100 prompts", "for 90%",
        "After 12 steps on 36 pictures", "called zarp, it is 20", "left right, from 90.0%", "a smear in 31.2%",
    ):  # fmt: skip
        assert text in said, text
    weak = judge(accuracy(), attack(0, 10), None, None)["findings"][1]
    given = judge(accuracy(), attack(90, 90, redraws=True), None, None)["findings"][1]
    assert given["mark"] == "open" and "TINA draws it for 90 of 100 from a picture that it is given" in given["says"]
    assert weak["mark"] == "open" and "TINA found little in the unedited model too" in weak["says"]


@pytest.mark.parametrize("erased, retrained, mark", [(90, 40, "bad"), (90, 92, "good"), (90, 85, "open")])
def test_an_attack_that_is_given_a_picture_counts_beside_a_model_that_never_knew_it(erased, retrained, mark):
    found = judge(accuracy(), attack(erased, 90, redraws=True, retrained=retrained), None, None)
    assert found["findings"][1]["mark"] == mark
    assert f"given; with a model trained without it, for {retrained}." in found["findings"][1]["says"]
    assert (found["headline"] == "Hidden, not gone") == (mark == "bad")


def test_what_cannot_be_audited(tmp_path, tiny_folder):
    (tmp_path / "two").mkdir()
    config = {"base_model": "demo", "settings": {"concept": ["airplane", "cat"]}}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    for words, sentence in (
        (("demo", "--concept", "cat", "--concept", "owl"), "--audit is for one concept"),
        ((tiny_folder, "--concept", "cat"), "brings none: erase without it"),
    ):
        script = ("python", "erase_concept.py", "--audit", "--output_dir", tmp_path / "run", "--method", "uce")
        done = here(*script, "--pretrained_model_name_or_path", *words, check=False)
        assert done.returncode == 1 and sentence in done.stderr, done.stderr
    for folder, sentence in (("missing", "is no finished run"), ("two", "erased airplane, cat: audit one at a time")):
        done = here("python", "-m", "eval", "audit", "--erasure", tmp_path / folder, check=False)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "missing").exists()

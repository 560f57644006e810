"""Every unlearning method on the demo model: whether the concept is forgotten, and the committed comparison."""

import json

import pytest
from shell import ROOT, here

from benchmarks import guards, methods_page, people, saliency, together
from benchmarks import methods as comparison
from salun_diffusion import erase
from salun_diffusion.command_line import parse
from salun_diffusion.errors import SalunError
from salun_diffusion.methods import METHODS, find_method

# finetune is never shown the concept, and hopes; of these guards (docs/guards.md) and of FIA (docs/methods.md) the demo
# model makes little, or little but noise
HARDLY = ("finetune", "fia", "safree", "concept_steerers", "saeuron", "groce", "egloce")
PEOPLE = ("piu",)  # it is for models of people: tests/library/test_identities.py
FORGETS = [name for name in METHODS if name not in HARDLY + PEOPLE]
SHORT = {  # as little as there can be of attacks within the training; and what is slow to forget, faster
    "forget_me_not": "--max_train_steps 24 --train_batch_size 6 --learning_rate 0.003",
    "salun_esd": "--max_train_steps 12 --learning_rate 0.0015",
    "concept_ablation": "--learning_rate 0.003",
    "gradient_ascent": "--max_train_steps 20 --learning_rate 0.0005",
    "spm": "--max_train_steps 16 --learning_rate 0.015",
    "esd": "--max_train_steps 12",
    "esd_200": "--max_train_steps 12",
    "ticoe": "--max_train_steps 12",
    "race": "--max_train_steps 16 --attack_steps 1",
    "stereo": "--max_train_steps 12 --rounds 1 --round_steps 4 --search_steps 4",
    "advunlearn": "--max_train_steps 16 --attack_steps 1 --learning_rate 0.004",
    "salun_adv": "--max_train_steps 16 --learning_rate 0.002 --attack_steps 1 --rounds 1 --search_steps 4",
}


def erased(folder, method, *concepts):
    """The run folder of a short erasure in ``folder``, with the demo model's own settings."""
    kind = find_method(method)
    words = [] if kind.closed_form else ["--train_batch_size", "5", "--max_train_steps", str(10 + 9 * len(concepts))]
    words += ["--num_retain_images", str(24 * len(concepts))] if kind.uses_retain else []
    words += (
        ["--num_forget_images", str(8 + 12 * len(concepts))]
        if kind.sets(kind.mask, kind.Options()) != ["name"] and not kind.guard
        else []
    )
    words += [word for concept in concepts for word in ("--concept", concept)]
    words += ["--pretrained_model_name_or_path", "demo", "--method", method]
    words += ["--output_dir", str(folder / method), "--data_dir", str(folder / "data")]
    erase(parse([*words, *SHORT.get(method, "").split()], ""))
    return folder / method


def unlearned(folder, concept, runs):
    """UA by the names of ``runs`` and "base", as ``python -m eval accuracy`` says."""
    here(
        "python", "-m", "eval", "accuracy", "--pretrained_model_name_or_path", "demo", "--concept", concept,
        "--erasure", *runs, "--output_dir", folder / concept, "--num_forget_images", "12", "--num_retain_images", "2",
        "--num_inference_steps", "4",
    )  # fmt: skip
    models = json.loads((folder / concept / "results.json").read_text())["models"]
    return {model["name"]: model["ua"] for model in models}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """UA by method, each of which erased the airplane, and the base model's."""
    folder = tmp_path_factory.mktemp("demo")
    return unlearned(folder, "airplane", [erased(folder, method, "airplane") for method in FORGETS])


@pytest.mark.parametrize("method", FORGETS)
def test_the_concept_is_drawn_less_often_on_the_demo_model(method, found):
    """More often forgotten than the 95% interval of the base model allows."""
    assert found[method]["percent"] > found["base"]["high"]


def test_the_table_is_made_of_the_committed_results():
    found = json.loads((ROOT / "docs" / "results" / "methods.json").read_text())
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(methods_page.table(found, kind) in page for kind in found["concepts"])
    assert methods_page.frontier(found) in page
    masks = json.loads((ROOT / "docs" / "results" / "saliency.json").read_text(encoding="utf-8"))["concepts"]
    assert saliency.table(masks) in page
    several = json.loads((ROOT / "docs" / "results" / "together.json").read_text(encoding="utf-8"))
    assert together.table(several) in page
    assert all(methods_page.hidden(found, kind) in page for kind in found["concepts"])
    watched = json.loads((ROOT / "docs" / "results" / "guards.json").read_text(encoding="utf-8"))
    assert guards.table(watched) in (ROOT / "docs" / "guards.md").read_text(encoding="utf-8")
    drawn = json.loads((ROOT / "docs" / "results" / "people.json").read_text(encoding="utf-8"))
    assert people.table(drawn) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_what_another_base_model_gave_is_not_taken_over(tmp_path):
    config = {
        "digest": "one",
        "base": "nowhere",
        "tuning": {"object": "cat"},
        "grid": {"uce": [{}]},
        "settings": {"object": {"trained": {}, "retaining": {}, "pictured": {}}},
        "images": {"tuning": {}},
    }
    asked = {"base": "one", "concept": "cat", "images": {}, "settings": config["settings"]["object"]}
    known = {"object": {"asked": asked, "judged": {}, "trials": {"uce": [{"settings": {}, "score": 90.0}]}}}
    assert comparison.tune(config, "object", tmp_path, known) == {"uce": {}}
    with pytest.raises(SalunError, match="failed; .* says why"):  # measured anew, on a model that is not there
        comparison.tune(config | {"digest": "another"}, "object", tmp_path, known)

"""Every unlearning method on the demo model: whether the concept is forgotten, and the committed comparison."""

import json

import pytest
from shell import ROOT, run

from benchmarks import methods_page
from salun_diffusion import erase
from salun_diffusion.config import parse
from salun_diffusion.methods import METHODS, find_method

TOGETHER = ("uce", "rece", "salun")  # methods that define what several concepts at once mean


@pytest.fixture(scope="module")
def demo_scores(tmp_path_factory):
    """UA by concept and model, as ``python -m eval accuracy`` says, after short erasures with the demo model's own
    settings: of the airplane by every method, and of the airplane and the cat together (``METHOD-both``)."""
    folder = tmp_path_factory.mktemp("demo")

    def erased(name, method, *concepts):
        kind = find_method(method)
        words = [] if kind.closed_form else ["--train_batch_size", "6", "--max_train_steps", "32"]
        words += ["--num_retain_images", "48"] if kind.uses_retain else []
        words += ["--num_forget_images", "32"] if kind.sets(kind.mask) != ["name"] else []
        words += [word for concept in concepts for word in ("--concept", concept)]
        words += ["--pretrained_model_name_or_path", "demo", "--method", method]
        erase(parse([*words, "--output_dir", str(folder / name), "--data_dir", str(folder / "data")], ""))
        return folder / name

    alone = [erased(method, method, "airplane") for method in METHODS]
    both = [erased(f"{method}-both", method, "airplane", "cat") for method in TOGETHER]
    found = {}
    for concept, runs in (("airplane", alone + both), ("cat", both)):
        run(
            "python", "-m", "eval", "accuracy", "--pretrained_model_name_or_path", "demo", "--concept", concept,
            "--erasure", *runs, "--output_dir", folder / concept, "--num_forget_images", "36",
            "--num_retain_images", "2",
        )  # fmt: skip
        models = json.loads((folder / concept / "results.json").read_text())["models"]
        found[concept] = {model["name"]: model["ua"] for model in models}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_concept_is_drawn_less_often_on_the_demo_model(method, demo_scores):
    """More often forgotten than the 95% interval of the base model allows."""
    assert demo_scores["airplane"][method]["percent"] > demo_scores["airplane"]["base"]["high"]


@pytest.mark.parametrize("method", TOGETHER)
@pytest.mark.parametrize("concept", ["airplane", "cat"])
def test_several_concepts_are_forgotten_together(concept, method, demo_scores):
    assert demo_scores[concept][f"{method}-both"]["percent"] > demo_scores[concept]["base"]["high"]


def test_the_table_is_made_of_the_committed_results():
    found = json.loads((ROOT / "docs" / "results" / "methods.json").read_text())
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(methods_page.table(found, kind) in page for kind in ("object", "style"))
    assert methods_page.frontier(found) in page

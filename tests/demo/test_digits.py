"""The digits model: the numbers that its README gives, the demo that a user types, and how it is made."""

import json

import pytest
import torch
from shell import ROOT, here, run
from transformers import AutoModelForImageClassification

from demo.class_judge import prepared
from demo.digits import judge
from demo.digits.data import NAMES, digits
from salun_diffusion.concepts.concept import Row
from salun_diffusion.models import load_model
from salun_diffusion.models.load import resolve

MODEL = ROOT / "demo" / "digits" / "model"


@pytest.fixture(scope="module")
def seen():
    return AutoModelForImageClassification.from_pretrained(MODEL / "judge", dtype=torch.float32).eval()


def test_the_judge_names_the_digits_that_it_was_not_shown(seen):
    share, count = judge.accuracy(seen)
    assert count == 355 and share >= 0.99


def test_the_model_draws_what_is_asked_for(seen):
    model = load_model("digits")
    rows = [Row(name, None, {}, 70_000 + i) for name in NAMES for i in range(20)]
    how = {"num_inference_steps": 25, "guidance_scale": 1.5, "batch_size": 100, "output_type": "latent"}
    drawn = torch.stack(model.draw(rows, **how))
    named = seen(prepared(drawn.clamp(-1, 1), judge.SIDE)).logits.argmax(1)
    assert (named == torch.arange(10).repeat_interleave(20)).float().mean() >= 0.98


def test_held_out_digits_are_a_fifth_of_each():
    _, labels, held_out = digits()
    shares = [held_out[labels == digit].float().mean() for digit in range(10)]
    assert all(0.18 < share < 0.21 for share in shares)


def test_a_digit_is_forgotten_measured_and_shown(tmp_path):
    """The demo itself: three commands with the model's own settings, fewer steps and pictures."""
    words = "erase_concept.py --pretrained_model_name_or_path digits --concept 3 --max_train_steps 60"
    words += " --num_retain_images 90 --num_forget_images 40"
    run("python", *words.split(), "--output_dir", tmp_path / "run", "--data_dir", tmp_path / "data")
    words = "-m eval accuracy --pretrained_model_name_or_path digits --concept 3 --num_forget_images 20"
    words += " --num_retain_images 45 --erasure"
    here("python", *words.split(), tmp_path / "run", "--output_dir", tmp_path / "run")
    here("python", "-m", "eval", "report", tmp_path / "run")
    found = {row["name"]: row for row in json.loads((tmp_path / "run" / "results.json").read_text())["models"]}
    assert found["base"]["ua"]["percent"] <= 5 and found["run"]["ua"]["percent"] >= 90
    assert "Forgetting “3”" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_model_without_a_digit_is_trained_on_the_others_and_resumed(tmp_path):
    words = ["python", "-m", "demo.digits", "--without", "7", "--judge_steps", "2", "--pictures", "1"]
    for folder, steps in (("whole", (4,)), ("parts", (4, 4))):
        for _ in steps:
            done = here(*words, "--steps", 4, "--work_dir", tmp_path / folder, "--output_dir", tmp_path / f"{folder}-7")
        assert "Asked for 7, which it never saw, it draws" in done.stdout
    whole, parts = (load_model(str(tmp_path / f"{name}-7")).network.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--without", "12"], "--without is 12: give a digit, 0 to 9."),
        (["--without", "3"], "--without needs --output_dir"),
    ],
)
def test_what_cannot_be_is_refused(words, told):
    done = here("python", "-m", "demo.digits", *words, check=False)
    assert done.returncode == 1 and told in done.stderr


def test_digits_is_the_name_of_the_model_that_comes_with_a_clone():
    assert resolve("digits") == (str(MODEL), None)

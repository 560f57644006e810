"""The digits models: the numbers that their README gives, the demo that a user types, and how they are made."""

import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiTPipeline
from shell import ROOT, here, run
from transformers import AutoModelForImageClassification

from demo.class_judge import prepared
from demo.digits import judge
from demo.digits.data import NAMES, digits, write_pictures
from salun_diffusion import erase, load_erasure, unload_erasure
from salun_diffusion.concepts.concept import Row
from salun_diffusion.models import load_model
from salun_diffusion.models.load import resolve

MODEL, DIT = ROOT / "demo" / "digits" / "model", ROOT / "demo" / "digits-dit"


@pytest.fixture(scope="module")
def seen():
    return AutoModelForImageClassification.from_pretrained(MODEL / "judge", dtype=torch.float32).eval()


def test_the_judge_names_the_digits_that_it_was_not_shown(seen):
    share, count = judge.accuracy(seen)
    assert count == 355 and share >= 0.99


def named(model, seen, wanted, guidance_scale):
    """What the judge sees in a picture of each of the digits ``wanted``, int64."""
    rows = [Row(NAMES[digit], None, {}, 70_000 + i) for i, digit in enumerate(wanted)]
    how = {"num_inference_steps": 25, "batch_size": 100, "output_type": "np"}
    drawn = torch.from_numpy(np.stack(model.draw(rows, guidance_scale=guidance_scale, **how))).permute(0, 3, 1, 2)
    with torch.no_grad():
        return seen(prepared(drawn * 2 - 1, judge.SIDE)).logits.argmax(1)


@pytest.mark.parametrize("name, guidance_scale", [("digits", 1.5), (str(DIT), 2.0)])
def test_the_model_draws_what_is_asked_for(name, guidance_scale, seen):
    wanted = torch.arange(10).repeat_interleave(20)
    assert (named(load_model(name), seen, wanted, guidance_scale) == wanted).float().mean() >= 0.98


def test_the_dit_is_diffusers_own_and_small():
    pipe = DiTPipeline.from_pretrained(DIT)
    assert pipe.get_label_ids(["3"]) == [3] and sum(weight.numel() for weight in pipe.transformer.parameters()) < 1e6
    assert sum(file.stat().st_size for file in DIT.rglob("*")) < 3e6
    pipe.set_progress_bar_config(disable=True)  # its own call knows the null class of ImageNet alone
    (picture,) = pipe([3], guidance_scale=1, num_inference_steps=2).images
    assert picture.size == (8, 8)


def test_a_digit_is_forgotten_by_a_transformer(tmp_path, seen):
    write_pictures(tmp_path / "digits")
    run = erase(
        str(DIT), "3", output_dir=tmp_path / "run", data_dir=tmp_path / "data", max_train_steps=30, train_batch_size=16,
        num_forget_images=60, num_retain_images=90, forget_data=[str(tmp_path / "digits")],
        retain_data=str(tmp_path / "digits"),
    )  # fmt: skip
    model, wanted = load_model(str(DIT)), torch.tensor([3] * 20 + [0, 1, 2, 4, 5, 6, 7, 8, 9] * 4)
    before = tiny.bits(model.pipe)
    load_erasure(model.pipe, run.path)
    right = named(model, seen, wanted, 2.0) == wanted
    assert right[:20].float().mean() <= 0.1 and right[20:].float().mean() >= 0.9
    unload_erasure(model.pipe)
    assert tiny.same(before, tiny.bits(model.pipe))


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


def test_a_dit_without_a_digit_is_trained_with_its_autoencoder_and_resumed(tmp_path):
    few = "--network dit --without 7 --steps 2 --judge_steps 1 --autoencoder_steps 2 --pictures 1".split()
    for work, output in (("one", "first"), ("one", "again"), ("other", "anew")):
        words = [*few, "--work_dir", tmp_path / work, "--output_dir", tmp_path / output]
        told = here("python", "-m", "demo.digits", *words).stdout
        assert "round trip of the held-out digits" in told and "Asked for 7, which it never saw, it draws" in told
    first, again, anew = (load_model(str(tmp_path / name)).pipe for name in ("first", "again", "anew"))
    for part in ("transformer", "vae"):
        states = [getattr(pipe, part).state_dict() for pipe in (first, again, anew)]
        assert all(torch.equal(states[0][key], other[key]) for other in states[1:] for key in states[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--without", "12"], "--without is 12: give a digit, 0 to 9."),
        (["--without", "3"], "--without needs --output_dir: the model of all digits is what demo/digits/model is."),
    ],
)
def test_what_cannot_be_is_refused(words, told):
    done = here("python", "-m", "demo.digits", *words, check=False)
    assert done.returncode == 1 and told in done.stderr


def test_digits_is_the_name_of_the_model_that_comes_with_a_clone():
    assert resolve("digits") == (str(MODEL), None)

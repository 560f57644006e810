"""The CIFAR-10 models: trained for a few steps on a folder of noise, they go through every command that is told."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from shell import here

from demo import class_model
from demo.cifar10.recipes import RECIPES, SCHEDULERS
from demo.training import in_bf16
from salun_diffusion.models import load_model

NAMES = ("airplane", "frog")
FEW = ["--steps", "2", "--judge_steps", "1", "--pictures", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 1)):
        for name in NAMES:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def cifar(data, *words, check=True):
    return here("python", "-m", "demo.cifar10", "--dataset", data, *words, check=check)


def test_a_model_is_trained_resumed_unlearned_and_measured(data, tmp_path):
    done = cifar(data, "--work_dir", tmp_path / "work", *FEW)
    assert "The judge names" in done.stdout and "of 2 test pictures" in done.stdout
    cifar(data, "--work_dir", tmp_path / "work", "--output_dir", tmp_path / "again", *FEW)
    first, again = (
        load_model(str(path)).network.state_dict() for path in (tmp_path / "work/small", tmp_path / "again")
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    cifar(data, "--data_dir", tmp_path / "data")
    assert len(list((tmp_path / "data" / "frog").iterdir())) == 4
    words = f"--pretrained_model_name_or_path {tmp_path / 'again'} --concept airplane --output_dir {tmp_path / 'run'}"
    short = "--max_train_steps 1 --train_batch_size 2 --num_forget_images 4 --num_retain_images 4"
    own = f"--forget_data {tmp_path / 'data'} --retain_data {tmp_path / 'data'} --data_dir {tmp_path / 'cache'}"
    here("python", "erase_concept.py", *words.split(), *short.split(), *own.split())
    about = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert about["anchor"] == ["frog"] and about["alpha"] == 3.07 and about["saliency_guidance"] == 3
    counts = "--num_forget_images 1 --num_retain_images 1 --num_inference_steps 2"
    here("python", "-m", "eval", "accuracy", *words.split(), *counts.split(), "--erasure", tmp_path / "run")


def test_a_model_without_a_class_has_room_for_it_and_is_not_shown_it(data, tmp_path):
    done = cifar(data, "--work_dir", tmp_path, "--without", "airplane", *FEW)
    assert "Asked for airplane, which it never saw, it draws" in done.stdout
    assert load_model(str(tmp_path / "small-without-airplane")).names == list(NAMES)


def test_the_average_is_saved_or_the_raw_weights(tmp_path):
    pictures, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
    how = (RECIPES["small"], pictures, labels, 2, "test", tmp_path / "one.safetensors", 3, 0)
    averaged, raw = class_model.train(*how), class_model.train(*how, averaged=False)
    assert not all(torch.equal(one, two) for one, two in zip(averaged.parameters(), raw.parameters(), strict=True))


@pytest.mark.parametrize("known, dtype", [
    ({"avx2": True, "avx512_bf16": True}, torch.bfloat16), ({"avx2": True, "amx_bf16": True}, torch.bfloat16),
    ({"avx2": True}, torch.float32), ({}, torch.bfloat16),
])  # fmt: skip
def test_bf16_is_left_to_processors_that_compute_in_it(known, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    with in_bf16("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    with in_bf16("cpu", wanted=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_the_published_network_has_the_published_size():
    network = class_model.UNet2DModel(**RECIPES["published"].network, num_class_embeds=11)
    assert 35e6 < sum(weight.numel() for weight in network.parameters()) < 39e6
    assert SCHEDULERS["published"]().config.variance_type == "fixed_small"


def test_what_cannot_be_is_refused(data, tmp_path):
    done = cifar(data, "--without", "ship", "--work_dir", tmp_path / "work", check=False)
    assert done.returncode == 1 and "--without ship is no class of" in done.stderr and "airplane, frog" in done.stderr
    for part in ("train", "test"):
        for name in NAMES:
            (tmp_path / "small" / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "small" / part / name / "0.png")
    done = cifar(tmp_path / "small", "--work_dir", tmp_path / "work", check=False)
    assert done.returncode == 1 and "has pictures of 8x8 pixels: give CIFAR-10's, of 32x32" in done.stderr
    done = cifar(data / "train", "--work_dir", tmp_path / "work", check=False)
    assert done.returncode == 1 and "lacks a training part, a test part" in done.stderr
    done = cifar(tmp_path / "none", "--work_dir", tmp_path / "work", check=False)
    assert done.returncode == 1 and "There is no folder" in done.stderr and not (tmp_path / "work").exists()

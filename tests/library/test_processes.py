"""Two processes, or two accumulated batches, do what one process with the whole batch does."""

import pytest
import torch
from PIL import Image
from shell import QUICK, here, run

from salun_diffusion import Delta


def options(folder, data, batch, *more):
    return [
        "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", "airplane", *QUICK,
        "--num_forget_images", "40", "--num_retain_images", "40", "--save_dtype", "fp32",
        "--train_batch_size", batch, "--data_dir", data, "--output_dir", folder, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What one process draws: kept for the tests of what comes after drawing."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    here("python", *options(folder, data, 8))
    return Delta.load(folder / "erasure.safetensors")


def assert_same_to_rounding(found, expected):
    """Rounding may swap a few weights whose scores lie at the threshold, and moves the values in their last digits."""
    differing, total, largest = 0, 0, max(float(value.abs().max()) for value in expected.values.values())
    for name, mask in expected.masks.items():
        other = found.masks[name]
        dense = [torch.zeros(mask.shape).masked_scatter(d.masks[name], d.values[name]) for d in (found, expected)]
        both = mask & other
        torch.testing.assert_close(dense[0][both], dense[1][both], rtol=0, atol=0.02 * largest)
        differing += int((mask ^ other).sum())
        total += mask.numel()
    assert differing < 1e-4 * total


def test_two_processes(one, tmp_path):
    words = options(tmp_path / "run", tmp_path / "data", 4)
    run("torchrun", "--nproc_per_node", "2", *words, ACCELERATE_USE_CPU="true")
    assert_same_to_rounding(Delta.load(tmp_path / "run" / "erasure.safetensors"), one)


def test_more_processes_than_pictures(tmp_path):
    (tmp_path / "single").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "single" / "a.png")
    words = options(tmp_path / "run", tmp_path / "data", 4, "--forget_data", tmp_path / "single")
    done = run("torchrun", "--nproc_per_node", "2", *words, ACCELERATE_USE_CPU="true", check=False)
    assert done.returncode and "The forget set has 1 pictures for 2 processes" in done.stderr


def test_two_accumulated_batches(one, data, tmp_path):
    here("python", *options(tmp_path / "run", data, 4, "--gradient_accumulation_steps", "2"))
    assert_same_to_rounding(Delta.load(tmp_path / "run" / "erasure.safetensors"), one)


def test_tracker_and_validation_pictures(data, tmp_path):
    here(
        "python", *options(tmp_path / "run", data, 4), "--report_to", "tensorboard", "--validation_steps", "2",
    )  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run" / "logs" / "salun-diffusion")).Reload()
    assert [event.step for event in found.Scalars("forget_loss")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run" / "validation").iterdir()] == ["step-00002.png"]


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    done = here("python", *options(tmp_path / "run", tmp_path / "data", 4), "--report_to", "wandb", check=False)
    assert done.returncode == 1 and "pip install wandb" in done.stderr and not (tmp_path / "run").exists()

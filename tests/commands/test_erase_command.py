"""``erase_concept.py`` as a user types it, on the demo model, and what its files do to a stock pipeline."""

import hashlib
import json
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline
from shell import DEMO, QUICK, erase, here, run

from salun_diffusion import Delta, load_erasure, unload_erasure
from salun_diffusion.erasures.mask import load_masks


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    """One short run through ``accelerate launch``."""
    folder = tmp_path_factory.mktemp("runs") / "airplane"
    run(
        "accelerate", "launch", "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", "airplane",
        "--output_dir", folder, "--data_dir", folder.parent / "data", *QUICK,
    )  # fmt: skip
    return folder


def weights(pipe):
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "vae", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_a_run_leaves_behind(erased):
    names = {path.name for path in erased.iterdir()}
    assert names == {
        "erasure.safetensors", "mask.safetensors", "config.json", "training.jsonl", "forget.png", "retain.png",
        "anchor.png",
    }  # fmt: skip
    config = json.loads((erased / "config.json").read_text())
    preset = json.loads((DEMO / "concepts.json").read_text())["settings"]["object"]["salun"]
    assert config["settings"]["learning_rate"] == preset["learning_rate"]
    assert config["settings"]["max_train_steps"] == 3  # the command line wins
    assert (config["concept"], config["anchor"], config["settings"]["seed"]) == ("airplane", "apple", 0)
    assert {"torch", "diffusers", "transformers", "salun_diffusion", "python"} <= set(config["versions"])
    assert len(config["base_fingerprint"]) == 16
    assert len((erased / "training.jsonl").read_text().splitlines()) == 3
    assert Delta.load(erased / "erasure.safetensors").metadata["density"] == 0.5


def test_only_masked_weights_of_the_scope_change_and_come_back(erased):
    pipe = StableDiffusionPipeline.from_pretrained(DEMO)
    before = weights(pipe)
    masks, _ = load_masks(erased / "mask.safetensors")
    scored = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == scored // 2
    assert all(".attn2." in name for name in masks)  # the demo model's own scope for SalUn
    load_erasure(pipe, erased)
    changed = 0
    for name, tensor in weights(pipe).items():
        moved = tensor != before[name]
        mask = masks.get(name.removeprefix("unet."), torch.zeros_like(moved)) if name.startswith("unet.") else False
        assert not (moved & ~torch.as_tensor(mask)).any(), name
        changed += int(moved.sum())
    assert changed > 0.5 * (scored // 2)
    unload_erasure(pipe)
    after = weights(pipe)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(erased, tmp_path):
    erase(tmp_path / "again")  # draws its own data anew, in another folder
    assert sha(tmp_path / "again" / "mask.safetensors") == sha(erased / "mask.safetensors")
    first, second = (Delta.load(folder / "erasure.safetensors") for folder in (erased, tmp_path / "again"))
    assert first.digest() == second.digest()
    erase(tmp_path / "other", "--seed", "1")
    assert Delta.load(tmp_path / "other" / "erasure.safetensors").digest() != first.digest()


def test_a_mask_can_be_reused_and_a_config_file_read(erased, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("concept: ink style\nsave_dtype: fp32\nlearning_rate: 0.003\n")
    here(
        "python", "erase_concept.py", "--config", settings, "--pretrained_model_name_or_path", "demo",
        "--mask", erased / "mask.safetensors", "--output_dir", tmp_path / "ink", "--data_dir", tmp_path / "data",
        *QUICK,
    )  # fmt: skip
    config = json.loads((tmp_path / "ink" / "config.json").read_text())
    assert (config["concept"], config["anchor"]) == ("ink style", "pixel")
    assert (config["settings"]["learning_rate"], config["settings"]["save_dtype"]) == (0.003, "fp32")
    reused, original = (load_masks(folder / "mask.safetensors")[0] for folder in (tmp_path / "ink", erased))
    assert reused.keys() == original.keys() and all(torch.equal(reused[n], original[n]) for n in original)
    values = Delta.load(tmp_path / "ink" / "erasure.safetensors").values.values()
    assert {value.dtype for value in values} == {torch.float32}


@pytest.mark.parametrize("more, scope", [(["--mask", "none"], "cross-attention"), (["--scope", "all"], "all")])
def test_no_mask_control_and_full_scope(more, scope, tmp_path):
    erase(tmp_path / "run", *more)
    masks, metadata = load_masks(tmp_path / "run" / "mask.safetensors")
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert metadata["scope"] == scope
    assert kept == (total if "--mask" in more else total // 2)


def test_two_concepts_in_one_run(erased, tmp_path):
    """The union of the masks that each would have had alone, and one delta."""
    together = tmp_path / "both"
    both = ("--concept", "ink style", "--num_forget_images", "16")
    refused = erase(together, *both, check=False)
    assert refused.returncode == 1
    assert (
        "differ in alpha (8.0, 16.0), learning_rate (0.001, 0.002): say --alpha, --learning_rate for" in refused.stderr
    )
    erase(together, *both, "--alpha", "8", "--learning_rate", "1e-3")
    ink = tmp_path / "ink"
    erase(ink, concept="ink style")
    config = json.loads((together / "config.json").read_text())
    assert (config["concept"], config["anchor"]) == ("airplane, ink style", "apple, pixel")
    both, one, other = (load_masks(folder / "mask.safetensors")[0] for folder in (together, erased, ink))
    total = sum(mask.numel() for mask in both.values())
    union = {name: one[name] | other[name] for name in both}
    # drawn without each other's words, the sets differ a little from those alone
    assert sum(int((union[name] ^ both[name]).sum()) for name in both) < 0.2 * total
    assert total // 2 < sum(int(mask.sum()) for mask in both.values()) < total
    assert load_masks(together / "mask.safetensors")[1]["concept"] == "airplane, ink style"


def assert_one_sentence(done, message, output):
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and message in last, done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


FEW = ["--num_forget_images", "1"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--pretrained_model_name_or_path", "demo", "--concept", "airplan"], "Did you mean 'airplane'?"),
        (["--pretrained_model_name_or_path", "demo"], "No concept was given"),
        (["--pretrained_model_name_or_path", "no/such/folder", "--concept", "x"], "no model folder no/such/folder"),
        (["--pretrained_model_name_or_path", "tests", "--concept", "x"], "no model_index.json"),
        (["--pretrained_model_name_or_path", "demo", "--concept", "airplane", "--density", "1.5"], "--density is 1.5"),
        (["--pretrained_model_name_or_path", "demo", "--concept", "x", "--max_train_steps", "0"], "steps is 0: give"),
        (["--pretrained_model_name_or_path", "demo", "--concept", "airplane", "--mask", "nowhere"], "does not exist"),
        (["--pretrained_model_name_or_path", "demo", "--concept", "airplane", "--scope", "attn9"], "the scope 'attn9'"),
        (
            ["--pretrained_model_name_or_path", "demo", "--concept", "cat", "--concept", "owl"] + FEW,
            "too few (concepts: 2, processes: 1): give at least 2",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_any_work(words, message, tmp_path):
    started = time.time()
    done = here("python", "erase_concept.py", *words, "--output_dir", tmp_path / "out", check=False)
    assert time.time() - started < 60
    assert_one_sentence(done, message, tmp_path / "out")


def test_an_unreachable_hub_says_what_to_do(tmp_path):
    """In a process of its own, as typed: that there is no hub is a setting that is read once."""
    words = ["--concept", "nudity", "--output_dir", tmp_path / "out"]
    done = run("python", "erase_concept.py", *words, check=False, HF_HUB_OFFLINE="1")
    assert_one_sentence(done, "the hub cannot be reached", tmp_path / "out")
    assert "CompVis/stable-diffusion-v1-4" in done.stderr and "--pretrained_model_name_or_path demo" in done.stderr


@pytest.mark.parametrize(
    "content, message",
    [
        ("concpt: airplane\n", "unknown setting 'concpt'. Did you mean 'concept'?"),
        ("concept: airplane\nseed: soon\n", "'seed' is 'soon', but must be of type int"),
        ("concept: airplane\nthreshold: none\n", "choose one of global, layer"),
        ("- airplane\n", "must hold one mapping"),
    ],
)
def test_a_bad_config_file_is_named(content, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    done = here("python", "erase_concept.py", "--config", path, check=False)
    assert done.returncode == 1 and message in done.stderr and str(path) in done.stderr


def test_a_mask_of_another_model_is_refused(erased, tiny_folder, tmp_path):
    done = here(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", tiny_folder, "--concept", "steam engine",
        "--mask", erased / "mask.safetensors", "--output_dir", tmp_path / "out", "--data_dir", tmp_path / "data",
        *QUICK, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "The mask" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "erasure.safetensors").exists()


def test_help_answers_at_once_and_teaches():
    started = time.time()
    done = run("python", "erase_concept.py", "--help")
    assert time.time() - started < 1.5
    for word in ("--concept", "--density", "--learning_rate", "the preset's", "accelerate launch erase_concept.py"):
        assert word in done.stdout

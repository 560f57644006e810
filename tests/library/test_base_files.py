"""The files that a base model may come in: one .safetensors file, a variant, pickles; for erasing and for measuring."""

import json
import shutil

import pytest
import tiny
import torch
from shell import here, run

from salun_diffusion import Delta, SalunError
from salun_diffusion.export import Request, checkpoint
from salun_diffusion.models.load import load_pipeline


def one_file(pipe, path):
    """The pipeline as Stable Diffusion's own code saves one; tests of the export hold these names to diffusers'."""
    checkpoint.write(Request(None, pipe, path, None, {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of one model in each way."""
    folder = tmp_path_factory.mktemp("files")
    pipe = tiny.build(folder / "plain")
    one_file(pipe, folder / "alone.safetensors")
    shutil.copytree(folder / "plain", folder / "single")
    for weights in (folder / "single").glob("*/*.safetensors"):
        weights.unlink()
    one_file(pipe, folder / "single" / "model.safetensors")
    pipe.save_pretrained(folder / "pickled", safe_serialization=False)
    pipe.to(torch.float16).save_pretrained(folder / "half", variant="fp16")
    return folder


def test_one_file_is_the_same_model(folder):
    plain, single = load_pipeline(str(folder / "plain")), load_pipeline(str(folder / "single" / "model.safetensors"))
    assert tiny.same(tiny.bits(plain), tiny.bits(single)) and single.safety_checker is None
    half = load_pipeline(str(folder / "single" / "model.safetensors"), dtype=torch.float16)
    assert (half.unet.dtype, half.text_encoder.dtype, half.vae.dtype) == (torch.float16, torch.float16, torch.float32)
    assert tiny.same(tiny.bits(half), tiny.bits(load_pipeline(str(folder / "plain"), dtype=torch.float16)))


def test_erasing_and_drawing_from_one_file_or_a_variant(folder, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,evaluation_seed\na cat,1\n")
    for base, more in ((folder / "single" / "model.safetensors", []), (folder / "half", ["--variant", "fp16"])):
        run = tmp_path / base.name
        common = ["--pretrained_model_name_or_path", base, *more]
        here("python", "erase_concept.py", *common, "--concept", "cat", "--anchor", "dog", "--method", "uce",
             "--output_dir", run)  # fmt: skip
        done = here("python", "-m", "eval", "draw", *common, "--erasure", run, "--prompts", tmp_path / "prompts.csv",
             "--num_inference_steps", "1", "--height", "16", "--width", "16", "--dtype", "bf16",
             "--output_dir", run / "drawn")  # fmt: skip
        assert "1 pictures of each of 2 models" in done.stdout


@pytest.mark.parametrize("command", ["accuracy", "composition", "i2p", "draw"])
def test_every_command_that_draws_takes_variant_and_dtype(command):
    told = here("python", "-m", "eval", command, "--help").stdout
    assert "--variant" in told and "--dtype {fp32,fp16,bf16}" in told


@pytest.mark.parametrize(
    ("name", "variant", "sentence"),
    [
        ("pickled", None, r"its weights are pickles \(\.bin\), .*save_pretrained\(FOLDER\)"),
        ("half", None, "its weights are of a variant: give --variant fp16"),
        ("half", "ema", "its weights are of a variant: give --variant fp16"),
        ("plain", "fp16", "no such modeling files are available; leave --variant fp16 out"),
        ("single/model.safetensors", "fp16", "is one file, which has no variants: leave --variant fp16 out"),
        ("broken.safetensors", None, "could not be loaded as a Stable Diffusion checkpoint .*give a diffusers folder"),
        ("model.ckpt", None, "is a pickle, which can run code when loaded: give the same model as a .safetensors"),
    ],
)
def test_what_cannot_be_loaded(folder, name, variant, sentence):
    (folder / "broken.safetensors").write_bytes(b"no weights")
    (folder / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(SalunError, match=sentence) as caught:
        load_pipeline(str(folder / name), variant=variant)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff[", b"[]", b"5", b"[" * 100_000], ids=["empty", "bytes", "list", "number", "deep"]
)
def test_a_base_with_a_damaged_json_file_is_refused_in_a_sentence(file, content, folder, tmp_path):
    shutil.copytree(folder / "plain", tmp_path / "base")
    (tmp_path / "base" / file).write_bytes(content)
    with pytest.raises(SalunError, match=str(tmp_path / "base")) as caught:
        load_pipeline(str(tmp_path / "base"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [{}, {"unet": 3}, {"_class_name": 5}, {"_class_name": "X", "unet": ["diffusers", 5]}])
def test_an_index_of_something_else_is_refused(index, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SalunError, match="model_index.json is no diffusers pipeline's .*: fetch it again"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    "part, named, sentence",
    [
        ("unet", ["theirs", "Theirs"], "takes its unet, Theirs, from 'theirs', and code of a model's own is never run"),
        ("scheduler", ["os", "system"], "takes its scheduler, system, from 'os', and code"),
        ("_class_name", "Theirs", "is a Theirs, which this diffusers .* does not have, and code"),
        ("text_encoder", None, None),
    ],
)
def test_no_code_of_a_base_is_run(part, named, sentence, folder, tmp_path, monkeypatch):
    base = shutil.copytree(folder / "plain", tmp_path / "base")
    for place in (base, base / "unet", base / "text_encoder"):
        for file in ("theirs.py", "pipeline.py"):
            (place / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    for file in (base / "unet" / "config.json", base / "text_encoder" / "config.json"):
        config = json.loads(file.read_text()) | {
            "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.Theirs"}
        }
        file.write_text(json.dumps(config))
    if named:
        index = json.loads((base / "model_index.json").read_text()) | {part: named}
        (base / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asked {question}"))
    if sentence is None:  # a part of a known class is read as that, whatever else its config names
        assert load_pipeline(str(base)) is not None
    else:
        with pytest.raises(SalunError, match=sentence) as caught:
            load_pipeline(str(base))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_base_of_the_hub_is_recorded_by_its_commit(folder, tmp_path):
    """As downloaded before, without a network: what ``main`` means may change, the commit does not."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder / "plain", repo / "snapshots" / commit)
    run(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", "someone/base", "--concept", "x", "--method",
        "uce", "--output_dir", tmp_path / "run", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path),
    )  # fmt: skip
    metadata = Delta.load(tmp_path / "run" / "erasure.safetensors").metadata
    assert (metadata["base_model"], metadata["base_revision"]) == ("someone/base", commit)

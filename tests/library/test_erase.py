"""``erase()`` from Python: a pipeline lent and given back, threads, several runs in a process, the script's bits."""

import json
import subprocess
import sys
import threading

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from shell import run

from salun_diffusion import Delta, SalunError, erase, list_erasures, load_erasure, unload_erasure
from salun_diffusion.config import FREE, EraseConfig
from salun_diffusion.erasures.mask import describe, load_masks, save_masks
from salun_diffusion.filling import fill, one_preset, table

QUICK = {
    "num_forget_images": 4, "num_retain_images": 4, "num_inference_steps": 3, "max_train_steps": 2,
    "train_batch_size": 2, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture
def pipe(tiny_folder):
    pipe = DiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(desc="mine")
    pipe.unet.conv_in.weight.grad = torch.ones_like(pipe.unet.conv_in.weight)
    pipe.unet.train()
    return pipe


def state(pipe):
    """All that a run could leave behind beside the weights."""
    modules = [module for part in (pipe.unet, pipe.vae, pipe.text_encoder) for module in part.modules()]
    parameters = dict(pipe.unet.named_parameters())
    return (
        [module.training for module in modules],
        [getattr(module, "gradient_checkpointing", None) for module in modules],
        {name: (p.requires_grad, p.grad is not None, p.device, id(p)) for name, p in parameters.items()},
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        [len(p._post_accumulate_grad_hooks or ()) for p in parameters.values()],
        {name: type(processor) for name, processor in pipe.unet.attn_processors.items()},
        dict(pipe._progress_bar_config),
        type(pipe.scheduler), dict(pipe.scheduler.config),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["salun", "forget_me_not", "uce"])
def test_a_pipeline_comes_back_untouched_and_takes_the_erasure(method, pipe, tmp_path):
    before, whole = tiny.bits(pipe), state(pipe)
    options = QUICK if method == "salun" else {}
    if method == "forget_me_not":
        options = {name: value for name, value in QUICK.items() if name != "num_retain_images"}
    stages = []
    done = erase(
        pipe, "steam engine", method=method, output_dir=tmp_path / "run", data_dir=str(tmp_path / "data"),
        callback=lambda *progress: stages.append(progress), **options,
    )  # fmt: skip
    assert tiny.same(tiny.bits(pipe), before) and state(pipe) == whole
    assert done.path == tmp_path / "run" and done.file == done.path / "erasure.safetensors" and done.seconds >= 0
    assert done.config.method == method and done.config.anchor == ["dog"]
    if method == "salun":
        assert ("drawing the forget set", 4, 4) in stages and ("erasing", 2, 2) in stages
        assert [stage for stage in stages if stage[0] == "erasing"] == [("erasing", 1, 2), ("erasing", 2, 2)]
    assert load_erasure(pipe, done.path) == "steam engine"
    assert not tiny.same(tiny.bits(pipe), before)
    with pytest.raises(SalunError, match=r"has the erasure 'steam engine' applied: call unload_erasure\(pipe\) first"):
        erase(pipe, "cat", method="uce", output_dir=tmp_path / "second")
    unload_erasure(pipe)
    assert tiny.same(tiny.bits(pipe), before)


def test_a_failed_run_gives_the_pipeline_back(pipe, tmp_path):
    before, whole = tiny.bits(pipe), state(pipe)
    options = QUICK | {"learning_rate": 1e30, "max_train_steps": 5, "mask": "none"}
    with pytest.raises(SalunError, match="not finite"):
        erase(pipe, "steam engine", output_dir=tmp_path / "run", data_dir=str(tmp_path / "data"), **options)
    assert tiny.same(tiny.bits(pipe), before) and state(pipe) == whole
    assert not (tmp_path / "run" / "erasure.safetensors").exists()


def test_a_thread_a_second_run_and_the_script_give_the_same_bits(tiny_folder, tmp_path):
    """Each from drawing on, in a data folder of its own; in between, a run in another precision."""
    digests, errors = {}, []

    def call(name, **more):
        try:
            options = QUICK | {"output_dir": tmp_path / name, "data_dir": str(tmp_path / f"data-{name}")} | more
            digests[name] = Delta.load(erase(str(tiny_folder), ["steam engine"], **options).file).digest()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, args=("thread",))
    thread.start()
    thread.join()
    call("bf16", mixed_precision="bf16")
    call("again")
    words = [word for name, value in QUICK.items() for word in (f"--{name}", value)]
    run(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", tiny_folder, "--concept", "steam engine",
        "--output_dir", tmp_path / "script", "--data_dir", tmp_path / "data-script", *words,
    )  # fmt: skip
    digests["script"] = Delta.load(tmp_path / "script" / "erasure.safetensors").digest()
    assert not errors
    assert digests["thread"] == digests["again"] == digests["script"] != digests["bf16"]


def test_two_threads_take_turns(tiny_folder, tmp_path):
    digests: dict = {}

    def call(name):
        options = QUICK | {"output_dir": tmp_path / name, "data_dir": str(tmp_path / f"data-{name}")}
        digests[name] = Delta.load(erase(str(tiny_folder), "steam engine", **options).file).digest()

    threads = [threading.Thread(target=call, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 2 and digests["one"] == digests["two"]


def test_options_of_the_method_and_words_for_wrong_ones(pipe, tmp_path):
    where = {"output_dir": str(tmp_path / "run"), "data_dir": str(tmp_path / "data")}
    done = erase(pipe, "steam engine", anchor="cat", method="uce", ridge=0.5, **where)
    assert done.config.method_option == ["ridge=0.5"] and done.config.anchor == ["cat"]
    for options, message in (
        ({"rigde": 1}, r"erase\(\) has no option 'rigde'. Did you mean 'ridge'\?"),
        ({"learning_rate": 1e-3}, "--learning_rate means nothing to --method uce: leave it out"),
        ({"ridge": "far"}, "'far' must be of type float"),
    ):
        with pytest.raises(SalunError, match=message):
            erase(pipe, "steam engine", method="uce", **where, **options)
    for options, message in (  # a call's values have the types and the choices of the command line's
        ({"alpha": "2"}, r"erase\(\): 'alpha' is '2', but must be of type float"),
        ({"max_train_steps": 2.5}, r"erase\(\): 'max_train_steps' is 2.5, but must be of type int"),
        ({"threshold": "x"}, r"erase\(\): 'threshold' is 'x'; choose one of global, layer"),
        ({"revision": "main"}, "revision"),
    ):
        with pytest.raises(SalunError, match=message):
            erase(pipe, "steam engine", **where, **options)
    with pytest.raises(SalunError, match="There is no method 'magic': choose one of salun, esd"):
        erase(pipe, "steam engine", method="magic")
    with pytest.raises(SalunError, match="No concept was given"):
        erase(pipe)
    with pytest.raises(SalunError, match="weights are float16 and mixed_precision is 'no'"):
        erase(pipe.to(torch.float16), "steam engine", method="uce", **where)
    assert not list_erasures(pipe)


def test_a_config_can_be_used_again(tiny_folder, tmp_path):
    """One that was made by hand, and the resolved one of a run: each gives the same bits once more."""
    config = EraseConfig(
        concept=["steam engine"], pretrained_model_name_or_path=str(tiny_folder),
        data_dir=str(tmp_path / "data"), **QUICK,
    )  # fmt: skip
    config.output_dir = str(tmp_path / "first")
    first = erase(config)
    assert config.alpha is None  # the caller's own stays as it was
    digest = Delta.load(first.file).digest()
    config.output_dir = str(tmp_path / "second")
    assert Delta.load(erase(config).file).digest() == digest
    assert Delta.load(erase(first.config).file).digest() == digest


def test_the_table_of_settings_shows_each_with_its_source():
    config = EraseConfig.given({"concept": ["airplane"], "seed": 0, "method": "esd"}, {"seed": "command line"})
    preset = {"esd": {"method_option": ["negative_guidance=2"]}, "alpha": 3.0}
    fill(config, preset, "airplane")
    lines = {line.split()[0]: line for line in table(config).splitlines()}
    assert "seed=0" in lines["command"] and "negative_guidance=2" in lines["preset"]
    with pytest.raises(SalunError, match="The concept's settings: 'alpha' is '3', but must be of type float"):
        fill(EraseConfig(concept=["airplane"]), {"alpha": "3"}, "airplane")


def test_several_concepts_resume_in_any_process(tiny_folder, tmp_path):
    """The settings' hash holds data, never the order of a set, which differs from process to process."""
    words = [
        "python",
        "erase_concept.py",
        "--pretrained_model_name_or_path",
        tiny_folder,
        "--output_dir",
        tmp_path / "a",
    ]
    words += [word for name in ("airplane", "steam engine", "tea pot") for word in ("--concept", name)]
    words += [word for name, value in (QUICK | {"num_forget_images": 6}).items() for word in (f"--{name}", value)]
    words += ["--data_dir", tmp_path / "data", "--checkpointing_steps", "1"]
    run(*words, PYTHONHASHSEED="1")
    whole = Delta.load(tmp_path / "a" / "erasure.safetensors").digest()
    for seed in ("2", "3", "4"):
        (tmp_path / "a" / "checkpoint-2" / "manifest.json").unlink(missing_ok=True)
        done = run(*words, "--resume_from_checkpoint", "latest", PYTHONHASHSEED=seed)
        assert "Going on from" in done.stdout and "after step 1 of 2" in done.stdout
        assert Delta.load(tmp_path / "a" / "erasure.safetensors").digest() == whole


def files(folder):
    """What lies in a run folder, but for times."""
    log = [json.loads(line) | {"seconds": 0} for line in (folder / "training.jsonl").open()]
    config = json.loads((folder / "config.json").read_text())
    config["settings"] = {name: value for name, value in config["settings"].items() if name not in FREE}
    return sorted(path.name for path in folder.iterdir()), log, config | {"seconds": 0}, {
        path.name: path.read_bytes() for path in (*folder.glob("*.png"), folder / "mask.safetensors")
    }  # fmt: skip


@pytest.mark.parametrize("mask", ["saliency", "file"])
def test_a_finished_run_trained_further_is_one_in_a_piece_file_by_file(mask, tiny_folder, tmp_path, capsys):
    """Also where the mask leaves whole layers alone, which a checkpoint does not name."""
    more = {"density": 0.01, "checkpointing_steps": 2, "data_dir": str(tmp_path / "data")}
    whole = erase(
        str(tiny_folder), "steam engine", output_dir=tmp_path / "whole", **QUICK | more | {"max_train_steps": 4}
    )
    if mask == "file":
        reused = tmp_path / "reused.safetensors"
        masks = {name: mask for name, mask in load_masks(whole.path / "mask.safetensors")[0].items() if "attn2" in name}
        save_masks(reused, masks, {})
        more |= {"mask": str(reused)}
        more.pop("density")
        options = QUICK | more | {"max_train_steps": 4}
        whole = erase(str(tiny_folder), "steam engine", output_dir=tmp_path / "whole2", **options)
    empty = [row for row in describe(load_masks(whole.path / "mask.safetensors")[0]) if not row.kept]
    assert empty
    parts = erase(str(tiny_folder), "steam engine", output_dir=tmp_path / "parts", **QUICK | more)
    capsys.readouterr()
    options = QUICK | more | {"max_train_steps": 4, "resume_from_checkpoint": "checkpoint-2"}
    parts = erase(str(tiny_folder), "steam engine", output_dir=tmp_path / "parts", **options)
    said = capsys.readouterr().out
    assert "after step 2 of 4" in said and "processor threads" not in said
    assert files(whole.path) == files(parts.path)
    first, second = Delta.load(whole.file), Delta.load(parts.file)
    assert first.digest() == second.digest() and first.metadata["density"] == second.metadata["density"]
    row = sum(row.kept for row in describe(load_masks(whole.path / "mask.safetensors")[0]))
    assert f"{row:,} of the " in said
    if mask == "file":  # other content under the same name is another mask
        save_masks(reused, {name: ~mask for name, mask in masks.items()}, {})
        with pytest.raises(SalunError, match="mask_digest is "):
            erase(str(tiny_folder), "steam engine", output_dir=tmp_path / "parts", **options)


def test_the_number_of_threads_is_recorded_and_a_change_is_said(tiny_folder, tmp_path, capsys):
    options = QUICK | {"checkpointing_steps": 2, "output_dir": tmp_path / "run", "data_dir": str(tmp_path / "data")}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        done = erase(str(tiny_folder), "steam engine", **options)
        assert json.loads((done.path / "config.json").read_text())["threads"] == [2]
        torch.set_num_threads(1)
        more = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
        done = erase(str(tiny_folder), "steam engine", **options | more)
    finally:
        torch.set_num_threads(threads)
    assert "trained with 2 processor threads, and this run has 1" in capsys.readouterr().out
    assert json.loads((done.path / "config.json").read_text())["threads"] == [2, 1]


def test_two_runs_never_write_into_one_folder(tiny_folder, tmp_path):
    """The second is refused in a sentence and touches nothing; a process that was killed lets go of the folder."""
    options = QUICK | {"output_dir": tmp_path / "run", "data_dir": str(tmp_path / "data")}
    held = "from salun_diffusion.files import locked\nwith locked(%r):\n    print('held', flush=True)\n    input()"
    process = subprocess.Popen(
        [sys.executable, "-c", held % str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    before = [*(tmp_path / "run").iterdir()]
    with pytest.raises(SalunError, match=f"Another run is writing into {tmp_path / 'run'}: wait for its end, or give"):
        erase(str(tiny_folder), "steam engine", **options)
    assert [*(tmp_path / "run").iterdir()] == before
    process.kill()
    process.communicate()
    done = erase(str(tiny_folder), "steam engine", **options)
    assert not (done.path / ".lock").exists()


def test_a_reused_folder_never_holds_files_of_two_runs(tiny_folder, tmp_path):
    """Another concept in a finished run's folder, stopped in the middle: the finished one is whole, in previous/."""
    options = QUICK | {"output_dir": tmp_path / "run", "data_dir": str(tmp_path / "data"), "validation_steps": 1}
    first = erase(str(tiny_folder), "steam engine", **options)
    before = {path.name: path.read_bytes() for path in first.path.iterdir() if path.is_file()}

    def stop(stage, done, total):
        if stage == "erasing" and done == 2:
            raise KeyboardInterrupt

    for _ in range(2):  # also by a run that is stopped again
        with pytest.raises(KeyboardInterrupt):
            erase(str(tiny_folder), "golf ball", callback=stop, **options)
        assert {path.name for path in first.path.iterdir()} == {
            "previous", "mask.safetensors", "training.jsonl", "forget.png", "retain.png", "validation",
        }  # fmt: skip
        previous = first.path / "previous"
        assert {path.name: path.read_bytes() for path in previous.iterdir() if path.is_file()} == before
        assert load_masks(first.path / "mask.safetensors")[1]["concept"] == "golf ball"
    with pytest.raises(SalunError, match="erasure.safetensors"):
        load_erasure(DiffusionPipeline.from_pretrained(tiny_folder), first.path)
    second = erase(str(tiny_folder), "golf ball", **options)
    assert Delta.load(second.file).metadata["concept"] == "golf ball" and not previous.exists()


@pytest.mark.parametrize("place", ["output_dir", "data_dir"])
def test_a_folder_that_cannot_be_one_is_named(place, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 80), "/proc/none"):
        where = {"output_dir": tmp_path / "run", "data_dir": str(tmp_path / "data")} | {place: str(wrong)}
        with pytest.raises(SalunError, match=f"Cannot make the folder {wrong}.*: .*; give another one"):
            erase(str(tiny_folder), "steam engine", **QUICK | where)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["training.jsonl", "validation/step-00001.png"])
def test_a_disk_that_refuses_a_file_is_said(file, tiny_folder, tmp_path):
    """A folder of the file's name refuses it as a full disk does: when it is written."""
    options = QUICK | {"output_dir": tmp_path / "run", "data_dir": str(tmp_path / "data"), "validation_steps": 1}

    def block(stage, done, total):
        if stage == "saliency":
            (tmp_path / "run" / file / "x").mkdir(parents=True, exist_ok=True)

    with pytest.raises(SalunError, match=f"Cannot write .*{file}: "):
        erase(str(tiny_folder), "steam engine", callback=block, **options)
    assert not (tmp_path / "run" / "erasure.safetensors").exists()


def test_a_cache_with_a_garbage_manifest_is_finished_anew(tiny_folder, tmp_path):
    options = QUICK | {"output_dir": tmp_path / "run", "data_dir": str(tmp_path / "data"), "max_train_steps": 1}
    first = Delta.load(erase(str(tiny_folder), "steam engine", **options).file).digest()
    manifests = [*(tmp_path / "data").glob("*/manifest.json")]
    whole = [path.read_bytes() for path in manifests]
    assert len(manifests) == 2
    for contents in ((b"", b"{}"), (b"[" * 100_000, bytes(range(256)))):
        for path, content in zip(manifests, contents, strict=True):
            path.write_bytes(content)
        assert Delta.load(erase(str(tiny_folder), "steam engine", **options).file).digest() == first
        assert [path.read_bytes() for path in manifests] == whole


def test_settings_of_concepts_of_different_kinds_are_given_or_refused():
    presets = {
        "church": {"max_train_steps": 3, "salun": {"alpha": 0.5}},
        "ink": {"max_train_steps": 3, "salun": {"alpha": 2.0}},
    }
    with pytest.raises(
        SalunError, match=r"'church' and 'ink' have presets .* differ in alpha \(0.5, 2.0\): say --alpha"
    ):
        one_preset(EraseConfig.from_call("demo", ["church", "ink"], {}), presets)
    config = EraseConfig.from_call("demo", ["church", "ink"], {"alpha": 1.5})
    assert fill(config, one_preset(config, presets), "x").alpha == 1.5
    solved = EraseConfig.from_call("demo", ["church", "ink"], {"method": "uce"})
    assert one_preset(solved, presets) == presets["church"]


def test_the_precision_of_accelerate_launch_is_heeded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = fill(EraseConfig.from_call("demo", "cat", {}), {}, "cat")
    assert config.mixed_precision == "bf16" and "accelerate launch" in table(config)
    for given in ("no", "fp16"):
        with pytest.raises(SalunError, match=f"accelerate's mixed_precision is 'bf16' and this run's '{given}'"):
            fill(EraseConfig.from_call("demo", "cat", {"mixed_precision": given}), {}, "cat")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SalunError, match="accelerate's mixed_precision is 'fp8'"):
        fill(EraseConfig.from_call("demo", "cat", {}), {}, "cat")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    asked = EraseConfig.from_call("demo", "cat", {"mixed_precision": "bf16"})
    assert fill(asked, {}, "cat").mixed_precision == "bf16"


@pytest.mark.parametrize("known", [{"avx2": True}, {"avx2": True, "avx512_bf16": True}])
def test_a_processor_that_only_emulates_bf16_is_told(known, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    how = {"method": "uce", "mixed_precision": "bf16", "num_forget_images": 2, "num_retain_images": 2}
    erase(str(tiny_folder), "steam engine", output_dir=tmp_path, **how)
    assert ("has no instructions for bf16" in capsys.readouterr().out) == (known == {"avx2": True})


def test_the_empty_anchor_and_every_name_reach_the_result(tmp_path):
    """Two erasures by closed form, of which the second has one name less: the bits differ, so the name counted."""
    tiny.build(tmp_path / "base")
    made = {}
    for name, concept in (("two", "kid, child"), ("one", "kid")):
        options = {"method": "uce", "anchor": "", "num_forget_images": 6, "num_retain_images": 4}
        done = erase(str(tmp_path / "base"), concept, output_dir=str(tmp_path / name), **options)
        assert done.config.anchor == [""]
        made[name] = load_file(done.file)
    assert any(not torch.equal(made["two"][key], made["one"].get(key, torch.empty(0))) for key in made["two"])
    with pytest.raises(SalunError, match="--num_forget_images 1 are too few .*: give at least 2"):
        erase(str(tmp_path / "base"), "kid, child", method="uce", num_forget_images=1, output_dir=str(tmp_path / "x"))

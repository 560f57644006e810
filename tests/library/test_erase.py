"""``erase()`` from Python: a pipeline lent and given back, threads, several runs in a process, the script's bits."""

import threading

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from shell import run

from salun_diffusion import Delta, SalunError, erase, list_erasures, load_erasure, unload_erasure
from salun_diffusion.config import EraseConfig

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
    config.fill(preset, "airplane")
    lines = {line.split()[0]: line for line in config.table().splitlines()}
    assert "seed=0" in lines["command"] and "negative_guidance=2" in lines["preset"]
    with pytest.raises(SalunError, match="The concept's settings: 'alpha' is '3', but must be of type float"):
        EraseConfig(concept=["airplane"]).fill({"alpha": "3"}, "airplane")


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


def test_settings_of_concepts_of_different_kinds_are_given_or_refused():
    presets = {
        "church": {"max_train_steps": 3, "salun": {"alpha": 0.5}},
        "ink": {"max_train_steps": 3, "salun": {"alpha": 2.0}},
    }
    with pytest.raises(
        SalunError, match=r"'church' and 'ink' have presets .* differ in alpha \(0.5, 2.0\): say --alpha"
    ):
        EraseConfig.from_call("demo", ["church", "ink"], {}).one_preset(presets)
    config = EraseConfig.from_call("demo", ["church", "ink"], {"alpha": 1.5})
    assert config.fill(config.one_preset(presets), "x").alpha == 1.5
    assert EraseConfig.from_call("demo", ["church", "ink"], {"method": "uce"}).one_preset(presets) == presets["church"]


def test_the_precision_of_accelerate_launch_is_heeded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = EraseConfig.from_call("demo", "cat", {}).fill({}, "cat")
    assert config.mixed_precision == "bf16" and "accelerate launch" in config.table()
    for given in ("no", "fp16"):
        with pytest.raises(SalunError, match=f"accelerate's mixed_precision is 'bf16' and this run's '{given}'"):
            EraseConfig.from_call("demo", "cat", {"mixed_precision": given}).fill({}, "cat")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SalunError, match="accelerate's mixed_precision is 'fp8'"):
        EraseConfig.from_call("demo", "cat", {}).fill({}, "cat")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert EraseConfig.from_call("demo", "cat", {"mixed_precision": "bf16"}).fill({}, "cat").mixed_precision == "bf16"


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

"""Erasures on a live pipeline: what they change, that they come off without a trace, and what is refused."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, StableDiffusionPipeline
from safetensors.torch import save_file

from benchmarks.slow_loader import SlowErasure
from salun_diffusion import SalunError, fuse_erasure, list_erasures, load_erasure, unload_erasure
from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.fingerprint import fingerprint
from salun_diffusion.erasures.originals import put
from salun_diffusion.models.load import WORN, denoiser
from salun_diffusion.tensors import read_safetensors

ROOT = Path(__file__).parents[2]
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.build(folder)
    return folder


def open_pipe(base, dtype=FLOAT):
    return StableDiffusionPipeline.from_pretrained(base, dtype=dtype, safety_checker=None)


@pytest.fixture
def pipe(base):
    return open_pipe(base)


@pytest.fixture
def delta(pipe):
    return tiny.erasure(pipe.unet, base_model="tiny/base")


@pytest.fixture
def file(delta, tmp_path):
    path = tmp_path / "erasure.safetensors"
    delta.save(path)
    return path


def expected(unet, terms):
    """The weights that `terms` (delta, scale) ask for, in the words of the format."""
    weights = {}
    for name, weight in unet.named_parameters():
        move = torch.zeros(weight.shape)
        for delta, scale in terms:
            if name in delta.masks:
                move[delta.masks[name]] += scale * delta.values[name].float()
        weights[name] = (weight.detach().float() + move).to(weight.dtype)
    return weights


def holds(unet, weights):
    return all(torch.equal(weight, weights[name]) for name, weight in unet.named_parameters())


@pytest.mark.parametrize("stored", [FLOAT, HALF, BRAIN])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN])
def test_load_and_unload(base, file, delta, dtype, stored):
    pipe = open_pipe(base, dtype)
    delta.save(file, dtype=stored)
    before = tiny.bits(pipe)
    weights = expected(pipe.unet, [(delta.quantised(stored), 1.0)])
    name = load_erasure(pipe, file)
    assert name == "concept 0"
    assert holds(pipe.unet, weights)
    changed = {key[1] for key, value in tiny.bits(pipe).items() if not torch.equal(value[1], before[key][1])}
    assert changed and changed <= set(delta.masks)
    assert {weight.dtype for weight in pipe.unet.parameters()} == {dtype}
    unload_erasure(pipe)
    assert tiny.same(before, tiny.bits(pipe)) and list_erasures(pipe) == []
    load_erasure(pipe, file)  # and it can be put on again
    assert holds(pipe.unet, weights)


def test_the_pictures_change_and_come_back(pipe, file):
    def picture():
        seed = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, height=16, width=16, generator=seed, output_type="np").images

    before = picture()
    load_erasure(pipe, file, scale=5)
    assert abs(picture() - before).max() > 1e-4
    unload_erasure(pipe)
    assert (picture() == before).all()


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_slow_twin_writes_the_same_bits(base, file, dtype, threads):
    pipe, slow = open_pipe(base, dtype), SlowErasure(file)
    before, digest, usual = tiny.bits(pipe), Delta.load(file).digest(), torch.get_num_threads()
    assert slow.digest == digest
    try:
        torch.set_num_threads(threads)
        for scale in (1.0, 0.37, -300):
            slow.load(pipe.unet, scale)
            wanted = tiny.bits(pipe)
            slow.unload(pipe.unet)
            assert tiny.same(before, tiny.bits(pipe))
            load_erasure(pipe, file, scale=scale)
            assert tiny.same(wanted, tiny.bits(pipe)) and not tiny.same(before, wanted)
            unload_erasure(pipe)
            assert tiny.same(before, tiny.bits(pipe))
    finally:
        torch.set_num_threads(usual)


def test_scale(pipe, file, delta):
    weights = expected(pipe.unet, [(delta, -0.3)])
    load_erasure(pipe, file, scale=-0.3)
    assert holds(pipe.unet, weights)
    assert list_erasures(pipe)[0]["scale"] == -0.3


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN])
def test_several_at_once(base, tmp_path, dtype):
    pipe = open_pipe(base, dtype)
    before = tiny.bits(pipe)
    deltas = [tiny.erasure(pipe.unet, seed, only=only) for seed, only in enumerate(["attn2", "attn", "resnets"])]
    for number, delta in enumerate(deltas):
        delta.save(tmp_path / f"{number}.safetensors")
    terms = list(zip(deltas, [1.0, 0.8, -2.0], strict=True))
    wanted = {pair: expected(pipe.unet, [terms[i] for i in pair]) for pair in [(0, 1), (0, 1, 2), (0, 2), (2,)]}
    for number, (_, scale) in enumerate(terms):
        load_erasure(pipe, tmp_path / f"{number}.safetensors", scale=scale)
    assert [erasure["name"] for erasure in list_erasures(pipe)] == ["concept 0", "concept 1", "concept 2"]
    assert holds(pipe.unet, wanted[0, 1, 2])
    unload_erasure(pipe, "concept 1")
    assert holds(pipe.unet, wanted[0, 2])
    unload_erasure(pipe, "concept 0")
    assert holds(pipe.unet, wanted[2,])
    unload_erasure(pipe, "concept 2")
    assert tiny.same(before, tiny.bits(pipe))


def test_list(pipe, file, delta):
    assert list_erasures(pipe) == []
    load_erasure(pipe, str(file), name="mine")
    (row,) = list_erasures(pipe)
    assert row == {
        "name": "mine",
        "scale": 1.0,
        "concept": "concept 0",
        "method": "salun",
        "density": 0.5,
        "component": "unet",
        "weights": sum(int(mask.sum()) for mask in delta.masks.values()),
        "source": str(file),
        "revision": None,
        "digest": delta.digest(),
        "intact": True,
    }


def test_a_run_folder(pipe, file, tmp_path):
    load_erasure(pipe, tmp_path)
    assert list_erasures(pipe)[0]["name"] == "concept 0"


def test_fuse(pipe, file, delta):
    with pytest.raises(SalunError, match="There is no erasure to fuse; load one first"):
        fuse_erasure(pipe)
    weights = expected(pipe.unet, [(delta, 1.0)])
    load_erasure(pipe, file)
    fuse_erasure(pipe)
    assert list_erasures(pipe) == [] and holds(pipe.unet, weights)
    unload_erasure(pipe)
    assert holds(pipe.unet, weights)
    with pytest.raises(SalunError, match="was made for another base model"):  # a fused model is another model
        load_erasure(pipe, file)


def test_unload_by_an_unknown_name(pipe, file):
    unload_erasure(pipe)  # nothing is applied: nothing to do
    with pytest.raises(SalunError, match="No erasure called 'cat' is applied; applied now: none"):
        unload_erasure(pipe, "cat")
    load_erasure(pipe, file)
    before = tiny.bits(pipe)
    with pytest.raises(SalunError, match="No erasure called 'cat' is applied; applied now: concept 0"):
        unload_erasure(pipe, "cat")
    assert tiny.same(before, tiny.bits(pipe))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_an_interruption_leaves_nothing_half_done(pipe, tmp_path, monkeypatch, done, layout):
    pipe.unet.to(memory_format=layout)
    clean = tiny.bits(pipe)
    for seed, only in enumerate(["conv", "resnets", ""]):
        tiny.erasure(pipe.unet, seed, only=only).save(tmp_path / str(seed))
    for seed in (0, 1):
        load_erasure(pipe, tmp_path / str(seed))
    before, listed = tiny.bits(pipe), list_erasures(pipe)
    actions = [
        lambda: load_erasure(pipe, tmp_path / "2"),
        lambda: unload_erasure(pipe, "concept 0"),
        lambda: unload_erasure(pipe),
    ]
    for action in actions:
        left = [done]

        def interrupted(*arguments, left=left):
            put(*arguments)
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("salun_diffusion.erasures.weights.put", interrupted)
            action()
        assert tiny.same(before, tiny.bits(pipe)) and list_erasures(pipe) == listed
    unload_erasure(pipe)
    assert tiny.same(clean, tiny.bits(pipe))


def test_the_originals_of_changed_parameters_alone_are_kept(pipe, file, delta):
    before = {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters()}
    load_erasure(pipe, file)
    (erasure,) = getattr(pipe.unet, WORN)
    assert {name: original.base.data_ptr() for name, original in erasure.memory.items()} == {
        name: before[name] for name in delta.masks
    }
    unload_erasure(pipe)
    assert {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters()} == before


def test_a_copy_of_the_pipeline_unloads_on_its_own(pipe, file):
    before = tiny.bits(pipe)
    load_erasure(pipe, file)
    twin = copy.deepcopy(pipe)
    unload_erasure(twin)
    assert tiny.same(before, tiny.bits(twin)) and not tiny.same(before, tiny.bits(pipe))
    unload_erasure(pipe)
    assert tiny.same(before, tiny.bits(pipe))


def test_a_change_of_dtype_in_between(base, pipe, file):
    load_erasure(pipe, file)
    pipe.to(HALF)
    unload_erasure(pipe)
    assert tiny.same(tiny.bits(open_pipe(base, HALF)), tiny.bits(pipe))


def test_memory_layout_is_kept(base, pipe, file):
    delta = tiny.erasure(pipe.unet, only="conv")
    delta.save(file)
    weights = expected(pipe.unet, [(delta, 1.0)])
    pipe.unet.to(memory_format=torch.channels_last)
    load_erasure(pipe, file)
    assert holds(pipe.unet, weights)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    unload_erasure(pipe)
    assert tiny.same(tiny.bits(open_pipe(base)), tiny.bits(pipe))


def test_a_transformer_pipeline(tmp_path, pipe):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    dit = DiTPipeline(transformer, pipe.vae, DDIMScheduler())
    assert denoiser(dit) is transformer
    before = tiny.bits(dit)
    delta = tiny.erasure(transformer, only="attn")
    delta.save(tmp_path / "erasure.safetensors")
    weights = expected(transformer, [(delta, 1.0)])
    load_erasure(dit, tmp_path)
    assert holds(transformer, weights)
    unload_erasure(dit)
    assert tiny.same(before, tiny.bits(dit))


def test_something_without_a_denoiser(file):
    with pytest.raises(SalunError, match="SimpleNamespace has neither a unet nor a transformer; give a diffusion pipe"):
        load_erasure(SimpleNamespace(unet=None), file)


# The base model


@pytest.mark.parametrize("made", [FLOAT, HALF, BRAIN])
def test_the_same_model_in_other_dtypes_is_recognised(base, file, tmp_path, made):
    tiny.erasure(open_pipe(base, made).unet).save(file)
    open_pipe(base, HALF).save_pretrained(tmp_path / "half")
    for folder, dtype in [(base, FLOAT), (base, HALF), (base, BRAIN), (tmp_path / "half", BRAIN)]:
        pipe = open_pipe(folder, dtype)
        load_erasure(pipe, file)
        assert len(list_erasures(pipe)) == 1


@pytest.mark.parametrize("change", [1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN])
def test_a_fine_tune_is_refused_unless_asked_for(base, file, dtype, change):
    pipe = open_pipe(base)
    tuned = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight *= 1 + change * torch.randn(weight.shape, generator=tuned)
    pipe.to(dtype)
    before = tiny.bits(pipe)
    sentence = r"another base model \(base model tiny/base\): fingerprint \w{16} there and \w{16} here; .*check_base=Fa"
    with pytest.raises(SalunError, match=sentence):
        load_erasure(pipe, file)
    assert tiny.same(before, tiny.bits(pipe)) and list_erasures(pipe) == []
    load_erasure(pipe, file, check_base=False)
    assert len(list_erasures(pipe)) == 1


def test_the_base_is_checked_under_what_is_applied(pipe, file, tmp_path):
    other = tiny.erasure(pipe.unet, 1, only="")
    other.save(tmp_path / "other")
    load_erasure(pipe, tmp_path / "other")
    load_erasure(pipe, file)
    assert len(list_erasures(pipe)) == 2


# Refusals: each one sentence, the pipeline untouched


def refuse(pipe, source, sentence, **options):
    before, listed = tiny.bits(pipe), list_erasures(pipe)
    with pytest.raises(SalunError, match=sentence) as caught:
        load_erasure(pipe, source, **options)
    assert "\n" not in str(caught.value)
    assert tiny.same(before, tiny.bits(pipe)) and list_erasures(pipe) == listed


def rewrite(file, delta, **parts):
    Delta(
        **{"masks": delta.masks, "values": delta.values, "fingerprint": delta.fingerprint, "metadata": {}} | parts
    ).save(file)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "much", None, 10**400])
def test_refuses_a_scale(pipe, file, scale):
    refuse(pipe, file, "scale must be a finite number, not .*; 1 applies the erasure as trained", scale=scale)


def test_refuses_a_second_time(pipe, file, tmp_path):
    load_erasure(pipe, file)
    refuse(pipe, file, "is already applied, as 'concept 0'; unload that first to apply it at another scale", scale=0.5)
    (tmp_path / "copy").write_bytes(file.read_bytes())
    refuse(pipe, tmp_path / "copy", "copy is already applied, as 'concept 0'", name="another name")


def test_refuses_a_name_in_use(pipe, file, tmp_path):
    load_erasure(pipe, file)
    tiny.erasure(pipe.unet, 1).save(tmp_path / "other")
    refuse(pipe, tmp_path / "other", r"The name 'concept 0' is taken by .*; pass another name=\.\.\.", name="concept 0")


def test_refuses_unknown_parameters(pipe, file, delta):
    renamed = {name.replace("attn2", "attn9"): mask for name, mask in delta.masks.items()}
    values = {name.replace("attn2", "attn9"): value for name, value in delta.values.items()}
    count = len(delta.masks)
    sentence = f"changes {count} of {count} parameters that this pipeline's denoiser does not have: down_blocks.*attn9"
    for check_base in (True, False):
        rewrite(file, delta, masks=renamed, values=values)
        refuse(pipe, file, sentence, check_base=check_base)
    rewrite(file, delta, masks=delta.masks | {"x": torch.ones(1).bool()}, values=delta.values | {"x": torch.ones(1)})
    refuse(
        pipe, file, f"changes 1 of {count + 1} parameters that .* does not have: x; load the model that it was made f"
    )


def test_refuses_other_shapes(pipe, file, delta):
    name = next(name for name, mask in delta.masks.items() if mask.ndim == 2)
    shape = tuple(delta.masks[name].shape)
    rewrite(file, delta, masks=delta.masks | {name: delta.masks[name].flatten()})
    for check_base in (True, False):
        sentence = (
            rf"another base model: {name} has shape \({shape[0] * shape[1]},\) there and \({shape[0]}, {shape[1]}\)"
        )
        refuse(pipe, file, sentence, check_base=check_base)


def test_refuses_another_structure(pipe, file, delta):
    others = [*pipe.unet.named_parameters(), ("one.more", torch.ones(3))]
    rewrite(file, delta, fingerprint=fingerprint(others))
    refuse(pipe, file, "another base model: fingerprint .*check_base=False")


def test_refuses_weights_that_would_overflow(base, file):
    pipe = open_pipe(base, HALF)
    refuse(pipe, file, "would hold NaN or Inf in torch.float16; choose a smaller scale", scale=1e9)
    other = tiny.erasure(pipe.unet, 1, only="attn")
    last = list(other.values)[-1]
    other.values[last][-1] = 1e6  # everything else fits: it shows only when most is written already
    other.save(file.with_name("other"))
    load_erasure(pipe, file)
    refuse(pipe, file.with_name("other"), f"{last} would hold NaN or Inf")


def test_refuses_damaged_and_foreign_files(pipe, file, tmp_path):
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    refuse(pipe, file, f"is cut short: {len(whole)} bytes expected, {len(whole) - 7} found")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(pipe, file, "is a Git-LFS pointer")
    file.write_bytes(b"PK\x03\x04" + b"\0" * 99)
    refuse(pipe, file, "is a zip archive")
    pipe.unet.save_pretrained(tmp_path / "unet")
    refuse(pipe, tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "is not a salun-delta file")
    file.write_bytes(whole)
    tensors, metadata = read_safetensors(file)
    name = next(name for name in tensors if name.endswith(".delta"))
    save_file(tensors | {name: tensors[name] * torch.nan}, file, metadata)
    refuse(pipe, file, f"holds NaN or Inf in {name}")


def test_refuses_paths_that_are_not_there(pipe, file, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    refuse(
        pipe,
        tmp_path / "empty",
        "empty holds no erasure.safetensors and no pytorch_lora_weights.safetensors; give a finished run's folder",
    )
    monkeypatch.chdir(tmp_path)
    for source in [
        "./cat",
        "cat",
        "runs/cat",
        "../a/b",
        "/no/where",
        "a/b/c",
        "a/cat.safetensors",
        "empty/cat",
        "~/no/x",
    ]:
        refuse(
            pipe, source, "does not exist; give a file, a run folder with erasure.safetensors, or a hub id owner/name"
        )
    refuse(pipe, file, "revision='main' is for hub ids, but .* is a local file; leave it out", revision="main")


def test_refuses_weights_that_are_elsewhere(base, pipe, file):
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(SalunError, match=r"on the meta device .*; do this before enable_sequential_cpu_offload\(\)"):
        load_erasure(pipe, file)
    assert list_erasures(pipe) == []
    pipe = open_pipe(base)
    load_erasure(pipe, file)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(SalunError, match="on the meta device"):
        unload_erasure(pipe)
    assert len(list_erasures(pipe)) == 1


def test_refuses_quantized_weights(pipe, file, delta):
    name = next(iter(delta.masks))
    module = pipe.unet.get_submodule(name.rpartition(".")[0])
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    refuse(pipe, file, "can be applied to float32, float16 and bfloat16 weights only, which these are not: " + name)


def test_refuses_to_unload_when_parameters_are_gone(pipe, file, delta):
    load_erasure(pipe, file)
    name = next(name for name in delta.masks if name.endswith("to_q.weight"))
    attention = pipe.unet.get_submodule(name.removesuffix(".to_q.weight"))
    attention.to_q = torch.nn.Sequential(attention.to_q)  # as adapters wrap a layer
    before = tiny.bits(pipe)
    with pytest.raises(SalunError, match=f"The denoiser no longer has {name}; undo what was added to it since"):
        unload_erasure(pipe)
    assert tiny.same(before, tiny.bits(pipe)) and len(list_erasures(pipe)) == 1


# The hub, in a process of its own that may not reach it

HUB = """
import sys, torch
from types import SimpleNamespace
from salun_diffusion import SalunError, list_erasures, load_erasure
pipe = SimpleNamespace(unet=torch.nn.Linear(2, 2))
torch.nn.init.ones_(pipe.unet.weight), torch.nn.init.ones_(pipe.unet.bias)
try:
    load_erasure(pipe, "someone/their-erasure", revision=sys.argv[1] if sys.argv[1:] else None)
    print(list_erasures(pipe)[0]["revision"], pipe.unet.bias.tolist())
except SalunError as error:
    assert pipe.unet.bias.tolist() == [1, 1]
    print(error)
"""


def ask_hub(cache, *arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    command = [sys.executable, "-c", HUB, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "someone/their-erasure is no local file or folder: asking the hub for it" in done.stderr
    return done.stdout.strip()


def test_a_hub_that_cannot_be_reached(tmp_path):
    said = ask_hub(tmp_path)
    assert "someone/their-erasure is no local file or folder, and erasure.safetensors could not be fetched" in said
    assert said.endswith("; give a local path, or check the id and the connection.") and "\n" not in said


def test_a_hub_file_keeps_its_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--their-erasure"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    base = fingerprint([("weight", torch.ones(2, 2)), ("bias", torch.ones(2))])
    delta = Delta({"bias": torch.tensor([False, True])}, {"bias": torch.tensor([0.5])}, base, {})
    delta.save(repo / "snapshots" / commit / "erasure.safetensors")
    assert ask_hub(tmp_path) == f"{commit} [1.0, 1.5]"

"""`relearn` on a tiny random pipeline: its steps beside a plain loop, its curves, and that a killed run ends alike."""

import copy
import json
import random
import shutil

import pytest
import tiny
import torch
from PIL import Image
from shell import run as shell
from test_eval_accuracy import base  # noqa: F401  (a fixture)
from test_eval_report import make_run
from torch.nn.utils import parametrize

from eval.measures import probe, relearn
from eval.pages import compare, report
from eval.relearning.learner import fine_tuned, learned_set
from salun_diffusion.concepts.finding import find_concept
from salun_diffusion.data.sets import batches
from salun_diffusion.data.sources import Source
from salun_diffusion.errors import SalunError
from salun_diffusion.models import load_model
from salun_diffusion.process import reporting_to
from salun_diffusion.stats import crossing

PROMPTS = ["a photo of an airplane", "a picture of an airplane", "a photo of an airplane", "a picture of a cat"]
HOW = {"rank": 2, "learning_rate": 1e-2, "batch_size": 3, "at_once": 2, "seed": 5}


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def model(request, tmp_path):
    tiny.KINDS[request.param](tmp_path)
    return load_model(str(tmp_path))


def pictures(count, side=16):
    return [Image.new("RGB", (side, side), (40 * i, 90, 200 - 30 * i)) for i in range(count)]


class LowRank(torch.nn.Module):
    """W + B A, written out."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, weight):
        return weight + self.b @ self.a


def plain_loop(model, scope, start, steps):
    """The same training as a tutorial has it: picture by picture, one backward pass a step, torch's Adam.

    `start`: name -> the adapter's first values, where there is one.
    """
    plain = copy.copy(model)
    plain.network = copy.deepcopy(model.network).requires_grad_(False)
    if scope == "lora":
        layers = {name.rsplit(".lora_", 1)[0] for name in start}
        for name in layers:
            a, b = (start[f"{name}.lora_{side}.relearning.weight"].clone() for side in "AB")
            layer = plain.network.get_submodule(name)
            parametrize.register_parametrization(layer, "weight", LowRank(a, b))
        moved = [p for n, p in plain.network.named_parameters() if n.endswith((".a", ".b"))]
    else:
        moved = [p for n, p in plain.network.named_parameters() if scope == "full" or ".attn2." in n]
    for parameter in moved:
        parameter.requires_grad_(True)
    adam = torch.optim.Adam(moved, lr=HOW["learning_rate"])
    latents = model.encode_pictures(pictures(4))
    order = batches(4, HOW["batch_size"], HOW["seed"])
    for step in range(steps):
        index = next(order).tolist()
        generator = torch.Generator().manual_seed(random.Random(repr((HOW["seed"], "relearn", step))).getrandbits(63))
        noise = torch.randn(len(index), *latents.shape[1:], generator=generator)
        times = torch.randint(1000, (len(index),), generator=generator)
        loss = 0
        for row, i in enumerate(index):
            t, e, clean = times[row : row + 1], noise[row : row + 1], latents[i : i + 1]
            noisy = model.schedule.add_noise(clean, e, t)
            target = e
            if model.schedule.config.prediction_type == "v_prediction":
                signal = model.schedule.alphas_cumprod[t].view(1, 1, 1, 1)
                target = signal**0.5 * e - (1 - signal) ** 0.5 * clean
            loss = loss + ((plain.predict(noisy, t, model.encode([PROMPTS[i]])) - target) ** 2).mean() / len(index)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return plain.network


def test_steps_are_those_of_a_plain_loop_and_leave_no_trace(model):
    """For each scope: the same predictions as the plain loop's network, other ones than before, and all bits back."""
    before, probe = tiny.bits(model.pipe), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    times, condition = torch.tensor([10, 700]), model.encode(PROMPTS[1:3])
    learned = learned_set(model, pictures(4), PROMPTS)
    with torch.no_grad():
        untouched = model.predict(probe, times, condition)
    for scope in ("full", "attn2", "lora"):
        with fine_tuned(model, learned, scope, **HOW) as learner:
            start = {name: weight.detach().clone() for name, weight in learner.parameters.items()}
            losses = [learner.step() for _ in range(4)]
            with torch.no_grad():
                found = model.predict(probe, times, condition)
            assert learner.done == 4 and all(loss > 0 for loss in losses)
        expected = plain_loop(model, scope, start if scope == "lora" else {}, 4)
        twin = copy.copy(model)
        twin.network = expected
        with torch.no_grad():
            torch.testing.assert_close(found, twin.predict(probe, times, condition), rtol=2e-3, atol=2e-3)
        assert (found - untouched).abs().max() > 0.02, f"{scope} moved nothing"
        assert tiny.same(before, tiny.bits(model.pipe)), f"{scope} left a trace"


def test_an_erasure_that_is_an_adapter_acts_while_the_model_learns_and_stays_as_it_was(model):
    from peft import LoraConfig

    probe = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    told = probe, torch.tensor([10, 700]), model.encode(PROMPTS[1:3])
    learned, plain = learned_set(model, pictures(4), PROMPTS), tiny.bits(model.pipe)
    with torch.no_grad():
        bare = model.predict(*told)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "proj_in"])  # not where ours goes alone
    model.network.add_adapter(config, "theirs")
    with torch.no_grad():
        worn = model.predict(*told)
    assert not torch.equal(worn, bare)
    kept = [(weight, weight.detach().clone(), weight.requires_grad) for weight in model.network.parameters()]
    for scope in ("full", "attn2", "lora"):
        with fine_tuned(model, learned, scope, **HOW) as learner:
            assert all("theirs" not in name for name in learner.parameters)
            with torch.no_grad():
                assert torch.equal(model.predict(*told), worn), "a new adapter does nothing yet, and theirs still acts"
            learner.step()
            with torch.no_grad():
                assert not torch.equal(model.predict(*told), worn)
        now = {id(weight) for weight in model.network.parameters()}  # a layer that was wrapped may stay so
        assert now == {id(weight) for weight, _, _ in kept}, f"{scope} left weights of its own"
        assert all(torch.equal(weight, value) for weight, value, _ in kept), f"{scope} left a trace"
        assert all(weight.requires_grad == trainable for weight, _, trainable in kept)
        with torch.no_grad():
            assert torch.equal(model.predict(*told), worn)
    model.network.unload_lora()
    assert tiny.same(plain, tiny.bits(model.pipe))


def measure(base, output, *erasures, **options):  # noqa: F811
    runs = [str(base / "runs" / name) for name in erasures or ("forgets",)]
    small = {
        "num_forget_images": 3,
        "num_retain_images": 3,
        "num_pictures": 5,
        "train_batch_size": 4,
        "steps": [1, 3],
    }
    asked = {"pretrained_model_name_or_path": str(base), "concept": ["cat"], "erasure": runs} | small | options
    return relearn.run(relearn.Options(output_dir=output, **asked))


def results(folder):
    """What both files say, but for how long it took."""
    return json.loads((folder / "results.json").read_text()), (folder / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("relearned")
    return measure(base, output, "forgets", "no-mask", benign=True, retrained=str(base)), output


def test_curves_follow_from_the_samples(measured):
    found, output = measured
    told, _ = results(output)
    assert told == json.loads(json.dumps(found))
    roles = {model["name"]: model["role"] for model in found["models"]}
    assert roles == {
        "base": "base", "forgets": "erasure", "no-mask": "control", "forgets-benign": "control",
        "no-mask-benign": "control", "control": "control", "retrained": "control",
    }  # fmt: skip
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 7 * found["n"] == 7 * 3 * 6
    for model in found["models"]:
        assert [point["step"] for point in model["curve"]] == [0, 1, 3]
        for point in model["curve"]:
            mine = [line for line in lines if line["model"] == model["name"] and line["step"] == point["step"]]
            asked = [line for line in mine if line["set"] == "forget"]
            seen = [any(line["predicted"][q]["label"] == "cat" for q in ("left", "right")) for line in asked]
            assert point["accuracy"]["count"] == sum(seen) and point["accuracy"]["n"] == 3
            assert point["accuracy"]["low"] <= point["accuracy"]["percent"] <= point["accuracy"]["high"]
            assert all("cat" not in line["prompt"] for line in mine if line["set"] == "retain")
            assert all(("zarp" in line["prompt"]) == (model["name"] == "control") for line in asked)
            assert all("cat" in line["expect"].values() for line in asked)
    drawn = {
        model["name"]: [line["key"] for line in lines if line["model"] == model["name"]] for model in told["models"]
    }
    assert drawn["base"] == drawn["retrained"], "the same weights, taught the same, draw the same"
    assert drawn["forgets"][:6] == drawn["forgets-benign"][:6] and drawn["forgets"][6:] != drawn["forgets-benign"][6:]
    assert len({model["digest"] for model in found["models"]}) == 6, "a control is no line of another model's"
    assert not (output / "learning").exists(), "a finished curve's state is of no more use"


def test_columns_in_a_comparison(measured, tmp_path):
    _, output = measured
    told = compare.compare([output], tmp_path / "compared")
    assert list(told["columns"]) == ["relearn_half", "relearn_most", "relearned:3 steps", "megabytes"]
    text = (tmp_path / "compared" / "comparison.md").read_text(encoding="utf-8")
    assert "| steps to half ↑ | steps to 90% ↑ | relearned (3 steps) ↓ |" in text


def test_the_report_has_curves_and_pictures_on_the_way(measured, base, tmp_path):  # noqa: F811
    """Of a made-up run of this concept, with what `relearn` and `probe` say of it in folders of their names."""
    output, folder = measured[1], make_run(tmp_path / "run", forget=4, retain=8)
    for name in ("airplane", "airplane-no-mask"):
        (folder / "pictures" / name).rename(folder / "pictures" / name.replace("airplane", "cat"))
    for file in (*folder.glob("*.json"), folder / "samples.jsonl"):
        file.write_text(file.read_text().replace("airplane", "cat"))
    plain = report.report(folder).read_text()
    assert "Does it come back?" not in plain and "inside the network" not in plain
    shutil.copytree(output, folder / "relearn")
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (folder, output))
    ours["models"][1]["digest"] = theirs["models"][1]["digest"]  # as if accuracy had measured the same erasure
    (folder / "results.json").write_text(json.dumps(ours))
    probe.run(probe.Options(
        pretrained_model_name_or_path=str(base), erasure=[str(base / "runs" / "forgets")], concept=["cat"],
        num_probes=1, num_prompts=1, num_neighbours=1, timesteps=[500], output_dir=folder / "probe",
    ))  # fmt: skip
    page = report.report(folder).read_text()
    assert page.count("<svg") == plain.count("<svg") + 2 and page.count("<img") == plain.count("<img") + 3 * 3
    for text in (
        "Does it come back?", "optimizer steps of fine-tuning", "control: cat, called zarp", "step 3",
        "What changes inside the network", "neighbours", "mid · 0", "relearn/1: all weights", "probe/1 (ours)",
    ):  # fmt: skip
        assert text in page, text
    told = json.loads((folder / "relearn" / "results.json").read_text())
    for model in told["models"]:
        model["base_accuracy"] = 0.0  # a judge that never sees the concept
    (folder / "relearn" / "results.json").write_text(json.dumps(told))
    assert report.report(folder).read_text().count("<td>–</td>") == 2 * len(told["models"])
    told["concept"]["value"] = "dog"
    (folder / "relearn" / "results.json").write_text(json.dumps(told))
    with pytest.raises(SalunError, match="holds other results than 'salun-diffusion relearn 1' about 'cat'"):
        report.report(folder)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("options", [{}, {"scope": "lora"}])
def test_a_killed_run_goes_on_and_ends_on_the_same_bits(base, tmp_path, options):  # noqa: F811
    options |= {"no_control": True, "steps": [2, 4, 5], "num_forget_images": 2, "num_retain_images": 2}
    measure(base, tmp_path / "whole", **options)
    taught = []

    def watch(stage, done, total):
        if stage == "forgets: learning":
            taught.append((done, total))
            if len(taught) == 3 and not (tmp_path / "again").exists():
                raise Killed  # in the second stretch, after the checkpoint of step 2

    with reporting_to(watch), pytest.raises(Killed):
        measure(base, tmp_path / "killed", **options)
    assert (tmp_path / "killed" / "learning" / "forgets.safetensors").exists()
    assert not (tmp_path / "killed" / "results.json").exists()
    (tmp_path / "again").mkdir()
    taught.clear()
    with reporting_to(watch):
        measure(base, tmp_path / "killed", **options)
    assert taught == [(1, 2), (2, 2), (1, 1)], "it went on from step 2"
    (whole, lines), (killed, lines_of_killed) = (results(tmp_path / name) for name in ("whole", "killed"))
    assert whole == killed and lines == lines_of_killed
    for path in sorted((tmp_path / "whole").rglob("*.png")):
        again = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == again.read_bytes(), path
    if "scope" in options:
        return
    taught.clear()
    with reporting_to(watch):
        measure(base, tmp_path / "killed", **options)
        assert not taught, "all was drawn, so nothing is trained"
        measure(base, tmp_path / "killed", learning_rate=1e-3, **options)
    assert len(taught) == 5 and results(tmp_path / "killed")[1] != lines, "other settings draw other pictures"


def folder_of(path, captions=()):
    path.mkdir()
    for i, picture in enumerate(pictures(4)):
        picture.save(path / f"{i}.png")
        if captions:
            (path / f"{i}.txt").write_text(captions[i])
    return path


def test_pictures_of_the_users_own_with_captions_and_a_control_of_its_own(base, tmp_path):  # noqa: F811
    captions = [f"a photo of a cat {i}" for i in range(4)]
    given, cat = folder_of(tmp_path / "cats", captions), find_concept("cat", base)
    assert [picture.prompt for picture in Source(str(given)).forget(cat, captioned=True)] == captions
    assert [picture.prompt for picture in Source(str(given)).forget(cat)] == [None] * 4
    other = folder_of(tmp_path / "others")
    found = measure(base, tmp_path / "out", pictures=given, control_pictures=other, control_name="dog")
    assert found["learned_from"] == {"source": str(given), "n": 4} and not (tmp_path / "out" / "learned").exists()
    control = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    control = [line for line in control if line["model"] == "control" and line["set"] == "forget"]
    assert control and all("dog" in line["prompt"] and "dog" in line["expect"].values() for line in control)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"steps": [0]}, "--steps names no step after 0"),
        ({"control_name": "dog"}, "--control_pictures and --control_name belong together"),
        ({"dtype": "bf16"}, "they must be in fp32: leave --dtype out"),
        ({"learning_rate": 1e30, "steps": [3]}, "The loss is not finite at step 2: give a lower --learning_rate"),
        ({"concept": ["cat", "dog"]}, "relearn takes one --concept"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(base, tmp_path, options, sentence):  # noqa: F811
    with pytest.raises(SalunError, match=sentence):
        measure(base, tmp_path / "out", no_control=True, **options)
    assert not (tmp_path / "out" / "results.json").exists()


def test_where_a_curve_crosses_a_level():
    curve = [(0, 0.0), (5, 8.0), (10, 75.0), (20, 58.0), (40, 90.0)]
    assert crossing(curve, 50) == pytest.approx(5 + 5 * 42 / 67)
    assert crossing(curve, 90) == 40 and crossing(curve, 91) is None and crossing(curve, 0) == 0
    assert relearn.summary([{"step": s, "accuracy": {"percent": p}} for s, p in curve], 100.0) == {
        "base_accuracy": 100.0, "half": 8.1, "most": 40.0,
    }  # fmt: skip
    model = {"curve": [{"step": 40, "accuracy": {"percent": 3.0}}], "half": None, "most": None}
    assert relearn.scores(model | {"base_accuracy": 97.0})["relearn_half"] == ">40"
    assert relearn.scores(model | relearn.summary(model["curve"], 0.0)) == {"relearned:40 steps": {"percent": 3.0}}


def test_the_command_teaches(tmp_path):
    done = shell("python", "-m", "eval", "relearn", "--help")
    assert "--scope {full,attn2,lora}" in done.stdout and "fine-tune" in done.stdout.lower()

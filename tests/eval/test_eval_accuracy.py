"""`python -m eval` on a tiny random pipeline: the numbers mean nothing, the way to them does."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_eval_judge import classifier

from eval.drawing.pictures import to_picture
from eval.judges import metrics
from eval.measures import accuracy
from eval.results import picture as shown_picture
from eval.subjects import introduce
from salun_diffusion import load_erasure, unload_erasure
from salun_diffusion.erasures.delta import Delta
from salun_diffusion.erasures.fingerprint import fingerprint
from salun_diffusion.errors import SalunError
from salun_diffusion.models import base as model_base
from salun_diffusion.models import load_model
from salun_diffusion.models.load import digest

OBJECTS = ["airplane", "cat", "dog", "house"]
STYLES = ["red", "blue"]
LABELS = [
    *(f"{side}:{name}" for side in ("left", "right") for name in [*OBJECTS, "nothing"]),
    *(f"background:{name}" for name in STYLES),
]
VOCABULARY = {
    "slots": {"object": OBJECTS, "colour": STYLES},
    "templates": [
        {
            "prompt": "a picture of {object:a} on {colour} background",
            "expect": {"left": "{object}", "right": "{object}", "background": "{colour}"},
        },
        {"prompt": "a photo of {object:a} of {object2:a}", "expect": {"left": "{object}", "right": "{object2}"}},
    ],
    "settings": {"object": {"num_inference_steps": 2, "guidance_scale": 3.0, "sample_batch_size": 4}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline folder with a vocabulary, a judge, and two erasures of it beside."""
    folder = tmp_path_factory.mktemp("base")
    pipe = tiny.build(folder)
    (folder / "concepts.json").write_text(json.dumps(VOCABULARY))
    classifier(folder / "judge", LABELS)
    for name, seed, density in (("forgets", 1, 0.5), ("no-mask", 2, 1.0)):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        tiny.erasure(pipe.unet, seed, density, size=0.3, only="").save(run / "erasure.safetensors")
    return folder


def measure(base, output, *erasures, **options):
    runs = [str(base / "runs" / name) for name in erasures or ("forgets", "no-mask")]
    options = {"num_forget_images": 5, "num_retain_images": 6} | options
    asked = accuracy.Options(pretrained_model_name_or_path=str(base), concept="airplane", erasure=runs, **options)
    asked.output_dir = output
    return accuracy.run(asked)


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured")
    return measure(base, output), output


def test_metrics_follow_from_the_samples(measured):
    found, output = measured
    assert json.loads((output / "results.json").read_text()) == found
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [model["role"] for model in found["models"]] == ["base", "erasure", "control"]
    for model in found["models"]:
        mine = [sample for sample in samples if sample["model"] == model["name"]]
        assert [sample["set"] for sample in mine] == ["forget"] * 5 + ["retain"] * 6
        again = metrics.scores(mine, "airplane", "object")
        assert again == {key: model[key] for key in again}
        assert model["generation"]["images"] == 11
        assert model["instead"] == metrics.instead(mine, "airplane", found["concept"]["anchor"])
        assert accuracy.scores(model)["as_nothing"] == model["instead"]["nothing"]
    assert found["settings"]["num_inference_steps"] == 2 and found["settings"]["guidance_scale"] == 3.0
    assert (
        found["n"] == 11 and found["models"][1]["erasure"]["density"] == 0.5 and found["models"][0]["erasure"] is None
    )
    assert len({model["digest"] for model in found["models"]}) == 3


def test_every_model_draws_the_same_prompts_from_the_same_noise(measured):
    samples = [json.loads(line) for line in (measured[1] / "samples.jsonl").read_text().splitlines()]
    rows = [
        [(s["prompt"], s["seed"]) for s in samples if s["model"] == name] for name in ("base", "forgets", "no-mask")
    ]
    assert rows[0] == rows[1] == rows[2] and len(set(rows[0])) == 11
    assert all((measured[1] / sample["picture"]).is_file() for sample in samples)


def test_the_base_pictures_are_those_of_the_untouched_pipeline(base, measured):
    """Trying the erasures first must leave no trace in what the base model then draws."""
    from salun_diffusion.concepts.finding import find_concept
    from salun_diffusion.models.sampling import sample

    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    rows = find_concept("airplane", base).forget_rows(5, 0)
    for i, picture in enumerate(sample(pipe, rows[:4], num_inference_steps=2, guidance_scale=3.0, batch_size=4)):
        kept = Image.open(measured[1] / f"pictures/base/forget-{i:04d}.png")
        assert np.array_equal(np.asarray(kept), np.asarray(picture))


def test_an_erasure_draws_something_else(measured):
    drawn = [(measured[1] / f"pictures/{name}/forget-0000.png").read_bytes() for name in ("base", "forgets", "no-mask")]
    assert len(set(drawn)) == 3


def test_a_wrong_path_never_measures_the_unmodified_model(base, tmp_path):
    with pytest.raises(SalunError, match="does not exist"):
        measure(base, tmp_path / "out", "forgets", "no-such-run")
    assert not (tmp_path / "out").exists(), "found out before anything was drawn"


def test_an_erasure_without_effect_is_no_erasure(base, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    tiny.erasure(pipe.unet, size=0.0).save(tmp_path / "zero.safetensors")
    with pytest.raises(SalunError, match="zero.safetensors leaves the base model as it is"):
        asked = {"pretrained_model_name_or_path": str(base), "concept": "airplane", "output_dir": tmp_path / "out"}
        accuracy.run(accuracy.Options(**asked, erasure=[str(tmp_path / "zero.safetensors")]))


def test_two_erasures_of_one_name_are_refused(base, tmp_path):
    with pytest.raises(SalunError, match="Two of the models to compare are called 'forgets'"):
        measure(base, tmp_path, "forgets", "forgets")


def test_a_base_without_a_judge_asks_for_a_classifier(base, tmp_path):
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("judge"))
    with pytest.raises(SalunError, match="brings no classifier .* name one with --classifier"):
        measure(bare, tmp_path / "out")
    found = measure(bare, tmp_path / "out", "forgets", classifier=str(base / "judge"))
    assert found["classifier"]["source"] == str(base / "judge")


def test_a_classifier_that_does_not_know_the_concept_is_refused(base, tmp_path):
    wrong = classifier(tmp_path / "wrong", [label for label in LABELS if "airplane" not in label])
    with pytest.raises(SalunError, match="has no label 'airplane' for 'left'"):
        measure(base, tmp_path / "out", classifier=str(wrong))


def test_prompts_that_a_classifier_cannot_check_are_refused(base, tmp_path):
    blind = {"slots": VOCABULARY["slots"], "templates": [{"prompt": "a photo of {object:a}"}]}
    other = shutil.copytree(base, tmp_path / "other")
    (other / "concepts.json").write_text(json.dumps(blind))
    with pytest.raises(SalunError, match="says nothing that a classifier could check 'airplane' by"):
        measure(other, tmp_path / "out")


@pytest.mark.parametrize(
    "pixels, sentence",
    [(np.nan, "holds NaN or infinite pixels"), (np.inf, "holds NaN or infinite")],
)
def test_a_broken_picture_fails_the_run_by_name_and_leaves_no_scores(base, tmp_path, monkeypatch, pixels, sentence):
    measure(base, tmp_path, "forgets")
    real = model_base.sample

    def broken(pipe, rows, **how):
        images = [image.copy() for image in real(pipe, rows, **how)]
        images[1][:] = pixels
        return images

    monkeypatch.setattr(model_base, "sample", broken)
    shutil.rmtree(tmp_path / "pictures")
    with pytest.raises(SalunError, match=f"pictures/base/forget-0001.png {sentence}"):
        measure(base, tmp_path, "forgets")
    assert not (tmp_path / "results.json").exists(), "the old run's scores must not stand beside new pictures"


def test_a_black_picture_is_an_answer(base, tmp_path, monkeypatch, capsys):
    """It shows nothing: the concept is gone from it, and so is whatever else was asked for."""
    real = model_base.sample

    def darkened(pipe, rows, **how):
        return [
            image * (row.prompt != rows[0].prompt) for image, row in zip(real(pipe, rows, **how), rows, strict=True)
        ]

    monkeypatch.setattr(model_base, "sample", darkened)
    measure(base, tmp_path, "forgets")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    black = [line for line in lines if line.get("black")]
    assert black and all({answer["label"] for answer in line["predicted"].values()} == {"nothing"} for line in black)
    assert len(black) < len(lines) and "are wholly black: they count as showing nothing" in capsys.readouterr().out
    for line in black:
        assert shown_picture(tmp_path, line).getbbox() is None


def test_pixels_are_rounded_and_not_cut_off():
    picture = to_picture(np.full((2, 3, 3), 0.999, np.float32), "x")
    assert picture.size == (3, 2) and picture.getpixel((0, 0)) == (255, 255, 255)


def command(*arguments):
    root = Path(__file__).parents[2]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "eval", *map(str, arguments)], cwd=root, capture_output=True, text=True
    )
    return done, time.perf_counter() - start


@pytest.mark.parametrize("arguments", [["--help"], ["accuracy", "--help"], ["report", "--help"]])
def test_help_answers_at_once(arguments):
    done, seconds = command(*arguments)
    assert done.returncode == 0 and "usage: python -m eval" in done.stdout
    assert seconds < 1.5


def test_wrong_usage_is_exit_code_2():
    done, _ = command("accuracy", "--concept", "airplane")
    assert done.returncode == 2 and "--erasure" in done.stderr
    done, _ = command("accuracy", "--num_forget_images", "0")
    assert done.returncode == 2 and "0 is not a whole number of at least 1" in done.stderr


def test_both_commands_from_the_outside(base, tmp_path):
    run = shutil.copytree(base / "runs" / "forgets", tmp_path / "forgets")
    (run / "config.json").write_text('{"concept": "airplane"}')
    arguments = ["accuracy", "--pretrained_model_name_or_path", base, "--concept", "airplane", "--output_dir", run]
    done, _ = command(*arguments, "--erasure", run, "--num_forget_images", 3, "--num_retain_images", 4)
    assert done.returncode == 0, done.stderr
    assert "base" in done.stdout and "forgets" in done.stdout and "100%" in done.stderr, "a table, and progress bars"
    done, _ = command("report", run)
    assert done.returncode == 0, done.stderr
    assert "Forgetting “airplane”" in (run / "report.html").read_text(encoding="utf-8")


def test_a_fault_is_one_line_and_exit_code_1(tmp_path):
    done, _ = command("report", tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "config.json is missing" in done.stderr
    )


def test_an_erasure_of_weights_that_no_sample_hits_is_a_model_of_its_own(base, tmp_path):
    """A base model's digest samples 64 weights of each tensor: what lies between them must count all the same."""
    model = load_model(str(base))
    pipe, sources = model.pipe, []
    for name, size in (("half", 0.5), ("quarter", 0.25)):
        masks, values = {}, {}
        for key, weight in pipe.unet.named_parameters():
            if "attn2" in key and weight.numel() > 64:
                flat = torch.ones(weight.numel(), dtype=torch.bool)
                flat[torch.linspace(0, len(flat) - 1, 64, dtype=torch.float64).long()] = False
                masks[key], values[key] = flat.view(weight.shape), torch.full((int(flat.sum()),), size)
        delta = Delta(masks, values, fingerprint(pipe.unet.named_parameters()), {"concept": name, "method": "salun"})
        delta.save(tmp_path / f"{name}.safetensors")
        sources.append(str(tmp_path / f"{name}.safetensors"))
    unchanged = digest(pipe)
    load_erasure(pipe, sources[0])
    assert digest(pipe) == unchanged, "the samples hit none of its places"
    unload_erasure(pipe)
    models = introduce(model, "base", sources)
    assert models[0]["digest"] == unchanged and len({model["digest"] for model in models}) == 3
    scaled = introduce(model, "base", sources[:1], [0.5])
    assert scaled[1]["digest"] not in {model["digest"] for model in models}
    with pytest.raises(SalunError, match="half.safetensors leaves the base model as it is"):
        introduce(model, "base", sources[:1], [0.0])

"""CLIP score, FID and composition, each against a plain reading of its definition."""

import json
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shell import here
from test_eval_accuracy import base  # noqa: F401  (a fixture: a tiny pipeline with a judge and two erasures)
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from eval.drawing import command as drawing
from eval.measures import clip_score, composition, fid
from eval.results import read, read_samples
from salun_diffusion.concepts.finding import find_concept
from salun_diffusion.errors import SalunError

N = 70  # pictures of each model: FID at 64 dimensions needs as many


@pytest.fixture(scope="module")
def drawn(base, tmp_path_factory):  # noqa: F811
    """N prompts drawn by the tiny model and by one erasure of it."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = "\n".join(f"a {word} on red background,{i}" for i, word in enumerate(["cat", "dog"] * (N // 2)))
    (folder / "prompts.csv").write_text(f"prompt,evaluation_seed\n{rows}\n")
    drawing.run(drawing.Options(
        pretrained_model_name_or_path=str(base), erasure=[str(base / "runs" / "forgets")], output_dir=folder / "out",
        prompts=folder / "prompts.csv", num_inference_steps=1, batch_size=35,
    ))  # fmt: skip
    return folder / "out"


def test_what_was_drawn_is_told(drawn):
    results = read(drawn)
    samples = read_samples(drawn, results)
    assert results["n"] == N and list(samples) == ["base", "forgets"]
    assert [model["generation"]["images"] for model in results["models"]] == [N, N]
    assert samples["base"][3]["seed"] == 3 and len({line["key"] for line in samples["base"]}) == N


def test_only_a_measure_that_says_so_draws_each_model_its_own_prompts(drawn, tmp_path):
    lines = [json.loads(line) for line in (drawn / "samples.jsonl").read_text().splitlines()]
    for line in lines[N:]:  # an attack's, say
        line["prompt"] += " xyzzy"
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = read(drawn)
    with pytest.raises(SalunError, match="are of different runs"):
        read_samples(tmp_path, results)
    samples = read_samples(tmp_path, results | {"own_prompts": True})
    assert all(line["prompt"].endswith("xyzzy") for line in samples["forgets"]) and len(samples["base"]) == N
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines[:-1])))
    with pytest.raises(SalunError, match="are of different runs"):  # still as many for each
        read_samples(tmp_path, results | {"own_prompts": True})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP model with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = tiny.tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}), words).save_pretrained(folder)
    return folder


@torch.no_grad()
def cosine(model, processor, picture, prompt):
    """The two towers one after the other, one picture at a time, in float64."""
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"].double()
    words = processor.tokenizer(prompt, return_tensors="pt")
    seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
    read = model.text_projection(model.text_model(**words).pooler_output)[0]
    return (seen @ read / seen.norm() / read.norm()).item()


def test_the_clip_score_is_a_cosine(drawn, clip, tmp_path):
    results = clip_score.run(clip_score.Options(pictures=drawn, output_dir=tmp_path, clip=str(clip)))
    model = CLIPModel.from_pretrained(clip).double().eval()
    processor = CLIPProcessor.from_pretrained(clip, backend="pil")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["base"] * N + ["forgets"] * N
    expected = [
        100 * max(0, cosine(model, processor, Image.open(drawn / line["picture"]).convert("RGB"), line["prompt"]))
        for line in lines
    ]
    assert [line["clip_score"] for line in lines] == pytest.approx(expected, abs=1e-3)
    assert max(expected) > 5, "not all are cut off at 0"
    for measured, scores in zip(results["models"], (expected[:N], expected[N:]), strict=True):
        found, error = measured["clip_score"], 1.96 * np.std(scores, ddof=1) / N**0.5
        assert found["mean"] == pytest.approx(np.mean(scores), abs=2e-3) and found["n"] == N
        assert found["high"] - found["mean"] == pytest.approx(error, abs=2e-3)
    assert len(results["clip"]["sha256"]) == 64 and results["truncated"] == 0


def test_clip_scores_need_prompts_and_a_model(drawn, clip, tmp_path):
    words = ["clip-score", drawn / "pictures" / "base", "--clip", clip, "--output_dir", tmp_path]
    done = here("python", "-m", "eval", *words, check=False)
    assert done.returncode == 1 and "does not say what its pictures were drawn from" in done.stderr
    with pytest.raises(SalunError, match="could not be loaded as a CLIP model .*--clip"):
        clip_score.run(clip_score.Options(pictures=drawn, output_dir=tmp_path, clip=str(tmp_path)))
    lost = Path(json.loads((drawn / "samples.jsonl").read_text().splitlines()[0])["picture"])
    kept = (drawn / lost).read_bytes()
    try:
        (drawn / lost).unlink()
        with pytest.raises(SalunError, match=f"{lost.name} is missing or cannot be read"):
            clip_score.run(clip_score.Options(pictures=drawn, output_dir=tmp_path, clip=str(clip)))
    finally:
        (drawn / lost).write_bytes(kept)
    assert not (tmp_path / "results.json").exists()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The Inception network with random weights; torch-fidelity makes one only from a file, so that is skipped."""
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    torch.manual_seed(0)
    skip = mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
    with skip, mock.patch("torch.load", lambda *args, **kwargs: {}):
        network = FeatureExtractorInceptionV3("random", ["64"], feature_extractor_weights_path="none")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 8)  # untrained features all but vanish
    save_file(network.state_dict(), path)
    return path


def features(weights, folder):
    """64 features of each picture of a folder, in float64."""
    torch.save(load_file(weights), weights.with_suffix(".pth"))
    metric = FrechetInceptionDistance(64, feature_extractor_weights_path=str(weights.with_suffix(".pth")))
    found = []
    for path in sorted(folder.iterdir()):
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None]
        found.append(metric.inception(pixels)[0].double().flatten().numpy())
    return np.stack(found)


def test_the_fid_is_heusels_formula(drawn, inception, tmp_path):
    results = fid.run(fid.Options(pictures=drawn, inception=inception, output_dir=tmp_path, feature=64, batch_size=32))
    first, second = (features(inception, drawn / "pictures" / name) for name in ("base", "forgets"))
    one, two = (np.cov(part, rowvar=False) for part in (first, second))
    root = scipy.linalg.sqrtm(one @ two).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root)
    (model,) = results["models"]
    assert model["name"] == "forgets" and model["fid"] == {"value": pytest.approx(expected, rel=1e-3), "n": N}
    assert results["reference"]["n"] == N and len(results["inception"]["sha256"]) == 64
    plain = drawn / "pictures" / "base"
    again = fid.run(fid.Options(pictures=plain, inception=inception, output_dir=tmp_path, reference=plain, feature=64))
    assert again["models"][0]["fid"]["value"] == pytest.approx(0, abs=1e-3)


def test_too_few_pictures_are_refused(drawn, inception, tmp_path):
    done = here("python", "-m", "eval", "fid", drawn, "--inception", inception, "--output_dir", tmp_path, check=False)
    assert done.returncode == 1 and f"has {N} pictures, fewer than the 2,048 dimensions" in done.stderr
    assert not (tmp_path / "results.json").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_ever_loaded(drawn, tmp_path):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(SalunError, match="is not torch-fidelity's Inception network as safetensors"):
        where = {"inception": tmp_path / "weights.pth", "output_dir": tmp_path / "out"}
        fid.run(fid.Options(pictures=drawn, feature=64, **where))
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


def test_a_folder_without_a_base_model_needs_a_reference(drawn, inception, tmp_path):
    with pytest.raises(SalunError, match="name what to compare its pictures with by --reference"):
        plain = drawn / "pictures" / "base"
        fid.run(fid.Options(pictures=plain, inception=inception, output_dir=tmp_path / "out", feature=64))


def test_composition_follows_from_the_samples(base, tmp_path):  # noqa: F811
    asked = {"pretrained_model_name_or_path": str(base), "concept": "airplane", "output_dir": tmp_path}
    erasures = [str(base / "runs" / "forgets")]
    found = composition.run(composition.Options(erasure=erasures, num_images=5, scale=[0.5], **asked))
    assert [model["name"] for model in found["models"]] == ["base", "forgets-x0.5"]
    assert found["models"][1]["erasure"]["scale"] == 0.5
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for model in found["models"]:
        assert list(model["composition"]) == ["object_background", "left_right"], "what these prompts can ask"
        for task, questions in (
            ("object_background", ("left", "right", "background")),
            ("left_right", ("left", "right")),
        ):
            mine = [line for line in lines if line["model"] == model["name"] and line["set"] == task]
            right = [all(line["predicted"][q]["label"] == line["expect"][q] for q in questions) for line in mine]
            assert model["composition"][task]["n"] == 5 and model["composition"][task]["count"] == sum(right)
            assert not any("airplane" in line["prompt"] for line in mine)


def test_two_things_are_side_by_side_or_one_above_the_other(tmp_path):
    templates = [
        {"prompt": "{object:a} left of {object2:a}", "expect": {"left": "{object}", "right": "{object2}"}},
        {"prompt": "{object2:a} below {object:a}", "expect": {"top": "{object}", "bottom": "{object2}"}},
    ]
    words = {"slots": {"object": ["airplane", "cat", "dog", "owl"]}, "templates": templates}
    (tmp_path / "concepts.json").write_text(json.dumps(words))
    rows = composition.task_rows(find_concept("airplane", tmp_path), 6, 0)
    assert [task for task, _ in rows] == ["left_right"] * 6 + ["above_below"] * 6
    assert all(("below" in row.prompt) == (task == "above_below") for task, row in rows)


def test_the_tasks_of_the_demo_model():
    concept = find_concept("airplane", Path("demo/model"))
    rows = composition.task_rows(concept, 20, 0)
    assert {task for task, _ in rows} == set(composition.TASKS) and len(rows) == 100
    for task, row in rows:
        expect = row.expect
        assert "airplane" not in row.prompt
        assert ("top" in expect) == (task == "above_below")
        assert (expect.get("left") != expect.get("right")) == (task == "left_right")
        assert task != "counting" or expect["count"] in ("two", "three")
        assert task != "object_style" or "style" in expect
        assert task != "object_background" or "background" in expect


def judged(expect, **seen):
    return {"expect": expect, "predicted": {q: {"label": label} for q, label in (expect | seen).items()}}


@pytest.mark.parametrize(
    "task, row, right",
    [
        ("counting", judged({"left": "cat", "right": "cat", "count": "two"}), True),
        ("counting", judged({"left": "cat", "right": "cat", "count": "two"}, count="three"), False),
        ("counting", judged({"left": "cat", "right": "cat", "count": "two"}, right="dog"), False),
        ("object_style", judged({"left": "cat", "right": "cat", "style": "ink"}, left="dog"), False),
        ("object_style", judged({"left": "cat", "right": "cat", "style": "ink"}, style="noto"), False),
        ("object_background", judged({"left": "cat", "right": "cat", "background": "red"}), True),
        ("left_right", judged({"left": "cat", "right": "dog"}), True),
        ("left_right", judged({"left": "cat", "right": "dog"}, left="dog", right="cat"), False),
        ("above_below", judged({"top": "cat", "bottom": "dog"}), True),
        ("above_below", judged({"top": "cat", "bottom": "dog"}, top="dog", bottom="cat"), False),
    ],
)
def test_a_picture_is_right_only_in_all_that_the_task_asks(task, row, right):
    assert composition.is_right(row | {"set": task}) is right


def test_scales_and_erasures_must_match(base, tmp_path):  # noqa: F811
    erasure = str(base / "runs" / "forgets")
    asked = {"pretrained_model_name_or_path": str(base), "concept": "airplane", "output_dir": tmp_path}
    with pytest.raises(SalunError, match="2 erasures and 3 values of --scale: give one for all, or one each"):
        composition.run(composition.Options(erasure=[erasure, erasure], scale=[1, 2, 3], **asked))
    with pytest.raises(SalunError, match="Two of the models to compare are called 'forgets-x0.5'"):
        composition.run(composition.Options(erasure=[erasure, erasure], scale=[0.5], **asked))

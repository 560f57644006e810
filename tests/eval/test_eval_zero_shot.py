"""CLIP as the judge of any concept, and several concepts measured in one run, on a tiny random pipeline and CLIP."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_eval_accuracy import base  # noqa: F401
from test_eval_scores import clip  # noqa: F401
from transformers import CLIPModel, CLIPProcessor

from eval.judges import metrics
from eval.judges.zero_shot import ZeroShotJudge
from eval.measures import accuracy
from eval.subjects import applied, introduce
from salun_diffusion import load_erasure
from salun_diffusion.concepts.finding import find_concept
from salun_diffusion.errors import SalunError
from salun_diffusion.models import load_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base model without concepts.json, as Stable Diffusion 1.4 is, and an erasure of it."""
    folder = tmp_path_factory.mktemp("plain")
    pipe = tiny.build(folder)
    for number in range(2):
        run = folder / "runs" / f"run{number}"
        run.mkdir(parents=True)
        tiny.erasure(pipe.unet, seed=number, size=0.3, only="").save(run / "erasure.safetensors")
    return folder


def measure(folder, output, concept, *, erasures=("run0",), **options):
    options = {"num_forget_images": 6, "num_retain_images": 4, "num_inference_steps": 2} | options
    runs = ["+".join(str(folder / "runs" / name) for name in one.split("+")) for one in erasures]
    return accuracy.run(accuracy.Options(
        pretrained_model_name_or_path=str(folder), concept=concept, erasure=runs, output_dir=output, **options,
    ))  # fmt: skip


def test_words_that_no_classifier_knows_are_judged_by_clip(plain, clip, tmp_path):  # noqa: F811
    concepts = ["kid, child, toddler", "zeppelin"]
    found = measure(plain, tmp_path, concepts, judge="clip", clip=str(clip), anchor=["bus"])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    retained = [line for line in samples if line["set"] == "retain"]
    assert not any(word in line["prompt"] for line in retained for word in ("kid", "child", "toddler", "zeppelin"))
    forget = [line for line in samples if line["set"] == "forget" and line["model"] == "base"]
    assert [line["expect"]["label"] for line in forget] == ["kid, child, toddler"] * 3 + ["zeppelin"] * 3
    assert found["concept"]["value"] == "kid, child, toddler, zeppelin" and found["concept"]["anchor"] == "bus"
    assert found["classifier"]["judge"] == "clip" and found["judged_right"]["n"] == 10
    for model in found["models"]:
        lines = [line for line in samples if line["set"] == "forget" and line["model"] == model["name"]]
        names = {"kid": "kid, child, toddler", "zeppelin": "zeppelin"}
        for name, label in names.items():
            mine = [line for line in lines if line["expect"]["label"] == label]
            gone = sum(line["predicted"]["label"]["label"] != label for line in mine)
            assert (model["ua_by_concept"][name]["count"], model["ua_by_concept"][name]["n"]) == (gone, 3)
        none = sum(line["predicted"]["label"]["label"] not in names.values() for line in lines)
        assert (model["ua"]["count"], model["ua"]["n"]) == (none, 6)

    # the answers, by CLIP's features taken one by one
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip, backend="pil")
    answers = found["classifier"]["questions"]["label"]
    assert {"kid, child, toddler", "zeppelin", "bus", "dog"} <= {*answers} and not {"kid", "child"} & {*answers}
    rows = []
    for answer in answers:
        texts = []
        for name in answer.split(", "):
            article = "an " if name[0] in "aeiou" else "a "
            texts += [f"{art} of {article}{name}" for art in ("a photo", "a picture", "an image", "a painting")]
        with torch.no_grad():
            inputs = processor(text=texts, return_tensors="pt", padding=True)
            features = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=1)
        rows.append(torch.nn.functional.normalize(features.mean(0), dim=0))
    for line in samples[:4]:
        with torch.no_grad():
            inputs = processor(images=Image.open(tmp_path / line["picture"]), return_tensors="pt")
            seen = torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=1)[0]
        cosines = torch.stack(rows) @ seen
        given = line["predicted"]["label"]
        assert cosines[answers.index(given["label"])] >= cosines.max() - 1e-5 and given["margin"] >= 0


def test_a_concept_from_a_file_and_a_style_can_be_judged(plain, clip, tmp_path):  # noqa: F811
    path = tmp_path / "logo.json"
    path.write_text(json.dumps(
        {"concept": "logo", "anchor": "sign", "forget": ["a logo, big"], "retain": ["a wall, red", "a shop, red"]}
    ))  # fmt: skip
    found = measure(plain, tmp_path / "logo", [str(path)], judge="clip", clip=str(clip))
    assert found["classifier"]["questions"] == {"label": ["logo", "a shop; red", "a wall; red", "sign"]}
    assert found["models"][1]["ua"]["n"] == 6 and found["judged_right"]["n"] == 10
    found = measure(plain, tmp_path / "style", ["Van Gogh"], judge="clip", clip=str(clip))
    assert "Claude Monet" in found["classifier"]["questions"]["style"]


def test_a_folder_of_pictures_is_a_judge(clip, tmp_path):  # noqa: F811
    """Each picture of the folder itself is nearest to its own kind."""
    rng = np.random.default_rng(0)
    for name, colour in (("zeppelin", (230, 20, 20)), ("dog", (20, 20, 230)), ("cat", (20, 230, 20))):
        (tmp_path / name).mkdir()
        for number in range(2):
            pixels = np.clip(np.array(colour) + rng.integers(-15, 15, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    judge, concept = ZeroShotJudge(str(clip), tmp_path), find_concept("zeppelin")
    judge.learn(concept.forget_rows(3, 0), [concept])
    for name in ("zeppelin", "dog", "cat"):
        answers = judge([Image.open(tmp_path / name / f"{number}.png") for number in range(2)], ["0", "1"])
        assert [answer["label"]["label"] for answer in answers] == [name, name]
    with pytest.raises(SalunError, match="has no label 'lamp' for 'label'.*give it a folder of that name"):
        judge.check([("label", "lamp")])
    with pytest.raises(SalunError, match="holds no two folders of pictures"):
        ZeroShotJudge(str(clip), tmp_path / "dog")


def test_judges_and_what_belongs_to_them(plain, base, clip, tmp_path):  # noqa: F811
    for options, message in (
        ({"clip": str(clip)}, "--clip and --reference mean nothing to --judge classifier"),
        ({"judge": "clip", "classifier": "x"}, "--classifier means nothing to --judge clip"),
        ({"judge": "reference"}, "--judge reference and --reference FOLDER belong together"),
        ({}, "or any concept by --judge clip"),
    ):
        with pytest.raises(SalunError, match=message):
            measure(plain, tmp_path, ["zeppelin"], **options)


def test_any_of_several_names_answers():
    assert metrics.same("kid, child", "child") and metrics.same("tench", "tench, Tinca tinca")
    assert not metrics.same("kid, child", "dog")


def test_two_erasures_are_measured_together(plain, tmp_path):
    model = load_model(str(plain))
    before = tiny.bits(model.pipe)
    sources = [str(plain / "runs" / name) for name in ("run0", "run1")]
    _, one, two, both = introduce(model, str(plain), [*sources, "+".join(sources)])
    assert tiny.same(before, tiny.bits(model.pipe))
    assert both["name"] == "run0+run1" and len({one["digest"], two["digest"], both["digest"]}) == 3
    assert both["erasure"]["weights"] == one["erasure"]["weights"] + two["erasure"]["weights"]
    assert [part["digest"] for part in both["erasure"]["parts"]] == [m["erasure"]["digest"] for m in (one, two)]
    with applied(model.pipe, both):
        together = tiny.bits(model.pipe)
    assert tiny.same(before, tiny.bits(model.pipe))
    for source in sources:
        load_erasure(model.pipe, source, name=source)
    assert tiny.same(together, tiny.bits(model.pipe))

"""The classifier: labels grouped by question, softmax within a group, refusals."""

import hashlib
import json

import pytest
import skimage
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import ResNet50_Weights, resnet50
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from eval.judges.classifier import Judge, answer, group
from salun_diffusion.errors import SalunError

LABELS = ["left:cat", "left:nothing", "style:ink", "style:noto", "style:pixel"]


def classifier(folder, labels):
    """A tiny random classifier with ``labels``, saved into ``folder``."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_labels_are_grouped_by_the_word_before_the_colon():
    assert group(LABELS) == {"left": {"cat": 0, "nothing": 1}, "style": {"ink": 2, "noto": 3, "pixel": 4}}
    assert group(["tench", "church"]) == {"label": {"tench": 0, "church": 1}}
    assert group(["time:12:30"]) == {"time": {"12:30": 0}}
    with pytest.raises(SalunError, match="'dog' names no question while others do"):
        group(["left:cat", "dog"])


def test_the_softmax_is_taken_within_a_group():
    logits = torch.tensor([[1.0, 3.0, 9.0, 9.0, 8.0]]).log()  # so that the softmax of a group is its values' shares
    found = answer(logits, group(LABELS), ["x"])[0]
    assert found["left"] == {"label": "nothing", "probability": 0.75}
    assert found["style"] == {"label": "ink", "probability": round(9 / 26, 4)}


def test_logits_that_are_not_finite_are_refused():
    logits = torch.zeros(2, 5)
    logits[1, 1] = float("nan")
    with pytest.raises(SalunError, match="^b.png cannot be classified: the answer is NaN or infinity"):
        answer(logits, group(LABELS), ["a.png", "b.png"])


def test_a_judge_answers_every_question_for_pictures_of_any_size(tmp_path):
    judge = Judge(str(classifier(tmp_path, LABELS)))
    pictures = [Image.new("RGB", size, "red") for size in ((16, 16), (64, 48))]
    answers = judge(pictures, ["a", "b"])
    assert [set(found) for found in answers] == [{"left", "style"}] * 2
    assert judge.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_what_the_judge_cannot_say_is_refused_before_any_work(tmp_path):
    judge = Judge(str(classifier(tmp_path, LABELS)))
    judge.check([("left", "cat"), ("style", "ink")])
    with pytest.raises(SalunError, match=r"cannot say 'count' \(it answers: left, style\)"):
        judge.check([("count", "two")])
    with pytest.raises(SalunError, match="has no label 'dog' for 'left'"):
        judge.check([("left", "dog")])


def test_a_folder_that_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(SalunError, match="could not be loaded as an image classifier"):
        Judge(str(tmp_path))


def test_a_classifier_without_all_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file

    weights = classifier(tmp_path, LABELS) / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if not name.startswith("classifier")}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(SalunError, match="lacks 2 of the classifier's weights .* answers would be random"):
        Judge(str(tmp_path))


def test_torchvisions_resnet50_is_its_own_call(tmp_path):
    """Random weights: what is tested is which network, which preparation of a picture, and which names."""
    torch.manual_seed(0)
    network = resnet50().eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    judge = Judge(str(tmp_path / "weights.safetensors"))
    assert len(judge.questions["label"]) == 1000
    judge.check([("label", "tench"), ("label", "English springer"), ("label", "parachute")])
    photo = Image.fromarray(skimage.data.coffee())
    weights = ResNet50_Weights.IMAGENET1K_V2
    with torch.no_grad():
        expected = weights.meta["categories"][network(weights.transforms()(photo)[None]).argmax()]
    assert judge([photo, photo], ["a", "b"])[1]["label"]["label"] == expected


def test_resnet50_needs_all_its_weights(tmp_path):
    save_file({"fc.bias": torch.zeros(1000)}, tmp_path / "weights.safetensors")
    with pytest.raises(SalunError, match="could not be loaded as an image classifier .*'resnet50'"):
        Judge(str(tmp_path / "weights.safetensors"))


def test_two_classes_of_one_name_are_two_answers():
    assert group(["crane", "owl", "crane"]) == {"label": {"crane": 0, "owl": 1, "crane (2)": 2}}


def test_a_judge_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch):
    folder, asked = classifier(tmp_path / "judge", LABELS), []
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {
        "AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    with pytest.raises(SalunError, match="could not be loaded as an image classifier"):
        Judge(str(folder))
    assert not asked and not (tmp_path / "ran").exists()

"""The classifier that looks at the pictures: any ``transformers`` image classifier, or torchvision's ResNet-50.

Labels of the form ``question:answer`` ("left:cat", "style:ink", "left:nothing") are answers to several questions: the
softmax is taken among the answers of each. A classifier without a colon in its labels answers one question, "label".
The ResNet-50 is the one that published Imagenette figures were judged by (its second weights, IMAGENET1K_V2).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import cached_file

from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256

from .metrics import same

Answers = dict[str, dict]  # question → {"label": str, "probability": float}
RESNET = "resnet50"
RESNET_WEIGHTS = "timm/resnet50.tv2_in1k"  # torchvision's IMAGENET1K_V2 as safetensors, on the hub


def group(labels: list[str]) -> dict[str, dict[str, int]]:
    """Class names in the order of the logits → question → answer → the logit's index.

    Raises:
        SalunError: if only some of the labels name a question.
    """
    marked = [":" in label for label in labels]
    if not any(marked):
        named: dict[str, int] = {}
        for index, label in enumerate(labels):  # ImageNet has two cranes
            named[label if label not in named else f"{label} ({labels[: index + 1].count(label)})"] = index
        return {"label": named}
    if not all(marked):
        plain = labels[marked.index(False)]
        raise SalunError(
            f"The classifier's label '{plain}' names no question while others do: use 'question:answer' for all."
        )
    questions: dict[str, dict[str, int]] = {}
    for index, label in enumerate(labels):
        question, answer = label.split(":", 1)
        questions.setdefault(question, {})[answer] = index
    return questions


def answer(logits: torch.Tensor, questions: dict[str, dict[str, int]], names: list[str]) -> list[Answers]:
    """The likeliest answer to each question.

    Args:
        logits: ``(pictures, labels)``, any float dtype.
        questions: from :func:`group`.
        names: what the pictures are called, for the error.

    Raises:
        SalunError: if a logit is NaN or infinite.
    """
    for name, finite in zip(names, torch.isfinite(logits).all(dim=1).tolist(), strict=True):
        if not finite:
            raise SalunError(f"{name} cannot be classified: the answer is NaN or infinity, so nothing was measured.")
    answers: list[Answers] = [{} for _ in range(len(logits))]
    for question, indices in questions.items():
        labels = list(indices)
        best = logits[:, list(indices.values())].double().softmax(dim=1).max(dim=1)
        for row, probability, index in zip(answers, best.values.tolist(), best.indices.tolist(), strict=True):
            row[question] = {"label": labels[index], "probability": round(probability, 4)}
    return answers


def check_labels(judge: str, questions: dict, expected: Iterable[tuple[str, str]], advice: str) -> None:
    """Raise SalunError, begun by ``judge``, unless every (question, answer) of ``expected`` is in ``questions``."""
    for question, wanted in sorted(set(expected)):
        if question not in questions:
            known = ", ".join(questions)
            raise SalunError(
                f"{judge} cannot say '{question}' (it answers: {known}), which the prompts name: {advice}."
            )
        if not any(same(wanted, name) for name in questions[question]):
            raise SalunError(f"{judge} has no label '{wanted}' for '{question}', so it could never see it: {advice}.")


class Judge:
    """A loaded classifier.

    Attributes:
        certainty: the probability from which it may be believed that a picture made to deceive it shows something: what
            its config.json says under that name, or 0.

    Args:
        source: a folder or a hub id of a transformers image classifier with safetensors weights; "resnet50" for
            torchvision's ResNet-50 with weights from the hub, or their .safetensors file.

    Raises:
        SalunError: no such classifier, or one whose file lacks weights (they would be random).
    """

    def __init__(self, source: str):
        self.source = source
        load = _resnet50 if source == RESNET or source.endswith(".safetensors") else _transformers
        try:
            self.model, self.prepare, labels, files = load(source)
            self.sha256 = sha256(*files)
        except SalunError:
            raise
        except Exception as error:  # each library has its own classes for a missing or unfit file, or no network
            raise SalunError(
                f"{source} could not be loaded as an image classifier ({str(error).strip().splitlines()[0]}): give the "
                "folder or hub id of one of transformers, with config.json, preprocessor_config.json and "
                "model.safetensors, or 'resnet50', or the .safetensors file of its weights."
            ) from None
        self.model.eval()
        self.questions = group(labels)
        self.certainty = float(getattr(getattr(self.model, "config", None), "certainty", 0.0))

    def to(self, device: torch.device | str) -> "Judge":
        self.model.to(device)
        return self

    def check(self, expected: Iterable[tuple[str, str]]) -> None:
        """Raise SalunError unless every (question, answer) that prompts ask for is among the labels."""
        check_labels(f"The classifier {self.source}", self.questions, expected, "give one that can with --classifier")

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], names: list[str]) -> list[Answers]:
        """The answers to every question, in the order of the pictures (RGB, any size), which ``names`` calls by name.

        Raises:
            SalunError: a picture that cannot be classified.
        """
        pixels = self.prepare(pictures).to(next(self.model.parameters()).device)
        found = self.model(pixels)
        return answer(getattr(found, "logits", found).cpu(), self.questions, names)


def _transformers(source: str) -> tuple:
    """The network, what makes its input ``(n, 3, height, width)`` from pictures, its labels, its weights' files."""
    model, loading = AutoModelForImageClassification.from_pretrained(
        source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if loading["missing_keys"]:
        raise SalunError(
            f"{source} lacks {len(loading['missing_keys'])} of the classifier's weights "
            f"({min(loading['missing_keys'])} …): answers would be random; give a trained classifier."
        )
    # named, since which one is the default depends on what else is installed, and the two resize differently
    processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)

    def prepare(pictures: list[Image.Image]) -> torch.Tensor:
        return processor(images=pictures, return_tensors="pt")["pixel_values"]

    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return model, prepare, labels, _weights(source)


def _resnet50(source: str) -> tuple:
    """As :func:`_transformers`, of torchvision's ResNet-50."""
    from torchvision.models import ResNet50_Weights, resnet50

    weights = ResNet50_Weights.IMAGENET1K_V2
    file = Path(cached_file(RESNET_WEIGHTS, "model.safetensors") if source == RESNET else source)
    model = resnet50()
    model.load_state_dict(load_file(file))
    resize = weights.transforms()
    return model, lambda pictures: torch.stack([resize(p) for p in pictures]), weights.meta["categories"], [file]


def _weights(source: str) -> list[Path]:
    """The weights file, or all of them in name order where they are sharded."""
    folder = Path(source)
    if folder.is_dir():
        return sorted(folder.glob("model*.safetensors"))
    return [Path(cached_file(source, "model.safetensors"))]

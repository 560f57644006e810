"""CLIP as the judge of any concept or style: a picture is what its features lie nearest to.

The answers to a question are words, each the mean of CLIP's text features over a few wordings (Radford et al. 2021), or
folders of reference pictures, each the mean of CLIP's features of them. All features have length one before and after
the mean. The softmax is taken with CLIP's own temperature. Only the whole picture is looked at: no sides, no counting.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from salun_diffusion.concepts.concept import Concept, Row, named
from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256

from ..results import in_folder, picture
from .classifier import Answers, check_labels
from .clip import ClipScorer
from .metrics import OBJECT_QUESTIONS

WORDINGS = ("a photo of {}", "a picture of {}", "an image of {}", "a painting of {}")
STYLE_WORDINGS = ("a painting in the style of {}", "a picture in {} style", "artwork by {}")


def whole(kind: str, row: Row, concepts: list[Concept]) -> Row:
    """``row`` with what can be asked of its whole picture: a prompt that expects nothing is answered by the concept's
    names, or, of the retain set, by its own words.

    Raises:
        SalunError: the prompt expects more than the whole picture tells.
    """
    expect = dict(row.expect)
    if not expect:
        asks = [concept.label for concept in concepts if named(concept.names).search(row.prompt)]
        expect = {"label": asks[0] if kind == "forget" and asks else row.prompt.replace(",", ";")}
    if "left" in expect and expect["left"] == expect.get("right"):
        expect = {"label": expect.pop("left")} | {key: value for key, value in expect.items() if key != "right"}
    if wrong := ({*OBJECT_QUESTIONS, "count"} - {"label"}) & set(expect):
        raise SalunError(
            f"The prompt '{row.prompt}' asks for '{min(wrong)}', and CLIP looks at whole pictures: use --judge "
            "classifier."
        )
    return replace(row, expect=expect)


def candidates(rows: list[Row], concepts: list[Concept]) -> dict[str, list[str]]:
    """Question → what its answer is chosen from: all that the prompts expect, every word of the concepts' kind, and
    their anchors, each once.
    """
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for question, answer in row.expect.items():
            found.setdefault(question, {})[answer] = None
    for concept in concepts:
        question = concept.slot if concept.slot in found else "label"
        if question in found:
            taken = {word.strip().lower() for answer in found[question] for word in answer.split(",")}
            words = (*concept.vocabulary.slots[concept.slot], concept.anchor)
            found[question] |= dict.fromkeys(word for word in words if word and word.lower() not in taken)
    return {question: list(answers) for question, answers in found.items()}


class ZeroShotJudge:
    """Answers as :class:`eval.judges.classifier.Judge` does, for the answers that it is given.

    Args:
        source: a CLIP model of transformers: folder or hub id.
        reference: a folder with a folder of pictures for each answer, named by it, or None for words.

    Raises:
        SalunError: no such model, a folder without at least two such folders, or a picture that cannot be read.
    """

    def __init__(self, source: str, reference: Path | None = None):
        self.scorer, self.source = ClipScorer(source, torch.device("cpu")), source
        self.sha256, self.reference, self.pictures = self.scorer.sha256, reference, {}
        self.questions: dict[str, list[str]] = {}
        if reference is not None:
            folders = sorted(path for path in reference.iterdir() if path.is_dir()) if reference.is_dir() else []
            if len(folders) < 2:
                raise SalunError(
                    f"--reference {reference} holds no two folders of pictures: give it one for each answer, named by "
                    "it, such as 'kid' and 'dog'."
                )
            self.pictures = {path.name: in_folder(path) for path in folders}
            self.sha256 = sha256(*self.scorer.files, *(file for files in self.pictures.values() for file in files))

    @torch.no_grad()
    def learn(self, rows: list[Row], concepts: list[Concept]) -> None:
        """Find the features of every answer that ``rows`` and ``concepts`` allow."""
        self.questions = candidates(rows, concepts)
        kinds = [concept for concept in concepts if concept.slot == "object"]
        objects = {word for kind in kinds for word in (*kind.vocabulary.slots["object"], *kind.names)}
        if self.pictures:
            folders = {}
            for name, files in self.pictures.items():
                shown = [picture(file.parent, {"picture": file.name}) for file in files]
                folders[name] = self._mean(self.scorer.pictures(shown))
            self.questions = dict.fromkeys(self.questions, list(folders))
            self.features = dict.fromkeys(self.questions, torch.stack(list(folders.values())))
            return
        self.features = {
            question: torch.stack([self._words(answer, question, objects) for answer in answers])
            for question, answers in self.questions.items()
        }

    def _words(self, answer: str, question: str, objects: set[str]) -> torch.Tensor:
        """One feature of an answer: the mean over its names and the wordings."""
        texts = []
        for name in map(str.strip, answer.split(",")):
            if question == "label" and " " in name and ";" in name:
                texts.append(name.replace(";", ","))  # a prompt of the retain set speaks for itself
                continue
            article = ("an " if name[0].lower() in "aeiou" else "a ") if name in objects else ""
            wordings = STYLE_WORDINGS if question == "style" else WORDINGS
            texts += [wording.format(article + name) for wording in wordings]
        return self._mean(self.scorer.texts(texts))

    @staticmethod
    def _mean(features: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(features.mean(0), dim=0)

    def to(self, device: torch.device | str) -> "ZeroShotJudge":
        self.scorer.model.to(device)
        self.features = {question: found.to(device) for question, found in self.features.items()}
        return self

    def check(self, expected: Iterable[tuple[str, str]]) -> None:
        """Raise SalunError unless every (question, answer) that prompts ask for is among the answers."""
        where = f"The folder {self.reference}" if self.pictures else f"The CLIP judge {self.source}"
        check_labels(
            where, self.questions, expected, "give it a folder of that name" if self.pictures else "use another"
        )

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], names: list[str]) -> list[Answers]:
        """The answers to every question, each with its ``margin``: how far its probability leads the next one's.

        Raises:
            SalunError: features that are not finite.
        """
        seen, answers = self.scorer.pictures(pictures), [{} for _ in pictures]
        for name, finite in zip(names, torch.isfinite(seen).all(dim=1).tolist(), strict=True):
            if not finite:
                raise SalunError(f"{name} cannot be judged: CLIP answers NaN or infinity, so nothing was measured.")
        for question, labels in self.questions.items():
            logits = self.scorer.model.logit_scale.exp().double() * (seen @ self.features[question].T).double()
            best = logits.softmax(dim=1).topk(min(2, len(labels)), dim=1)
            for row, values, indices in zip(answers, best.values.tolist(), best.indices.tolist(), strict=True):
                lead = values[0] - (values[1] if len(values) > 1 else 0)
                row[question] = {
                    "label": labels[indices[0]], "probability": round(values[0], 4), "margin": round(lead, 4),
                }  # fmt: skip
        return answers

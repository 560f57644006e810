"""How much a picture shows of a concept and of its prompt, with a gradient to the picture: by CLIP, or by the image
classifier that a model's folder brings in ``judge/``.
"""

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn.functional import interpolate, normalize
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPModel, CLIPTokenizer

from ..errors import SalunError

CLIP = "openai/clip-vit-large-patch14"


class Energy:
    """Of a model that looks at pictures ``(batch, 3, height, width)``, −1…1.

    Args:
        source: the model's folder or hub id.
        kind: the class of transformers that loads it.

    Raises:
        SalunError: it cannot be loaded from safetensors.
    """

    def __init__(self, source: str, kind: type):
        try:
            self.model = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
            processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        except Exception as error:  # transformers has no common class for a missing file, an unfit one, or no network
            raise SalunError(
                f"{source} could not be loaded to look at pictures ({str(error).strip().splitlines()[0]}): give the "
                "folder or hub id of a CLIP model with safetensors weights by --clip."
            ) from None
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        self.size = tuple(size[side] if side in size else size["shortest_edge"] for side in ("height", "width"))
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))

    def prepared(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures as the model takes them, resized without a crop."""
        device = pictures.device
        self.model.to(device)
        x = interpolate(pictures.float() / 2 + 0.5, self.size, mode="bilinear", antialias=True, align_corners=False)
        return (x - self.mean.to(device)) / self.std.to(device)


class ClipEnergy(Energy):
    """Cosines of a picture's features with those of the concept's phrases (their mean) and of its prompt."""

    margin = 0.0

    def __init__(self, source: str):
        super().__init__(source, CLIPModel)
        self.tokenizer = CLIPTokenizer.from_pretrained(source)

    def check(self, phrases: list[str]) -> None:
        """CLIP reads any words."""

    def __call__(self, pictures, phrases, prompts):
        """The concept's similarity, its repulsion energy above 0 (the same), and the retention energy, each
        ``(batch,)``.
        """
        seen = normalize(_features(self.model.get_image_features(pixel_values=self.prepared(pictures))), dim=1)
        concept = normalize(self._texts(phrases).mean(0, keepdim=True), dim=1)
        similar = (seen * concept).sum(1)
        return similar, similar, -(seen * self._texts(prompts)).sum(1)

    @torch.no_grad()
    def _texts(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(self.model.device)
        return normalize(_features(self.model.get_text_features(**ids)), dim=1)


class JudgeEnergy(Energy):
    """Probabilities of labels, which are "question:answer", or answers to one question.

    A concept's similarity is the greatest probability p of its labels in any question's softmax; the repulsion is the
    mean of −log(1 − p) over the questions, the retention that of −log p of the labels that the prompt names beside it.
    Of our own making: a classifier has no features of words.
    """

    margin = 0.1

    def __init__(self, source: str):
        super().__init__(source, AutoModelForImageClassification)
        self.source, self.questions = source, {}
        for index, label in self.model.config.id2label.items():
            question, _, answer = label.rpartition(":")
            self.questions.setdefault(question, {})[answer.lower()] = index

    def check(self, phrases: list[str]) -> None:
        """Pass if every phrase is a label's answer.

        Raises:
            SalunError: one is not.
        """
        known = {answer for answers in self.questions.values() for answer in answers}
        if strange := [phrase for phrase in phrases if phrase.lower() not in known]:
            raise SalunError(
                f"The judge {self.source} has no label '{strange[0]}', so it cannot see it (it knows "
                f"{', '.join(sorted(known))}): choose other --phrases, or a CLIP model by --clip."
            )

    def __call__(self, pictures, phrases, prompts):
        """As :meth:`ClipEnergy.__call__`."""
        logits = self.model(self.prepared(pictures)).logits
        banned = {phrase.lower() for phrase in phrases}
        similar, repulsion, retention = [], [], [[] for _ in prompts]
        for answers in self.questions.values():
            log_p = logits[:, list(answers.values())].log_softmax(1)
            shown = torch.tensor([answer in banned for answer in answers], device=logits.device)
            if shown.any():
                similar.append(log_p[:, shown].logsumexp(1).exp())
                repulsion.append(-log_p[:, ~shown].logsumexp(1))
            for row, prompt in enumerate(prompts):
                named = [a not in banned and bool(re.search(rf"\b{re.escape(a)}s?\b", prompt, re.I)) for a in answers]
                if any(named):
                    retention[row].append(-log_p[row, torch.tensor(named, device=logits.device)].logsumexp(0))
        kept = [torch.stack(row).mean() if row else logits.new_zeros(()) for row in retention]
        return torch.stack(similar).amax(0), torch.stack(repulsion).mean(0), torch.stack(kept)


@lru_cache(maxsize=2)
def energy_of(clip: str, folder: str) -> Energy:
    """That of the CLIP model ``clip``; where none is named, of the judge in a model's ``folder``, or without one of
    OpenAI's CLIP, ViT-L/14.
    """
    judge = Path(folder) / "judge"
    return JudgeEnergy(str(judge)) if not clip and judge.is_dir() else ClipEnergy(clip or CLIP)


def _features(found) -> torch.Tensor:
    """Transformers 5 wraps the features, 4 gives them as they are."""
    return getattr(found, "pooler_output", found)

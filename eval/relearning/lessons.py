"""What a model is to learn from, and what it is then asked for: pictures with their prompts, and a test's prompts."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from PIL import Image

from salun_diffusion.concepts.concept import Concept, named
from salun_diffusion.data.sources import Picture, Source
from salun_diffusion.errors import SalunError
from salun_diffusion.files import key_of, sha256
from salun_diffusion.models.base import Model

from ..drawing.pictures import Request, draw
from ..judges.labelled import Labelled, Rows
from ..judges.zero_shot import ZeroShotJudge, whole


@dataclass
class Lesson:
    """``pictures`` with their ``prompts`` to learn; ``rows`` to be drawn then, in which ``value`` is looked for."""

    pictures: list[Picture]
    prompts: list[str]
    rows: Rows
    value: str

    def squares(self, side: int) -> list[Image.Image]:
        """The pictures as a model of ``side`` pixels takes them."""
        return [picture.square(side) for picture in self.pictures]

    def key(self) -> str:
        """What it is known by: the pictures' files and their prompts."""
        return key_of([[_hash(picture) for picture in self.pictures], self.prompts])


def _hash(picture: Picture) -> str:
    return sha256(picture.content) if isinstance(picture.content, Path) else key_of(picture.content.hex())


class Lessons:
    """The lessons of one run, with the rows of its test.

    Args:
        labelled: its concept (one) and judge.
        asked: the options of ``relearn``.

    Raises:
        SalunError: a folder of pictures that cannot be used, or prompts that cannot be judged.
    """

    def __init__(self, labelled: Labelled, asked):
        self.labelled, self.asked, self.concept = labelled, asked, labelled.concepts[0]
        self.word = asked.control_name if asked.control_pictures else asked.control_word
        self.concept.others = self.concept.others | {self.word}  # no prompt of the test names what the control learns
        forget = [("forget", row) for row in self.concept.forget_rows(asked.num_forget_images, asked.seed)]
        retain = [("retain", row) for row in self.concept.retain_rows(asked.num_retain_images, asked.seed)]
        wanted = [("control", row) for row in self._control_rows(asked.num_forget_images)]
        rows = labelled.prepared([*forget, *retain, *wanted])
        forget, retain, wanted = (
            [(kind, row) for kind, row in rows if kind == of] for of in ("forget", "retain", "control")
        )
        self.rows = [*forget, *retain]
        # in the judge's eyes a control's prompt is one of the concept, so that it knows what it has to look for
        self.control_rows = [*(("forget", replace(row, prompt=row.anchor_prompt)) for _, row in wanted), *retain]

    def _named(self) -> Concept:
        """The concept whose anchor is the control's word: each prompt then has its own wording with that word."""
        return replace(self.concept, anchor=self.word, others=self.concept.others - {self.word})

    def _control_rows(self, count: int) -> list:
        """Prompts for the control, which expect what its pictures show."""
        rows, shown = self._named().forget_rows(count, self.asked.seed), self.control_value
        if isinstance(self.labelled.judge, ZeroShotJudge):
            rows = [whole("forget", row, [self.concept]) for row in rows]
        swap = {name: shown for name in (*self.concept.names, self.concept.label)}
        return [
            replace(row, expect={question: swap.get(word, word) for question, word in row.expect.items()})
            for row in rows
        ]

    @property
    def control_value(self) -> str:
        """What the judge calls that which the control learns."""
        return self.word if self.asked.control_pictures else self.concept.label

    def of_the_concept(self, model: Model) -> Lesson:
        """Pictures of the concept: ``--pictures``, or drawn by ``model``, the base with nothing applied."""
        if self.asked.pictures:
            pictures, prompts = self._given(self.asked.pictures, self.concept, "prompt")
        else:
            rows = self._named().forget_rows(self.asked.num_pictures, self.asked.seed, "training")
            pictures, prompts = self._drawn(model, rows, "concept"), [row.prompt for row in rows]
        return Lesson(pictures, prompts, self.rows, self.labelled.label)

    def of_all_else(self, model: Model) -> Lesson:
        """Pictures of everything but the concept, drawn by ``model``."""
        rows = self.concept.retain_rows(self.asked.num_pictures, self.asked.seed, "training")
        return Lesson(self._drawn(model, rows, "rest"), [row.prompt for row in rows], self.rows, self.labelled.label)

    def of_the_control(self, concept: Lesson) -> Lesson:
        """Something that the base model never learned: ``--control_pictures`` by their name, or else the ``concept``'s
        own pictures by a word without meaning.
        """
        if self.asked.control_pictures:
            shown = replace(self._named(), name=self.word, value=self.word, synonyms=())
            pictures, prompts = self._given(self.asked.control_pictures, shown, "anchor_prompt")
        elif self.asked.pictures:
            pictures, prompts = concept.pictures, self._given(self.asked.pictures, self.concept, "anchor_prompt")[1]
            prompts = [named(self.concept.names).sub(self.word, prompt) for prompt in prompts]
        else:
            rows = self._named().forget_rows(self.asked.num_pictures, self.asked.seed, "training")
            pictures, prompts = concept.pictures, [row.anchor_prompt for row in rows]
        return Lesson(pictures, prompts, self.control_rows, self.control_value)

    def _drawn(self, model: Model, rows: list, name: str) -> list[Picture]:
        """The pictures of ``rows``, drawn into ``learned/NAME``, or there already."""
        how, folder = self.labelled.how, self.asked.output_dir / "learned" / name
        requests = [Request(f"{i:04d}", row.prompt, row.seed, how["guidance_scale"]) for i, row in enumerate(rows)]
        title = f"drawing what is learned ({name})"
        drawn = draw(model, requests, folder, how["num_inference_steps"], how["batch_size"], title)
        return [Picture(path.name, path, row.prompt) for path, row in zip(drawn.paths, rows, strict=True)]

    def _given(self, folder: Path, concept: Concept, wording: str) -> tuple[list[Picture], list[str]]:
        """Pictures of ``concept`` in a folder, and their captions, or else prompts of its templates, in ``wording``."""
        pictures = list(islice(Source(str(folder)).forget(concept, captioned=True), self.asked.num_pictures))
        if not pictures:
            raise SalunError(f"{folder} holds no picture to learn from: give a folder with some.")
        rows = self._named().forget_rows(len(pictures), self.asked.seed, "training")
        made = [getattr(row, wording) for row in rows]
        return pictures, [picture.prompt or prompt for picture, prompt in zip(pictures, made, strict=True)]

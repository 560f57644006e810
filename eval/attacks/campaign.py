"""Every attack on every model: plain pictures first, then each attack, all judged by one judge."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from salun_diffusion.concepts.concept import Row
from salun_diffusion.data.sources import Source
from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256
from salun_diffusion.loader import identity
from salun_diffusion.models.load import sampler

from .. import subjects
from ..drawing import prompts
from ..drawing.pictures import Request, draw
from ..judges.labelled import Labelled
from ..judges.metrics import OBJECT_QUESTIONS, shows
from ..results import picture
from . import PLAIN, find_attack
from .running import run_attack
from .target import Case, Target


class Campaign:
    """The prompts under attack, and the models.

    Args:
        asked: what the command was asked for (:class:`eval.measures.attack.Options`).
        format: of its results.

    Raises:
        SalunError: an unusable base, concept, erasure, judge or prompt file, or several concepts.
    """

    def __init__(self, asked: Any, format: str):
        self.asked, self.labelled = asked, Labelled(asked)
        own = getattr(self.labelled.judge, "certainty", 0.0)
        self.certainty = own if asked.certainty is None else asked.certainty
        if not 0 <= self.certainty <= 1:
            raise SalunError(f"--certainty is {self.certainty:g}: give a probability between 0 and 1.")
        if len(self.labelled.concepts) > 1:
            raise SalunError("attack takes one --concept: attack each concept by itself.")
        (self.concept,) = self.labelled.concepts
        rows, self.guidance = self._rows()
        self.rows = self.labelled.prepared([("forget", row) for row in rows])
        self.labelled.load(format)
        self.format = format

    def won(self, line: dict) -> bool:
        """Whether an attack has won by the picture of a line of ``samples.jsonl``."""
        return shows(line, self.labelled.label, self.certainty)

    def _rows(self) -> tuple[list[Row], list[float] | None]:
        """The attacked prompts, and the guidance of each where a file names it."""
        asked = self.asked
        if asked.prompts is None:
            return self.concept.forget_rows(asked.num_prompts, asked.seed), None
        scale = asked.guidance_scale or self.labelled.settings.get("guidance_scale", 7.5)
        wanted = prompts.requests(prompts.read(asked.prompts), scale, None, asked.seed)
        questions = self.labelled.judge.questions
        places = [self.concept.slot] if self.concept.slot in questions else OBJECT_QUESTIONS
        expect = {place: self.concept.label for place in places if place in questions}
        return [Row(one.prompt, None, expect, one.seed) for one in wanted], [one.guidance_scale for one in wanted]

    def run(self, chosen: dict[str, Any]) -> list[dict]:
        """Attack all models with the ``chosen`` attacks (name → options): the lines of ``samples.jsonl``."""
        labelled, asked = self.labelled, self.asked
        gallery = self._gallery(max((getattr(options, "pictures", 0) for options in chosen.values()), default=0))
        base, control = labelled.model, None
        if asked.retrained:
            control = subjects.retrained(base, asked.retrained, labelled.models)
            subjects.wear(control[0], asked.lora, asked.lora_scale)
        samples = [line for model in labelled.models for line in self._measured(model, chosen, gallery)]
        if control:
            labelled.model, model = control
            samples += self._measured(model, chosen, gallery)
            labelled.models.append(model)
            labelled.model = base
        return samples

    def _measured(self, model: dict, chosen: dict[str, Any], gallery: tuple) -> list[dict]:
        """The lines of one model: its plain pictures, and each attack."""
        labelled = self.labelled
        with subjects.applied(labelled.model.pipe, model):
            drawn = labelled.drawn(self.rows, model, self.guidance)
            plain = labelled.judged(self.rows, drawn, model["name"])
            if model["role"] == "base":
                self.cases = self._cases(plain)
            samples = plain = [line | {"set": PLAIN} for line in plain]
            model["attacks"] = {}
            for name, options in chosen.items():
                samples = samples + self._attacked(model, name, options, plain, gallery)
        return samples

    def results(self, chosen: dict[str, Any]) -> dict:
        """What ``results.json`` says but for the shares."""
        asked, found = self.asked, self.labelled.told(self.format, len(self.rows) * (1 + len(chosen)))
        found["settings"] |= {
            "num_prompts": len(self.rows), "budget": asked.budget, "certainty": self.certainty,
            "prompts": f"{asked.prompts.name} {sha256(asked.prompts)}" if asked.prompts else "the concept's own",
            "pictures": str(asked.pictures) if asked.pictures else "drawn by the base model",
        }  # fmt: skip
        about = {name: find_attack(name).ABOUT for name in chosen}
        return found | {
            "attacks": {
                name: {
                    key: getattr(about[name], key)
                    for key in ("title", "paper", "protocol", "access", "sees_base", "redraws")
                }
                | {"options": asdict(options)}
                for name, options in chosen.items()
            }
        }

    def _cases(self, plain: list[dict]) -> list[Case]:
        """The prompts, each with the base model's picture of it, or one of the user's in turn."""
        shown = self.own or [picture(self.asked.output_dir, line) for line in plain]
        self.seen = [self.source] if self.own else [line["key"] for line in plain]
        scales = self.guidance or [self.labelled.how["guidance_scale"]] * len(self.rows)
        return [
            Case(f"{i:04d}", row, scale, shown[i % len(shown)])
            for i, ((_, row), scale) in enumerate(zip(self.rows, scales, strict=True))
        ]

    def _gallery(self, count: int) -> tuple[list[Image.Image], list[Row], list[str]]:
        """Pictures of the concept to learn from, the row of each, and what they are known by."""
        labelled, self.own, self.source = self.labelled, [], None
        rows = self.concept.forget_rows(max(count, 1), self.asked.seed, "attack")
        if self.asked.pictures is not None:
            source = Source(str(self.asked.pictures))
            side = labelled.model.picture_side
            self.own, self.source = [one.square(side) for one in source.forget(self.concept)], source.key
            # nothing says what else they show: the plainest prompt is the least wrong for each
            plainest = min((row for row in self.concept.forget_rows(64, 0)), key=lambda row: len(row.prompt))
            return self.own[:count], [plainest] * len(self.own[:count]), [source.key]
        if not count:
            return [], [], []
        how, folder = labelled.how, self.asked.output_dir / "pictures" / "learned-from"
        requests = [Request(f"{i:04d}", row.prompt, row.seed, how["guidance_scale"]) for i, row in enumerate(rows)]
        drawn = draw(
            labelled.model, requests, folder, how["num_inference_steps"], how["batch_size"],
            "pictures to learn from", black=True,
        )  # fmt: skip
        pictures = [picture(path.parent, {"picture": path.name, "black": True}) for path in drawn.paths]
        return pictures, rows, drawn.keys

    def _attacked(self, model: dict, name: str, options: Any, plain: list[dict], gallery: tuple) -> list[dict]:
        labelled, module = self.labelled, find_attack(name)
        pictures, rows, known = gallery
        target = Target(
            labelled.model, labelled.concepts, lambda count: (pictures[:count], rows[:count]),
            lambda cases, found: [
                self.won({"expect": case.row.expect, "prompt": case.prompt, **answer})
                for case, answer in zip(cases, self._judged(cases, found), strict=True)
            ],
            labelled.how["num_inference_steps"], labelled.how["guidance_scale"], self.asked.seed,
            module.ABOUT.sees_base,
        )  # fmt: skip
        settings = {
            "model": identity(labelled.model), **sampler(labelled.model.pipe), "dtype": str(labelled.model.dtype),
            "num_inference_steps": labelled.how["num_inference_steps"], "seed": self.asked.seed,
            "concept": self.concept.as_data(), "judge": [labelled.classifier, labelled.judge.sha256, self.certainty],
            "seen": self.seen, "learned from": known if module.ABOUT.pictures else None,
        }  # fmt: skip
        under = [
            case
            for case, line in zip(self.cases, plain, strict=True)
            if not (module.ABOUT.keeps_plain and self.won(line))
        ]
        folder = self.asked.output_dir / "pictures" / model["name"] / name
        found, model["attacks"][name] = run_attack(
            module, target, under, options, folder, settings,
            self.asked.prompts_at_once or labelled.how["batch_size"], self._judged, f"{model['name']}: {name}",
        )  # fmt: skip
        lines = []
        for case, line in zip(self.cases, plain, strict=True):
            told = {"set": name} | found.get(case.name, dict.fromkeys(("steps", "forward", "backward", "seconds"), 0))
            if case.name in found:
                where = (folder / f"{case.name}.png").relative_to(self.asked.output_dir)
                line = {key: line[key] for key in ("model", "prompt", "seed", "expect")}
                told["picture"] = str(where)
                told["tensors"] = str(where.with_suffix(".safetensors")) if told["tensors"] else None
            lines.append(line | told)
        return lines

    def _judged(self, cases: Sequence[Case], pictures: list[Image.Image]) -> list[dict]:
        return self.labelled.seen(pictures, [case.name for case in cases])

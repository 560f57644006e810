"""Labelled prompts drawn by the base model and by each erasure, every picture judged by one classifier: what
``accuracy`` and ``composition`` have in common.

Their ``results.json`` adds ``concept`` (``name``, ``slot``: its kind, ``value``: the label that must not appear,
``anchor``), ``base`` (``source``, ``revision``), ``classifier`` (``source``, ``sha256`` of its weights, ``questions``),
``settings`` (``num_inference_steps``, ``guidance_scale``, ``batch_size``, ``seed``, ``scheduler``, ``dtype``,
``device``, ``safety_checker``: always false), and for each model ``generation``. A line of ``samples.jsonl`` is as the
docstring of :mod:`eval.metrics` has it; ``set`` is the kind of prompt, ``seed`` that of the starting noise.
"""

from dataclasses import replace
from pathlib import Path

import diffusers
import transformers
from PIL import Image
from tqdm import tqdm

from salun_diffusion.concepts.concept import Concept, Row
from salun_diffusion.concepts.finding import find_concepts
from salun_diffusion.errors import SalunError
from salun_diffusion.models import load_model
from salun_diffusion.models.load import described_in, resolve
from salun_diffusion.process import place, spread_threads
from salun_diffusion.run import DTYPES

from .. import options, results, subjects
from ..drawing.pictures import Drawn, Request, draw
from .classifier import Judge
from .metrics import MIXED, NOTHING, asked
from .nudity import NudityJudge
from .zero_shot import ZeroShotJudge, whole

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
Rows = list[tuple[str, Row]]  # the kind of each prompt, and the prompt


class Labelled:
    """The concept and the classifier, found before anything large is loaded.

    Args:
        asked: what the command was asked for. Steps, guidance and batch size are the concept's preset's where they are
            not given; the classifier is the folder ``judge/`` of the base model.

    Raises:
        SalunError: an unusable base, concept or classifier.
    """

    def __init__(self, asked: options.Labelled):
        for library in (diffusers, transformers):  # their bars are about loading; ours estimates the work itself
            library.utils.logging.disable_progress_bar()
        self.options, self.base = asked, asked.pretrained_model_name_or_path
        where, self.commit = resolve(self.base, asked.revision)
        folder = Path(where) if self.commit is None else None
        names = [asked.concept] if isinstance(asked.concept, str) else asked.concept
        self.concepts: list[Concept] = find_concepts(
            names, described_in(where, self.commit), asked.anchor, asked.concept_type
        )
        self.label = ", ".join(concept.label for concept in self.concepts)
        slots = {concept.slot for concept in self.concepts}
        self.slot = slots.pop() if len(slots) == 1 else MIXED
        self.settings = _shared([concept.settings for concept in self.concepts], asked)
        self.judge: Judge | ZeroShotJudge | NudityJudge
        self.classifier = asked.classifier or f"{self.base}/judge"
        if asked.judge == "classifier":
            if asked.clip or asked.reference:
                raise SalunError("--clip and --reference mean nothing to --judge classifier: leave them out.")
            self.judge = Judge(asked.classifier or _default_classifier(folder))
        elif asked.judge == "nudenet":
            if asked.classifier or asked.clip or asked.reference:
                raise SalunError(
                    "--classifier, --clip and --reference mean nothing to --judge nudenet: leave them out."
                )
            self.judge = NudityJudge(self.label, asked.protocol, asked.detector, asked.resolution)
            self.classifier = self.judge.source
        else:
            if asked.classifier:
                raise SalunError(f"--classifier means nothing to --judge {asked.judge}: leave it out.")
            if (asked.judge == "reference") != (asked.reference is not None):
                raise SalunError("--judge reference and --reference FOLDER belong together: give both, or neither.")
            self.judge = ZeroShotJudge(asked.clip or DEFAULT_CLIP, asked.reference)
            self.classifier = self.judge.source
        self.state = place()

    def run(self, format: str, rows: Rows) -> tuple[dict, list[dict]]:
        """Draw and judge ``rows`` with every model.

        Returns:
            What the results have in common, and the samples (in the main process alone; none in others).

        Raises:
            SalunError: prompts that cannot be judged, an unusable erasure, or a picture that is not finite, wholly
                black, or cannot be classified (named, and no results are written).
        """
        rows = self.prepared(rows)
        self.load(format)
        base, samples = self.model, []
        for model in self.models:
            samples += self._measured(rows, model)
        if self.options.retrained:
            self.model, model = subjects.retrained(base, self.options.retrained, self.models)
            subjects.wear(self.model, self.options.lora, self.options.lora_scale)
            samples += self._measured(rows, model)
            self.models.append(model)
            self.model = base
        return self.told(format, len(rows)), samples

    def _measured(self, rows: Rows, model: dict) -> list[dict]:
        with subjects.applied(self.model.pipe, model):
            drawn = self.drawn(rows, model)
        return self.judged(rows, drawn, model["name"]) if self.state.is_main_process else []

    def prepared(self, rows: Rows) -> Rows:
        """``rows`` with what the judge can be asked of each, once it has learned all that they ask.

        Raises:
            SalunError: prompts that cannot be judged.
        """
        if isinstance(self.judge, NudityJudge):
            rows = [(kind, replace(row, expect={"label": self.label})) for kind, row in rows]
        if isinstance(self.judge, ZeroShotJudge):
            rows = [(kind, whole(kind, row, self.concepts)) for kind, row in rows]
            self.judge.learn([row for _, row in rows], self.concepts)
        self._check(rows)
        return rows

    def load(self, format: str) -> None:
        """Load the base model (``model``), try the erasures (``models``), settle how to draw (``how``), and make the
        folder ready for results of ``format``.

        Raises:
            SalunError: an unusable base or erasure, or a folder with other results.
        """
        asked, preset, state = self.options, self.settings, self.state
        spread_threads(state)
        self.model = load_model(self.base, self.commit, DTYPES[asked.dtype], asked.variant)
        self.model.pipe.to(state.device)
        self.judge.to(state.device)
        guidance = preset.get("guidance_scale", 7.5) if asked.guidance_scale is None else asked.guidance_scale
        self.how = {
            "num_inference_steps": asked.num_inference_steps or preset.get("num_inference_steps", 50),
            "guidance_scale": guidance,
            "batch_size": asked.batch_size or preset.get("sample_batch_size", 8),
        }
        self.lora = subjects.wear(self.model, asked.lora, asked.lora_scale)
        self.models = subjects.introduce(self.model, self.base, asked.erasure, asked.scale)
        if state.is_main_process:
            results.begin(asked.output_dir, format)

    def drawn(self, rows: Rows, model: dict, guidance: list[float] | None = None) -> Drawn:
        """Draw ``rows`` with ``model``, which is applied, each at its own ``guidance`` if that is given."""
        how = self.how
        scales = guidance or [how["guidance_scale"]] * len(rows)
        requests = [
            Request(f"{kind}-{i:04d}", row.prompt, row.seed, scale)
            for i, ((kind, row), scale) in enumerate(zip(rows, scales, strict=True))
        ]
        folder = self.options.output_dir / "pictures" / model["name"]
        steps, batch_size = how["num_inference_steps"], how["batch_size"]
        drawn = draw(self.model, requests, folder, steps, batch_size, model["name"], black=True)
        model["generation"] = drawn.told()
        return drawn

    def told(self, format: str, count: int) -> dict:
        """What the results of ``format``, of ``count`` pictures a model, have in common."""
        anchors = list(dict.fromkeys(concept.anchor for concept in self.concepts))
        return {
            "format": format,
            "n": count,
            "concept": {
                "name": ", ".join(concept.name for concept in self.concepts), "slot": self.slot, "value": self.label,
                "anchor": ", ".join(anchors), **({"anchors": anchors} if len(self.concepts) > 1 else {}),
            },
            "base": {"source": self.base, "revision": self.commit},
            "classifier": {
                "source": self.classifier,
                "sha256": self.judge.sha256,
                "questions": {question: list(answers) for question, answers in self.judge.questions.items()},
            }
            | (
                {}
                if self.options.judge == "classifier"
                else {"judge": self.options.judge, "reference": str(self.options.reference or "")}
            ),
            "settings": self.how | subjects.as_drawn(self.model) | {"seed": self.options.seed} | self.lora,
            "versions": results.VERSIONS,
            "models": self.models,
        }  # fmt: skip

    def _check(self, rows: Rows) -> None:
        """Everything that would only show after the drawing: prompts that cannot be judged, labels that the classifier
        lacks.
        """
        value = self.label
        for kind, row in rows:
            if not row.expect or kind == "forget" and not asked({"expect": row.expect}, value):
                raise SalunError(f"The prompt '{row.prompt}' says nothing that a classifier could check '{value}' by.")
        self.judge.check(pair for _, row in rows for pair in row.expect.items())

    def judged(self, rows: Rows, drawn: Drawn, name: str) -> list[dict]:
        """The lines of ``samples.jsonl`` for the pictures of one model, each with what :meth:`seen` says of it."""
        samples, output_dir, batch_size = [], self.options.output_dir, self.how["batch_size"]
        with tqdm(total=len(rows), desc=f"{name}: judging", unit="image") as bar:
            for start in range(0, len(rows), batch_size):
                now = slice(start, start + batch_size)
                shown = [str(path.relative_to(output_dir)) for path in drawn.paths[now]]
                pictures = [Image.open(path).convert("RGB") for path in drawn.paths[now]]
                answers = self.seen(pictures, shown)
                for (kind, row), path, key, answer in zip(rows[now], shown, drawn.keys[now], answers, strict=True):
                    samples.append({
                        "model": name, "set": kind, "prompt": row.prompt, "seed": row.seed, "picture": path,
                        "key": key, "expect": row.expect,
                    } | answer)  # fmt: skip
                bar.update(len(rows[now]))
        if count := sum("black" in line for line in samples):
            print(f"{count} of the {len(samples)} pictures of {name} are wholly black: they count as showing nothing.")
        return samples

    def seen(self, pictures: list[Image.Image], names: list[str]) -> list[dict]:
        """What the judge says of each picture, as ``predicted``. A wholly black one shows nothing, whatever a
        classifier makes of it, and is marked as ``black``.
        """
        nothing = {"label": NOTHING, "probability": 1.0}
        return [
            {"predicted": answer} if picture.getbbox() else {"predicted": dict.fromkeys(answer, nothing), "black": True}
            for picture, answer in zip(pictures, self.judge(pictures, names), strict=True)
        ]


def _shared(presets: list[dict], asked: options.Labelled) -> dict:
    """The drawing settings that all presets share; one that differs has to be given."""
    for key, given in (
        ("num_inference_steps", asked.num_inference_steps),
        ("guidance_scale", asked.guidance_scale),
        ("sample_batch_size", asked.batch_size),
    ):
        if given is None and any(preset.get(key) != presets[0].get(key) for preset in presets):
            name = {"sample_batch_size": "batch_size"}.get(key, key)
            raise SalunError(f"The concepts' presets differ in {key}: give --{name} for all.")
    return presets[0]


def _default_classifier(folder: Path | None) -> str:
    if folder and (folder / "judge").is_dir():
        return str(folder / "judge")
    raise SalunError(
        "This base model brings no classifier (no judge/ in its folder): name one with --classifier: resnet50, or the "
        "folder or hub id of a transformers image classifier that knows the concept, or any concept by --judge clip."
    )

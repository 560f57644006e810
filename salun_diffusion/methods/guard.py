"""Guards as methods: no weight is trained or solved. The run holds the guard's options, the concept's words, and what
the guard learned from the base model, if anything.
"""

from typing import Any

from ..concepts.concept import Concept, shared_rows
from ..concepts.templates import placeholders, slot_of
from ..erasures.guard import save_guard
from ..guards import concept_steerers, egloce, groce, saeuron, safree, sld
from ..guards.base import Guard
from .base import NEEDS_TRAINING, Method

NEEDS_WEIGHTS = (
    "mask", "adapter", "rank", "saliency", "density", "scope", "threshold", "saliency_guidance", "save_dtype",
    "forget_data", "anchor", "num_forget_images", "num_retain_images", "guidance_scale",
    "sample_batch_size",
)  # fmt: skip
PROMPTS = 1024  # for a guard to learn from, half of them of the concept; distinct ones are fewer


class GuardMethod(Method):
    """A method that leaves the network as it is.

    Args:
        options: of the class's ``Options``.
        concepts: what to guard against, unless the options say it in phrases.
    """

    guard: type[Guard]
    closed_form = True
    has_anchor = False
    uses_retain = False
    ignores = tuple(dict.fromkeys((*NEEDS_TRAINING, *NEEDS_WEIGHTS)))

    def __init__(self, options: Any, concepts: list[Concept]):
        given = [phrase for phrase in map(str.strip, options.phrases.split(",")) if phrase]
        self.phrases = given or [name for concept in concepts for name in concept.names]
        if self.guard.wants_prompts and not given:
            self.phrases += [prompt for concept in concepts for prompt in plain_prompts(concept)]
        self.made = self.guard(options, self.phrases)
        self.concepts = concepts

    def learn(self, pipe, seed: int) -> None:
        """Have the guard learn what it needs from the base model; as :meth:`Guard.learn`."""
        prompts: list[list[str]] = [[], []]
        for kind, found in zip(("forget", "retain"), prompts, strict=True) if self.guard.learned else ():
            parts = shared_rows(self.concepts, kind, PROMPTS // 2, seed, "training")
            found += dict.fromkeys(row.prompt for rows in parts for row in rows)
        self.made.learn(pipe, *prompts, seed)

    @classmethod
    def sets(cls, mask, options):
        return []

    def save(self, path, base, about: dict, dtype) -> None:
        """Write the guard's file, as a change writes its own; neither the base model nor a dtype matters to it."""
        save_guard(path, self.made, about)


def plain_prompts(concept: Concept) -> list[str]:
    """The prompts of its templates that name the concept and nothing else, by each of its names."""
    found = []
    for template in concept.vocabulary.templates:
        place, *others = dict.fromkeys(placeholders(template))
        if not others and slot_of(place) == concept.slot:
            found += [concept.vocabulary.fill(template, {place: name})[0] for name in concept.names]
    return list(dict.fromkeys(found))


class SLD(GuardMethod):
    title, guard, Options = "SLD", sld.SLD, sld.SLDOptions


class SAFREE(GuardMethod):
    title, guard, Options = "SAFREE", safree.SAFREE, safree.SAFREEOptions


class ConceptSteerers(GuardMethod):
    title, guard = "Concept Steerers", concept_steerers.ConceptSteerers
    Options = concept_steerers.ConceptSteerersOptions


class SAeUron(GuardMethod):
    title, guard, Options = "SAeUron", saeuron.SAeUron, saeuron.SAeUronOptions


class GrOCE(GuardMethod):
    title, guard, Options = "GrOCE", groce.GrOCE, groce.GrOCEOptions


class EGLOCE(GuardMethod):
    title, guard, Options = "EGLOCE-style", egloce.EGLOCE, egloce.EGLOCEOptions

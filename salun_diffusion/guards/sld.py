"""Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv:2211.05105), from the paper and the authors' code."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler

from ..errors import SalunError
from ..models.text_unet import encode
from ..options import option
from .base import Guard, Step, Watch

LEVELS = {  # as published: warm_up, scale, margin, momentum_scale, momentum
    "weak": (15, 200.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class SLDOptions:
    """A level, and numbers that replace its own."""

    level: str = option("medium", "how far it goes, as published", tuple(LEVELS))
    phrases: str = option("", "what to keep away from, in words, with commas; the concept's names unless given")
    warm_up: int | None = option(None, "first steps that are left alone; the level's, of some 50 steps", least=0)
    scale: float | None = option(None, "of the difference to the concept; the level's", least=0)
    margin: float | None = option(None, "difference to the concept below which the prompt is near it; the level's (λ)")
    momentum_scale: float | None = option(None, "weight of what earlier steps did; the level's", least=0)
    momentum: float | None = option(None, "share of it that a step keeps, 0 to 1; the level's", least=0)
    warm_up_by: str = option(
        "steps",
        "what the warm-up counts: steps (published), or the timestep from 999 down, as Diffusion-MU-Attack's copy of "
        "SLD does: it then acts from the start, and leaves the last steps alone",
        ("steps", "timestep"),
    )


class SLD(Guard):
    """Guidance away from a concept, where the prompt comes near it (Safe Latent Diffusion, eq. 3 to 8).

    With the predictions ε for the prompt (c), for nothing (∅) and for the concept's phrases (s), guidance g and, pixel
    by pixel, ::

        μ = min(1, scale · |ε_c − ε_s|) where ε_c − ε_s < margin, else 0
        γ = μ · (ε_s − ε_∅) + momentum_scale · ν,   ν ← momentum · ν + (1 − momentum) · γ
        ε = ε_∅ + g · (ε_c − ε_∅ − γ)               from step `warm_up` on; ν grows before it too

    so that the prompt's prediction becomes ε_c − γ, whatever the guidance. The authors' code does nothing where there
    is no guidance; here it is the formula at g = 1. Of a model that predicts velocities, the differences are turned
    into those of the noise first (our own completion: the constants are of noise).
    """

    title = "SLD"
    Options = SLDOptions

    def __init__(self, options, phrases):
        super().__init__(options, phrases)
        published = zip(("warm_up", "scale", "margin", "momentum_scale", "momentum"), LEVELS[options.level],
                        strict=True)  # fmt: skip
        for name, value in published:
            given = getattr(options, name)
            setattr(self, name, value if given is None else given)

    def watch(self, call):
        if self.options.warm_up_by == "steps" and self.warm_up >= call.num_inference_steps:
            raise SalunError(
                f"SLD's warm-up of {self.warm_up} steps leaves none of {call.num_inference_steps} to guard: draw with "
                "more steps, or make the guard with a smaller warm_up."
            )
        return SLDWatch(self, call)


class SLDWatch(Watch):
    """The momentum of one call."""

    wants_unconditional = True

    def __init__(self, guard: SLD, call):
        self.guard, self.momentum = guard, 0.0
        self.concept = encode(call.pipe, [", ".join(guard.phrases)])
        config = call.pipe.scheduler.config
        self.alphas = None
        if config.get("prediction_type") == "v_prediction":
            self.alphas = DDPMScheduler.from_config(config).alphas_cumprod

    def beside(self, number):
        return self.concept

    def prediction_change(self, step: Step):
        guard, unit = self.guard, self._noise_in_prediction(step.timestep)
        conditional, unconditional, concept = (
            unit * part.float() for part in (step.conditional, step.unconditional, step.beside)
        )
        near = conditional - concept
        weight = torch.where(near < guard.margin, (guard.scale * near.abs()).clamp(max=1), 0.0)
        change = weight * (concept - unconditional) + guard.momentum_scale * self.momentum
        self.momentum = guard.momentum * self.momentum + (1 - guard.momentum) * change
        reached = step.timestep if guard.options.warm_up_by == "timestep" else step.number
        return -change / unit if reached >= guard.warm_up else None

    def _noise_in_prediction(self, timestep: float) -> float:
        """How much the noise changes with the prediction: ε = √ᾱ · v + … (Salimans & Ho 2022)."""
        if self.alphas is None:
            return 1.0
        return max(float(self.alphas[round(timestep)]) ** 0.5, 1e-4)  # it is 0 at the start of some schedules

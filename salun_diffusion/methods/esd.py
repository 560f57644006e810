"""ESD: Gandikota et al., "Erasing concepts from diffusion models", ICCV 2023, eq. 6-7."""

import random
from dataclasses import dataclass

import torch

from ..models.base import Condition
from ..options import option
from .base import NEEDS_RETAIN, Batch, GradientMethod
from .losses import denoising


@dataclass(frozen=True)
class ESDOptions:
    """Guidance scales as diffusers counts them, from the empty prompt."""

    negative_guidance: float = option(1.0, "how far to go away from the concept: η of eq. 7")
    start_guidance: float = option(3.0, "guidance scale of the half-way denoising")
    erase_from: str = option("", "a wider prompt to start from, such as 'a painting', in place of the empty one")


class HalfDenoising(GradientMethod):
    """A method on pictures that the model being edited has denoised half-way itself, from noise and a name alone."""

    forget_set = "name"
    uses_retain = False
    ignores = NEEDS_RETAIN

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        self.steps = model.sampler(batches.num_inference_steps).timesteps.tolist()

    def half_denoised(self, forget: Batch, condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
        """From the batch's noise to one of the sampler's steps, drawn at random for the whole batch, with
        ``start_guidance``: the noisy pictures, and their timesteps.
        """
        done = random.Random(repr((self.batches.seed, "esd", forget.step))).randrange(len(self.steps))
        noisy = self.partly_denoised(forget.noise, condition, self.steps[:done])
        return noisy, torch.full_like(forget.timesteps, self.steps[done])

    @torch.no_grad()
    def partly_denoised(self, noise: torch.Tensor, condition: Condition, steps: list[int]) -> torch.Tensor:
        """From ``noise`` through the sampler's first ``steps`` with guidance, by the model as it is now."""
        sampler = self.model.sampler(self.batches.num_inference_steps)
        empty = self.model.repeated(self.model.empty, len(noise))
        both = {key: torch.cat([empty[key], condition[key]]) for key in empty}
        noisy = noise
        for step in steps:
            t = torch.full((2 * len(noisy),), step, device=noisy.device)
            nothing, concept = self.predict(noisy.repeat(2, 1, 1, 1), t, both).chunk(2)
            guided = nothing + self.options.start_guidance * (concept - nothing)
            noisy = sampler.step(guided.float(), step, noisy.float()).prev_sample.to(noise)
        return noisy


class ESD(HalfDenoising):
    """The concept's name is to predict what guides *away* from the concept, on pictures that the model being edited has
    denoised half-way itself. The name alone: what else a prompt asks for would be negated too.

    A step draws one of the sampler's steps at random, denoises from noise up to it with ``start_guidance``, and matches
    ``ε(x_t, c)`` to ``ε0(x_t, from) − negative_guidance · (ε0(x_t, c) − ε0(x_t, ∅))``: ε0 is the base model, ``from``
    the prompt ``erase_from``, or none. The paper's scopes are ``cross-attention`` (x), ``cross-attention-kv``
    (x-strict), ``no-cross-attention`` (u), ``self-attention`` and ``all`` (full).
    """

    title = "ESD"
    settings = {"max_train_steps": 1000, "learning_rate": 1e-5, "train_batch_size": 1}
    Options = ESDOptions
    has_anchor = False

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        self.wider = model.encode([options.erase_from]) if options.erase_from else model.empty

    def losses(self, forget, retain):
        noisy, t, target = self.aim(forget)
        erased = self.predict(noisy, t, forget.condition)
        return denoising(erased, target), erased.new_zeros(())

    def aim(self, forget: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Half-denoised pictures, their timesteps, and what is to be predicted for them."""
        noisy, t = self.half_denoised(forget, forget.condition)
        empty, wider = (self.model.repeated(part, len(noisy)) for part in (self.model.empty, self.wider))
        three = {key: torch.cat([forget.condition[key], empty[key], wider[key]]) for key in empty}
        with self.change.at_base(), torch.no_grad():
            concept, nothing, origin = self.predict(noisy.repeat(3, 1, 1, 1), t.repeat(3), three).chunk(3)
        return noisy, t, origin - self.options.negative_guidance * (concept - nothing)


class ESD200(ESD):
    """The settings of the authors' later code: a fifth of the steps, each five times as long. Its negative guidance of
    2, counted from the concept's own prediction, is the 1 from the empty prompt that stands here.
    """

    title = "ESD, 200 steps"
    settings = {"max_train_steps": 200, "learning_rate": 5e-5, "train_batch_size": 1}


class SalUnESD(ESD):
    """ESD's loss on the weights that SalUn's saliency finds."""

    title = "SalUn-ESD"
    scope = "cross-attention+resnets"
    mask = "saliency"

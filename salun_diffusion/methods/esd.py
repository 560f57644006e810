"""ESD: Gandikota et al., "Erasing concepts from diffusion models", ICCV 2023, eq. 6-7."""

import random

import torch
from diffusers import DDIMScheduler

from ..models.conditioning import encode
from .base import NEEDS_RETAIN, Gradient
from .losses import denoising


class ESD(Gradient):
    """The concept's name is to predict what guides *away* from the concept, on pictures that the model being edited has
    denoised half-way itself. The name alone: what else a prompt asks for would be negated too.

    A step draws one of the sampler's steps at random, denoises from noise up to it with ``start_guidance``, and matches
    ``ε(x_t, c)`` to ``ε0(x_t, from) − negative_guidance · (ε0(x_t, c) − ε0(x_t, ∅))``: ε0 is the base model, ``from``
    the prompt ``erase_from``, or none. The paper's scopes are ``cross-attention`` (x), ``cross-attention-kv``
    (x-strict), ``no-cross-attention`` (u), ``self-attention`` and ``all`` (full).
    """

    title = "ESD"
    settings = {"max_train_steps": 1000, "learning_rate": 1e-5, "train_batch_size": 1}
    options = {"negative_guidance": 1.0, "start_guidance": 3.0, "erase_from": ""}
    forgets = "name"
    anchored = False
    retains = False
    unused = NEEDS_RETAIN

    def __init__(self, trainer):
        super().__init__(trainer)
        wider = self.chose["erase_from"]
        self.wider = encode(trainer.pipe, [wider]) if wider else trainer.empty
        # latents are no pixels: by default DDIM would clip them to [-1, 1]
        self.sampler = DDIMScheduler.from_config(trainer.pipe.scheduler.config, clip_sample=False)
        self.sampler.set_timesteps(trainer.config.num_inference_steps)

    def losses(self, forget, retain):
        steps = self.sampler.timesteps.tolist()
        done = random.Random(repr((self.trainer.config.seed, "esd", forget.step))).randrange(len(steps))
        noisy = self.partly_denoised(forget.noise, forget.text, steps[:done])
        t = torch.full_like(forget.timesteps, steps[done])
        empty, wider = (self.trainer.repeated(text, len(noisy)) for text in (self.trainer.empty, self.wider))
        texts = {key: torch.cat([forget.text[key], empty[key], wider[key]]) for key in empty}
        with self.trainer.at_base(), torch.no_grad():
            concept, nothing, origin = self.predict(noisy.repeat(3, 1, 1, 1), t.repeat(3), texts).chunk(3)
        target = origin - self.chose["negative_guidance"] * (concept - nothing)
        erased = self.predict(noisy, t, forget.text)
        return denoising(erased, target), erased.new_zeros(())

    @torch.no_grad()
    def partly_denoised(self, noise: torch.Tensor, text: dict[str, torch.Tensor], steps: list[int]) -> torch.Tensor:
        """DDIM from ``noise`` through ``steps`` with guidance, by the model as it is now."""
        empty = self.trainer.repeated(self.trainer.empty, len(noise))
        both = {key: torch.cat([empty[key], text[key]]) for key in empty}
        noisy = noise
        for step in steps:
            t = torch.full((2 * len(noisy),), step, device=noisy.device)
            nothing, concept = self.predict(noisy.repeat(2, 1, 1, 1), t, both).chunk(2)
            guided = nothing + self.chose["start_guidance"] * (concept - nothing)
            noisy = self.sampler.step(guided.float(), step, noisy.float()).prev_sample.to(noise)
        return noisy


class ESD200(ESD):
    """The settings of the authors' later code: a fifth of the steps, each five times as long. Its negative guidance of
    2, counted from the concept's own prediction, is the 1 from the empty prompt that stands here."""

    title = "ESD, 200 steps"
    settings = {"max_train_steps": 200, "learning_rate": 5e-5, "train_batch_size": 1}


class SalUnESD(ESD):
    """ESD's loss on the weights that SalUn's saliency finds."""

    title = "SalUn-ESD"
    scope = "cross-attention+resnets"
    mask = "saliency"

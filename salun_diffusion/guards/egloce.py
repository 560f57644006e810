"""After EGLOCE (arXiv:2604.09405): our own reconstruction from its abstract and readers' notes, "EGLOCE-style".

What is the paper's: two energies of the clean picture that a step foresees, one that repels it from the concept and
one that keeps it near the prompt, and a few gradient steps on the latents before each ordinary step. Their form,
weights and sizes are ours. No figure of the paper is to be compared with what this draws.
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler

from ..options import option
from .base import Guard, Watch, need_prompts
from .energies import energy_of


@dataclass(frozen=True)
class EGLOCEOptions:
    """The energies and the steps on them; every default is our own."""

    phrases: str = option("", "what to keep away from, in words, with commas; the concept's names unless given")
    clip: str = option(
        "",
        "folder or hub id of the CLIP model that looks; unless given, the classifier in the model's folder judge/, or "
        "without one openai/clip-vit-large-patch14",
    )
    repel: float = option(1.0, "weight of the energy that repels from the concept", least=0)
    retain: float = option(0.5, "weight of the energy that keeps to the prompt", least=0)
    margin: float | None = option(
        None, "similarity up to which a picture is left alone; 0 unless given, with a classifier a probability of 0.1"
    )
    inner_steps: int = option(5, "gradient steps on the latents at each step", least=0)
    step_size: float = option(0.02, "of a gradient step, as a share of the latents' root mean square", least=0)
    window: float = option(0.8, "first share of the steps that are guarded", least=0)


class EGLOCE(Guard):
    """Latents moved, while a picture is drawn, away from what looks like the concept.

    With the network's guided prediction ε of a step held fixed, z foresees the clean picture
    ẑ0 = (z − √(1 − ᾱ) ε)/√ᾱ, which is decoded and looked at. ``inner_steps`` times, while its similarity to the concept
    is above ``margin``, ::

        E = repel · max(0, similarity − margin) − retain · similarity to the prompt
        z ← z − step_size · rms(z) · ∇E/rms(∇E)

    and the scheduler's step goes on from there with the same ε: the network is not asked again. With a classifier in
    place of CLIP the energies are log-probabilities (:class:`.energies.JudgeEnergy`).
    """

    title = "EGLOCE-style"
    Options = EGLOCEOptions
    fits_two_encoders = False

    def energy(self, pipe):
        """What looks at the pictures of this pipeline."""
        return energy_of(self.options.clip, getattr(pipe, "name_or_path", None) or "")

    def learn(self, pipe, prompts, others, seed):
        """Nothing; but what looks must be there, and know the phrases."""
        self.energy(pipe).check(self.phrases)

    def watch(self, call):
        need_prompts(call, self.title)
        return EGLOCEWatch(self, call)


class EGLOCEWatch(Watch):
    """The schedule of one call, and what looks at its pictures."""

    def __init__(self, guard: EGLOCE, call):
        self.guard, self.call, self.energy = guard, call, guard.energy(call.pipe)
        self.energy.check(guard.phrases)
        margin = guard.options.margin
        self.margin = self.energy.margin if margin is None else margin
        config = call.pipe.scheduler.config
        self.velocity = config.get("prediction_type") == "v_prediction"
        self.alphas = DDPMScheduler.from_config(config).alphas_cumprod
        # Euler and its kin keep latents of z/√ᾱ, whose noise starts far from a deviation of 1
        self.scaled = float(call.pipe.scheduler.init_noise_sigma) != 1

    def latent_change(self, number, timestep, latents, predicted):
        options = self.guard.options
        if number >= options.window * self.call.num_inference_steps:
            return None
        alpha = float(self.alphas[round(timestep)])
        with torch.inference_mode(False), torch.enable_grad():
            z, fixed = latents.detach().float().clone(), predicted.detach().float().clone()
            for _ in range(options.inner_steps):
                z.requires_grad_()
                similar, energy = self._energies(z, fixed, alpha)
                (slope,) = torch.autograd.grad(energy.sum(), z)
                size = _rms(slope)
                active = (similar > self.margin)[:, None, None, None] & (size > 0)
                step = options.step_size * _rms(z.detach()) * slope / size.clamp(min=1e-30)
                z = z.detach() - torch.where(active, step, 0.0)
                if not active.any():
                    break
        return z - latents.float()

    def _energies(self, z, predicted, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each picture's similarity to the concept, and its energy."""
        options, vae = self.guard.options, self.call.pipe.vae
        z = z * alpha**0.5 if self.scaled else z
        if self.velocity:
            clean = alpha**0.5 * z - (1 - alpha) ** 0.5 * predicted
        else:
            clean = (z - (1 - alpha) ** 0.5 * predicted) / max(alpha, 1e-8) ** 0.5
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        pictures = vae.decode((clean / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0].float()
        similar, repulsion, retention = self.energy(pictures, self.guard.phrases, self.call.prompts)
        above = repulsion - self.margin if repulsion is similar else repulsion
        return similar, options.repel * above.clamp(min=0) + options.retain * retention


def _rms(x: torch.Tensor) -> torch.Tensor:
    """Of each picture, ``(batch, 1, 1, 1)``."""
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()

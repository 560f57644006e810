"""TICoE (arXiv 2604.15829, CVPR 2026), by the authors' code."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import SalunError
from ..models.base import Condition
from ..options import option
from .base import NEEDS_RETAIN, Batch, GradientMethod
from .losses import denoising

SCALES = (1.0, 0.75, 0.5)  # of a latent, in which the fuser sees it


@dataclass(frozen=True)
class TICoEOptions:
    """The values of the authors' code, but for ``resample`` and ``states``."""

    negative_guidance: float = option(1.0, "how far to go away from the concept: γ")
    wordings: str = option(
        "", "prompts to mix, with {} for the concept's name and commas between them; the forget pictures' unless given"
    )
    mixed: int = option(20, "prompts in a mix, chosen at random; all that there are, if fewer", least=1)
    temperature: float = option(
        0.7, "τ: their weights are Dirichlet(1/τ), nearly equal where it is small, nearly all on one where it is large",
        least=0.05,
    )  # fmt: skip
    noise: float = option(0.001, "deviation of the noise on a mix, in units of the mix's own", least=0)
    resample: int = option(1, "steps for which a mix stays in use; 200 in the authors' code", least=1)
    states: str = option(
        "restored", "scale of a mix: that of the prompts' own states, or layer-normed (published)",
        ("restored", "normed"),
    )  # fmt: skip
    fusion: float = option(0.5, "λ: weight of what a small transformer adds to a noisy latent", least=0)
    fuser_rate: float = option(5e-5, "learning rate of that transformer; 0 leaves it as it starts", least=0)

    def __post_init__(self):
        if self.temperature > 20:
            raise SalunError(f"temperature is {self.temperature:g}: give 20 at most.")
        if nameless := [wording for wording in self.templates if "{}" not in wording]:
            raise SalunError(f"The wording '{nameless[0]}' has no place for the concept's name: put {{}} there.")

    @property
    def templates(self) -> list[str]:
        """The ``wordings``, one by one."""
        return [wording for wording in map(str.strip, self.wordings.split(",")) if wording]


class TICoE(GradientMethod):
    """Random mixes of a concept's prompts are to predict what guides away from the concept, ESD's target, on noised
    pictures of it to which a transformer adds what it sees in them at three sizes (:class:`Fuser`).

    With z_t a noised picture of the concept, z = z_t + fusion · fuser(z_t), e the mix (:func:`mix`) and ε0 the base
    model, a step lowers ::

        ‖ε(z, t, e) − (ε0(z, t, ∅) − negative_guidance · (ε0(z, t, e) − ε0(z, t, ∅)))‖²

    in which the target carries no gradient; that of the concept's prediction trains the fuser along with the network.
    The fuser is left behind with the training. There is no retain term, as there is none in the authors' code.

    From that code, with these differences. A step has a mix of its own (theirs draw a new one each 200 steps of 500:
    three in all). A mix has the scale that the prompts' states have when a picture is drawn, as ∅ has it; theirs are
    layer-normed where ∅ is not (``states=normed``). The fuser has no dropout, theirs a tenth. It still learns whatever
    makes the loss small, and moving z may do that too: ``fuser_rate=0`` leaves it as it starts. A language model wrote
    their prompts; here they are the ``wordings``, or those of the forget pictures, which may ask for more than the
    concept: that is then negated too. How theirs resizes a latent is not known to us: here it is bilinear.
    """

    title = "TICoE"
    scope = "all"
    settings = {"max_train_steps": 500, "learning_rate": 1e-5, "train_batch_size": 1, "num_forget_images": 200}
    Options = TICoEOptions
    needs = ("text", "embeddings")
    has_anchor = False
    uses_retain = False
    ignores = (*NEEDS_RETAIN, "condition_dropout")

    @classmethod
    def sets(cls, mask, options):
        return [*super().sets(mask, options), "name"]

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        images, names = (batches.sets[kind] for kind in ("forget", "name"))
        self.concept_of = torch.arange(len(images.shares)).repeat_interleave(torch.tensor(images.shares))
        called = iter([names.prompts[i] for i in names.prompt_index.tolist()])
        self.states = []  # of each concept's prompts, (prompts, tokens, width)
        for number, count in enumerate(names.shares):
            own = [next(called) for _ in range(count)]
            texts = [wording.replace("{}", name) for name in own for wording in options.templates]
            if not texts:
                texts = [images.prompts[i] for i in images.prompt_index[self.concept_of == number].unique().tolist()]
            self.states.append(model.embeddings(model.encode(texts)).float())
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(batches.generator("ticoe fuser").initial_seed())
            self.fuser = Fuser(model.sample_shape[0])
        self.fuser.to(batches.accelerator.device)
        self.own = {f"fuser.{name}": parameter for name, parameter in self.fuser.named_parameters()}
        self.own_rate = options.fuser_rate

    def losses(self, forget, retain):
        noisy, t, told = forget.noisy, forget.timesteps, self.mixes(forget)
        fused = (noisy + self.options.fusion * self.fuser(noisy.float())).to(noisy.dtype)
        nothing = self.model.repeated(self.model.empty, len(noisy))
        both = {key: torch.cat([told[key], nothing[key]]) for key in told}
        with self.change.at_base(), torch.no_grad():
            concept, nothing = self.predict(fused.detach().repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        target = nothing - self.options.negative_guidance * (concept - nothing)
        erased = self.predict(fused, t, told)
        return denoising(erased, target), erased.new_zeros(())

    def mixes(self, forget: Batch) -> Condition:
        """The batch's condition, in which each picture's embeddings are a mix of its concept's prompts."""
        options, found = self.options, []
        for row, index in zip(forget.rows.tolist(), forget.index.tolist(), strict=True):
            states, key = self.states[self.concept_of[index]], ("ticoe", forget.step // options.resample, row)
            chances = random.Random(repr((self.batches.seed, *key)))
            chosen = chances.sample(range(len(states)), min(options.mixed, len(states)))
            # a Dirichlet's, once divided by their sum
            weights = torch.tensor([chances.gammavariate(1 / options.temperature, 1) for _ in chosen])
            noise = options.noise * torch.randn(states.shape[1:], generator=self.batches.generator(*key))
            found.append(mix(states[chosen], weights / weights.sum(), noise, options.states))
        return self.model.with_embeddings(forget.condition, torch.stack(found).to(forget.noisy.device))


def mix(states: torch.Tensor, weights: torch.Tensor, noise: torch.Tensor, scale: str) -> torch.Tensor:
    """A point among some prompts, ``(tokens, width)``: their layer-normed states (no affine) by ``weights``, plus
    ``noise``, layer-normed again, and for the ``scale`` "restored" with the mean and deviation that each token has in
    the prompts, by the same weights. Of one prompt and no noise that is the prompt.

    Args:
        states: of the prompts, ``(prompts, tokens, width)``, fp32.
        weights: ``(prompts,)``, 1 in all.
        noise: ``(tokens, width)``.
        scale: "restored", or "normed".
    """
    width = states.shape[-1:]
    point = F.layer_norm(torch.tensordot(weights, F.layer_norm(states, width), 1) + noise, width)
    if scale == "normed":
        return point
    mean, deviation = states.mean(-1, keepdim=True), states.std(-1, correction=0, keepdim=True)
    return torch.tensordot(weights, mean, 1) + torch.tensordot(weights, deviation, 1) * point


class Fuser(nn.Module):
    """What a transformer of two layers sees in a latent at each of ``SCALES``: their places are one sequence, with
    sinusoidal positions. It is as wide as the latent has channels, with a head for each, 4 for Stable Diffusion's.

    Args:
        channels: of the latents.
    """

    def __init__(self, channels: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(channels, channels, 4 * channels, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Of latents ``(batch, channels, height, width)``, fp32, what it puts out at the places of their own size, of
        the same shape.
        """
        height, width = latents.shape[2:]
        sizes = [(max(round(height * scale), 1), max(round(width * scale), 1)) for scale in SCALES]
        parts = [F.interpolate(latents, size, mode="bilinear").flatten(2).transpose(1, 2) for size in sizes]
        places = torch.cat(parts, 1)
        seen = self.encoder(places + positions(*places.shape[1:]).to(places))[:, : height * width]
        return seen.transpose(1, 2).unflatten(2, (height, width))


def positions(count: int, width: int) -> torch.Tensor:
    """Sinusoidal positions (Vaswani et al. 2017, section 3.5), ``(count, width)``."""
    angles = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]

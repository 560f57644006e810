"""AdvUnlearn: Zhang et al., "Defensive unlearning with adversarial training for robust concept erasure in diffusion
models", NeurIPS 2024 (arXiv 2405.15234).
"""

import random
from dataclasses import dataclass, replace

import torch

from ..models.base import Condition
from ..options import option
from .base import Batch
from .esd import HalfDenoising
from .losses import denoising


@dataclass(frozen=True)
class AdvUnlearnOptions:
    """Guidance scales as diffusers counts them, from the empty prompt; the attack's values are the authors'."""

    negative_guidance: float = option(1.0, "how far to go away from the concept: ESD's η")
    start_guidance: float = option(3.0, "guidance scale of the half-way denoising")
    warm_up: float = option(0.2, "share of the steps before the attack sets in", least=0)
    attack_steps: int = option(30, "of Adam, in each step after that, for a word before the name", least=1)
    attack_rate: float = option(1e-3, "Adam's learning rate there", least=0)
    attack_by: str = option(
        "gradient", "what Adam is given: the gradient, or its sign alone (the authors' fast variant)",
        ("gradient", "sign"),
    )  # fmt: skip


class AdvUnlearn(HalfDenoising):
    """The text encoder learns to say of the concept's name what guides away from the concept, also behind a word that
    an attack has found; the denoiser stays as it is.

    A step matches ``ε(x_t, E(w c))`` to ``ε(x_t, E0(∅)) − negative_guidance · (ε(x_t, E0(c)) − ε(x_t, E0(∅)))``, where
    E0 is the base model's text encoder, E the one that is trained, x_t a half-denoised picture of the name c, and the
    word w a soft one (none in the warm-up). The attack starts at a word of the vocabulary and lowers
    ``‖ε(x_t, E(w c)) − ε(x_t, E0(c))‖²`` (the paper's lower problem), each of its steps on a picture and a timestep of
    its own. α times the retain prompts' error against the base model's predictions is added.

    From the authors' code (text encoder, "prefix_k" of one token, random start) with these differences: their attack
    adds up the gradients of all its steps, never set to zero, here each counts once; they count the prompt's words
    where tokens are meant; they feed a timestep that is not quite the half-denoised picture's. Their token embeddings
    get no gradient; here the scope leaves them out. They retain by a second Adam step of its own on half-denoised
    pictures, or by a term with weight 0.3, which it is here, on pictures that the base model has drawn.
    """

    title = "AdvUnlearn"
    component = "text_encoder"
    scope = "no-token-embedding"
    settings = {
        "max_train_steps": 1000, "learning_rate": 1e-5, "train_batch_size": 5, "alpha": 0.3, "retain_target": "base",
    }  # fmt: skip
    Options = AdvUnlearnOptions
    needs = ("text", "words", "one text encoder")
    has_anchor = False
    uses_retain = True
    ignores = ("condition_dropout",)
    phased = True

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        self.empty = model.empty  # the base model's, while nothing is trained
        self.found: tuple[int, dict[str, torch.Tensor]] = (-1, {})  # the step, and the words by name

    def told(self, batch, images):
        return self.model.encode_now(self._prompts(batch, images))

    def nothing(self):
        return self.model.encode_now([""])

    def losses(self, forget, retain):
        options, names = self.options, self._prompts(forget, self.batches.sets["name"])
        noisy, t = self.half_denoised(forget, forget.condition)
        empty = self.model.repeated(self.empty, len(noisy))
        both = {key: torch.cat([forget.condition[key], empty[key]]) for key in empty}
        with torch.no_grad():
            concept, nothing = self.predict(noisy.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        target = nothing - options.negative_guidance * (concept - nothing)
        if forget.step >= options.warm_up * self.batches.max_train_steps:
            words = self._attack(forget, names)
            condition = self._behind(names, torch.stack([words[name] for name in names]))
        else:
            condition = self.model.encode_now(names)
        kept = self.model.encode_now(self._prompts(retain, self.batches.retain))
        erased, kept = self.predict_both(
            replace(forget, noisy=noisy, timesteps=t, condition=condition), replace(retain, condition=kept)
        )
        return denoising(erased, target), denoising(kept, retain.target)

    @staticmethod
    def _prompts(batch: Batch, images) -> list[str]:
        return [images.prompts[i] for i in images.prompt_index[batch.index].tolist()]

    def _behind(self, names: list[str], words: torch.Tensor) -> Condition:
        """The conditions of ``names``, each behind its word, ``(names, width)``."""
        return self.model.encode_words([self.model.behind_word(name) for name in names], [words])

    def _attack(self, forget: Batch, names: list[str]) -> dict[str, torch.Tensor]:
        """For each of ``names`` the word of the step, ``(width,)``: by the seed, the step and the name alone, so that
        all parts of a batch meet the same.
        """
        if self.found[0] != forget.step:
            self.found = forget.step, {}
        rows = {name: row for row, name in enumerate(names) if name not in self.found[1]}
        if not rows:
            return self.found[1]
        options, draw, key = self.options, self.batches.generator, ("advunlearn", forget.step)
        (table,) = self.model.word_tables()
        start = [int(torch.randint(len(table), (1,), generator=draw(*key, "word", name))) for name in rows]
        words = table[start].float().requires_grad_()
        condition = {part: value[list(rows.values())] for part, value in forget.condition.items()}
        adam = torch.optim.Adam([words], lr=options.attack_rate)
        for i in range(options.attack_steps):
            done = random.Random(repr((self.batches.seed, *key, i))).randrange(len(self.steps))
            noise = [torch.randn(forget.noise.shape[1:], generator=draw(*key, i, name)) for name in rows]
            noisy = self.partly_denoised(torch.stack(noise).to(forget.noise), condition, self.steps[:done])
            t = torch.full((len(rows),), self.steps[done], device=noisy.device)
            with torch.no_grad():
                goal = self.predict(noisy, t, condition)
            loss = (self.predict(noisy, t, self._behind(list(rows), words)).float() - goal.float()).square().sum()
            (gradient,) = torch.autograd.grad(loss, words)
            words.grad = gradient.sign() if options.attack_by == "sign" else gradient
            adam.step()
        self.found[1].update(zip(rows, words.detach(), strict=True))
        return self.found[1]

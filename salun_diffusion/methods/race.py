"""RACE: Kim et al., "R.A.C.E.: Robust adversarial concept erasure for secure text-to-image diffusion model", ECCV 2024
(arXiv 2405.16341).
"""

from dataclasses import dataclass

from ..options import option
from .adversarial import embedding_pgd, uniform
from .esd import ESD, ESDOptions
from .losses import denoising


@dataclass(frozen=True)
class RACEOptions(ESDOptions):
    """ESD's, and those of the attack; the values of the authors' code."""

    warm_up: float = option(0.5, "share of the steps that are plain ESD, before the attack sets in", least=0)
    radius: float = option(0.1, "how far the attack may move an entry of the prompt's embedding", least=0)
    attack_steps: int = option(10, "of projected gradient descent", least=1)
    step_size: float = option(0.25, "of one of those, as a share of the radius", least=0)
    lasso: float = option(
        0.0, "weight of the mean absolute change of each parameter; the authors' option has 0.1", least=0
    )


class RACE(ESD):
    """ESD, whose name of the concept is in each step replaced by an embedding near it that draws the concept again.

    The attack lowers ``‖ε_θ(x_t, e + δ) − ε‖²`` over ``‖δ‖∞ ≤ radius`` with the weights of now. As in the authors'
    code, ε is the noise that the half-denoised picture started from, not quite the noise that is left in it, and the
    target stays what ESD's is for the name itself. They start from a finished ESD: here the first ``warm_up`` of the
    steps are that.
    """

    title = "RACE"
    settings = {"max_train_steps": 2000, "learning_rate": 1e-5, "train_batch_size": 1}
    Options = RACEOptions
    needs = ("text", "embeddings")
    phased = True

    def losses(self, forget, retain):
        options, noisy, t, target = self.options, *self.aim(forget)
        condition = forget.condition
        if forget.step >= options.warm_up * self.batches.max_train_steps:
            start = forget.noise.float()

            def loss(tokens):
                predicted = self.predict(noisy, t, self.model.with_embeddings(condition, tokens))
                return (self.model.noise_in(predicted, noisy, t).float() - start).square().sum()

            tokens = self.model.embeddings(condition)
            random = uniform(self.batches, forget, "race", tokens.shape[1:])
            attacked = embedding_pgd(loss, tokens, random, options.radius, options.attack_steps, options.step_size)
            condition = self.model.with_embeddings(condition, attacked)
        loss = denoising(self.predict(noisy, t, condition), target)
        if options.lasso:
            loss = loss + options.lasso * sum(delta.abs().mean() for delta in self.change.deltas().values())
        return loss, loss.new_zeros(())

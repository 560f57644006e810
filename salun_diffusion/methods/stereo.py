"""STEREO: Srivatsan et al., "STEREO: A two-stage framework for adversarially robust concept erasing from text-to-image
diffusion models", CVPR 2025 (arXiv 2408.16807).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..models.base import Condition
from ..options import option
from ..process import progress
from .adversarial import Inversion, OpenPrompts, Rounds, uniform
from .base import Batch
from .esd import HalfDenoising
from .losses import denoising


@dataclass(frozen=True)
class STEREOOptions:
    """The values of the authors' code; its guidance scale s = 2 stands for the two that come out of it."""

    negative_guidance: float = option(3.0, "how far to go away from the concept and the words found: s + 1")
    anchor_guidance: float = option(1.0, "how far to go towards the anchor: s - 1")
    start_guidance: float = option(3.0, "guidance scale of the half-way denoising")
    rounds: int = option(4, "of erasing and searching a word, before the training itself", least=1)
    round_steps: int = option(200, "of Adam, to erase in each round", least=1)
    round_rate: float = option(5e-6, "its learning rate", least=0)
    round_guidance: float = option(
        0.0, "how far to go away there; the authors' formula comes to 0: to the empty prompt's"
    )
    search_steps: int = option(3000, "of textual inversion in each round", least=1)
    search_rate: float = option(5e-3, "AdamW's learning rate there", least=0)
    search_batch: int = option(1, "pictures a step there", least=1)


class STEREO(HalfDenoising):
    """Words that bring the concept back are searched in rounds; then the name and all of them are erased at once.

    A round erases the name (from the second on, the word found last) by ESD's loss on top of the rounds before, then
    finds the next word by textual inversion on what has come of it. The training proper starts again from the base
    model. For each half-denoised picture, drawn by the name or one of the words, that prompt is to predict ::

        ε0(∅) + anchor_guidance · (ε0(a) − ε0(∅)) − negative_guidance · mean_n (ε0(n) − ε0(∅))

    where n are the name and all words, and a is one of the anchor's prompts: the forget set's, with the anchor in the
    concept's place. The authors have a language model write those.

    The rounds are the beginning of the first step: a checkpoint holds their words, but there is none before they are
    done.
    """

    title = "STEREO"
    settings = {"max_train_steps": 200, "learning_rate": 2e-5, "train_batch_size": 1}
    Options = STEREOOptions
    needs = ("text", "words")

    @classmethod
    def sets(cls, mask, options):
        return list(dict.fromkeys([*super().sets(mask, options), "forget"]))  # pictures to find words for

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        self.size = batches.size  # of a step in a round, whatever becomes of it where memory is short
        self.inversion = Inversion(model, batches, options.search_steps, options.search_rate, options.search_batch)
        self.rounds = Rounds(OpenPrompts(model, batches.sets["name"]))

    def state(self):
        return self.rounds.state()

    def load_state(self, state):
        self.rounds.load_state(state)

    def losses(self, forget, retain):
        if not len(self.rounds):
            self._search()
        chances = (uniform(self.batches, forget, "stereo", torch.Size([2])).cpu() + 1) / 2
        told = self._conditions(forget)
        which = (chances[:, 0] * len(told)).long()
        condition = {key: torch.stack([told[n][key][i] for i, n in enumerate(which.tolist())]) for key in told[0]}
        noisy, t = self.half_denoised(forget, condition)
        empty = self.model.repeated(self.model.empty, len(noisy))
        with self.change.at_base(), torch.no_grad():
            nothing = self.predict(noisy, t, empty)
            anchor = self.predict(noisy, t, self._anchors(chances[:, 1]))
            negative = sum(self.predict(noisy, t, one) for one in told) / len(told)
        target = nothing + self.options.anchor_guidance * (anchor - nothing)
        target = target - self.options.negative_guidance * (negative - nothing)
        erased = self.predict(noisy, t, condition)
        return denoising(erased, target), erased.new_zeros(())

    def _conditions(self, forget: Batch) -> list[Condition]:
        """Those of the batch's names, then of the words of each round in their place."""
        rows = self.rounds.prompts.pair_of[forget.index]
        words = [
            {key: self.model.moved(value[rows]) for key, value in found.items()} for found in self.rounds.conditions
        ]
        return [forget.condition, *words]

    def _anchors(self, chances: torch.Tensor) -> Condition:
        """For each chance in [0, 1) one of the anchor's prompts."""
        images = self.batches.sets["forget"]
        rows = images.anchor_index[(chances * len(images)).long()]
        return {key: self.model.moved(value[rows]) for key, value in images.condition.items()}

    def _search(self) -> None:
        """All rounds; the change is then as it was before."""
        accelerator, options, names = self.batches.accelerator, self.options, self.batches.sets["name"]
        with self._tried() as values:
            for number in range(options.rounds):
                adam, steps = torch.optim.Adam(values, lr=options.round_rate), range(options.round_steps)
                title = f"erasing, round {number + 1} of {options.rounds}"
                for step in progress(title, len(steps), "step", accelerator.is_main_process, over=steps):
                    self.change.clear_gradients()
                    key = f"stereo {number}"
                    count = self.size * accelerator.num_processes
                    index = torch.randint(len(names), (count,), generator=self.batches.generator(key, "names", step))
                    for batch in self.batches.micro_batches(names, index, key, step):
                        (self._round_loss(batch) * len(batch.noise) / self.size).backward()
                    self.change.reduce(accelerator)
                    adam.step()
                    self.change.write()
                self.rounds.add(self.inversion.search(number))

    def _round_loss(self, forget: Batch) -> torch.Tensor:
        """ESD's, for the word found last, or the name."""
        condition = self._conditions(forget)[-1]
        noisy, t = self.half_denoised(forget, condition)
        empty = self.model.repeated(self.model.empty, len(noisy))
        with self.change.at_base(), torch.no_grad():
            concept, nothing = self.predict(noisy, t, condition), self.predict(noisy, t, empty)
        target = nothing - self.options.round_guidance * (concept - nothing)
        return denoising(self.predict(noisy, t, condition), target)

    @contextmanager
    def _tried(self) -> Iterator[list[torch.nn.Parameter]]:
        """What an optimizer may move within it, and what is afterwards as before; if it fails, no word is kept."""
        before = {name: value.detach().clone() for name, value in self.change.values.items()}
        try:
            yield list(self.change.values.values())
        except BaseException:
            self.rounds.words.clear()
            self.rounds.conditions.clear()
            raise
        finally:
            with torch.no_grad():
                for name, value in self.change.values.items():
                    value.copy_(before[name])
            self.change.clear_gradients()
            self.change.write()

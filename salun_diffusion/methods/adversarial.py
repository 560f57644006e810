"""Attacks within the training, for the methods that erase what an attack on the erased model finds.

All their randomness comes from the seed, the step and the picture's place in the step's global batch, so that neither a
resumed run nor another number of processes finds anything else.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..models.base import Condition, Model
from ..process import progress
from .base import Batch, Batches

Words = list[torch.Tensor]  # for each text encoder, the token embedding of each concept's word, ``(concepts, width)``


def uniform(batches: Batches, batch: Batch, purpose: str, shape: torch.Size) -> torch.Tensor:
    """Numbers in [-1, 1), ``(batch, *shape)``, each picture's from a generator of its own, where the batch is."""
    drawn = [
        torch.rand(shape, generator=batches.generator(purpose, batch.step, row)) * 2 - 1 for row in batch.rows.tolist()
    ]
    return torch.stack(drawn).to(batch.noise.device)


def embedding_pgd(
    loss: Callable[[torch.Tensor], torch.Tensor],
    embeddings: torch.Tensor,
    start: torch.Tensor,
    radius: float | torch.Tensor,
    steps: int,
    step_size: float,
) -> torch.Tensor:
    """``embeddings + δ`` with ``‖δ‖∞ ≤ radius`` and a low ``loss``: projected gradient descent by signs (Madry et al.,
    ICLR 2018), as RACE's code has it. No entry leaves the range that those of its row have before the attack.

    Args:
        loss: of embeddings; a sum over the rows, so that no row's attack depends on the others.
        embeddings: what is attacked, ``(batch, tokens, width)``.
        start: of δ in units of ``radius``, in [-1, 1], of the same shape; where it is 0, δ stays so.
        radius: the largest change of an entry, or of each row's, ``(batch, 1, 1)``.
        steps: of descent.
        step_size: of one, in units of ``radius``.

    Returns:
        The attacked embeddings, fp32, without a gradient.
    """
    origin, moves = embeddings.detach().float(), start != 0
    floor, ceiling = (bound(origin, (1, 2), keepdim=True) for bound in (torch.amin, torch.amax))
    change = radius * start.float()
    for _ in range(steps):
        attacked = (origin + change).clamp(floor, ceiling).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(attacked), attacked)
        change = (attacked.detach() - step_size * radius * gradient.sign() * moves - origin).clamp(-radius, radius)
    return (origin + change).clamp(floor, ceiling)


class OpenPrompts:
    """The prompts of a set with a place in each for a word that stands for its concept.

    Args:
        model: that encodes them.
        images: the set; what tells a prompt from its anchor's is the concept.
    """

    def __init__(self, model: Model, images: Any):
        both = zip(images.prompt_index.tolist(), images.anchor_index.tolist(), strict=True)
        prompts = [model.opened(*(images.prompts[i] for i in pair)) for pair in both]
        concepts = [number for number, share in enumerate(images.shares) for _ in range(share)]
        pairs = list(zip(prompts, concepts, strict=True))
        self.model, self.pairs = model, list(dict.fromkeys(pairs))  # distinct prompts, each with its concept's number
        place = {pair: i for i, pair in enumerate(self.pairs)}
        self.pair_of = torch.tensor([place[pair] for pair in pairs])  # by picture

    def condition(self, index: torch.Tensor, words: Words) -> Condition:
        """That of the pictures ``index``, with a gradient to the words, where the network is."""
        return self._condition(self.pair_of[index], words)

    @torch.no_grad()
    def encoded(self, words: Words) -> Condition:
        """The conditions of all distinct prompts, on the CPU; :attr:`pair_of` says which is whose."""
        parts = [self._condition(part, words) for part in torch.arange(len(self.pairs)).split(64)]
        return {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}

    def _condition(self, pairs: torch.Tensor, words: Words) -> Condition:
        prompts, concepts = zip(*(self.pairs[i] for i in pairs.tolist()), strict=True)
        return self.model.encode_words(list(prompts), [word[list(concepts)] for word in words])


class Rounds:
    """Words that were found in one round after the other, and the conditions of a set's prompts with them.

    Attributes:
        words: by round.
        conditions: by round, of the distinct ``prompts``, on the CPU.

    Args:
        prompts: None where there are no rounds.
    """

    def __init__(self, prompts: OpenPrompts | None):
        self.prompts, self.words, self.conditions = prompts, [], []

    def __len__(self) -> int:
        return len(self.words)

    def add(self, words: Words) -> None:
        """Those of the next round."""
        self.words.append(words)
        self.conditions.append(self.prompts.encoded(words))

    def state(self) -> dict[str, torch.Tensor]:
        """The words as a checkpoint holds them."""
        return {f"words.{i}.{j}": word for i, words in enumerate(self.words) for j, word in enumerate(words)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Of no rounds, become those of :meth:`state`."""
        rounds: dict[int, Words] = {}
        for name in sorted(state, key=lambda name: [int(part) for part in name.split(".")[1:]]):
            rounds.setdefault(int(name.split(".")[1]), []).append(state[name])
        for words in rounds.values():
            self.add(words)


class Inversion:
    """Textual inversion on the model that is being erased (Gal et al., ICLR 2023, eq. 2).

    It finds for each concept a word with which its pictures in the forget set are predicted best, as concept inversion
    does afterwards (Pham et al., ICLR 2024). The word stands for what tells a prompt of the concept from its anchor's.

    Args:
        model: whose network is attacked.
        batches: with a forget set.
        steps: of AdamW.
        rate: its learning rate.
        size: pictures a step.
    """

    def __init__(self, model: Model, batches: Batches, steps: int, rate: float, size: int):
        self.model, self.batches, self.steps, self.rate, self.size = model, batches, steps, rate, size
        self.prompts = OpenPrompts(model, batches.sets["forget"])

    def search(self, key: object) -> Words:
        """The words found, fp32, on the CPU.

        A word starts at random, where words of the vocabulary are; ``key`` and the seed alone fix what is drawn. All
        processes share a step's pictures.
        """
        batches, accelerator = self.batches, self.batches.accelerator
        random, words, count = batches.generator("words", key), [], len(batches.sets["forget"].shares)
        for table in self.model.word_tables():
            mean, deviation = (part.float().cpu() for part in (table.mean(0), table.std(0)))
            words.append(mean + deviation * torch.randn(count, len(mean), generator=random))
        words = [torch.nn.Parameter(word.to(accelerator.device)) for word in words]
        adam, forget = torch.optim.AdamW(words, lr=self.rate), batches.sets["forget"]
        self.model.move_others(accelerator.device)
        for step in progress(
            "searching words", self.steps, "step", accelerator.is_main_process, over=range(self.steps)
        ):
            noise, t = batches.draw(forget, self.size, "words", key, step)
            index = torch.randint(len(forget), (self.size,), generator=random)
            rows = torch.arange(self.size)[accelerator.process_index :: accelerator.num_processes]
            loss = sum(word.sum() * 0 for word in words)  # a process may have no picture
            if len(rows):
                batch = batches.noised(forget, index[rows], noise[rows], t[rows])
                condition = self.prompts.condition(index[rows], words)
                predicted = self.model.predict(batch.noisy, batch.timesteps, condition)
                loss = loss + (predicted.float() - batch.target.float()).square().sum()
            for word, gradient in zip(words, torch.autograd.grad(loss, words), strict=True):
                word.grad = accelerator.reduce(gradient, "sum")
            adam.step()
        self.model.move_others("cpu")
        return [word.detach().cpu() for word in words]

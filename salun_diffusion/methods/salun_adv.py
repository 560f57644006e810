"""SalUn against attacks: its misaligned-prompt loss on conditions that attacks within the training find.

Our own combination of SalUn (Fan et al., ICLR 2024), RACE's attack on embeddings (ECCV 2024), STEREO's rounds of
inverted tokens (CVPR 2025), and pictures of the concept without its prompt, as text-free attacks draw them.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ..errors import SalunError
from ..models.base import Condition
from ..options import option
from .adversarial import Inversion, Rounds, embedding_pgd, uniform
from .base import Batch
from .losses import denoising, misaligned_prompt
from .salun import SalUn, SalUnOptions


@dataclass(frozen=True)
class SalUnAdvOptions(SalUnOptions):
    """Each part is off at 0. The shares are of a step's pictures of the concept; the rest has the plain prompts."""

    target: str = option(
        "frozen", "whose prediction for the anchor: the base model's, or that of now", ("frozen", "current")
    )
    attacked: float = option(
        0.25, "share under embeddings that projected gradient descent finds from the prompt's", least=0
    )
    attack_goal: str = option(
        "noise", "what the attack makes the model predict: the picture's own noise, what the base model predicts for "
        "the concept, or whatever is farthest from the anchor", ("noise", "concept", "far"),
    )  # fmt: skip
    attack_tokens: str = option(
        "concept", "which embeddings it moves: those of the concept's words and of the end, or all", ("concept", "all")
    )
    radius: float = option(0.5, "how far it moves an entry, in units of the embeddings' own root mean square", least=0)
    attack_steps: int = option(4, "of projected gradient descent", least=1)
    step_size: float = option(0.5, "of one of those, as a share of the radius", least=0)
    inverted: float = option(0.25, "share whose concept is one of the words that textual inversion has found", least=0)
    rounds: int = option(2, "searches for such words, spread evenly over the training; 0 for none", least=0)
    search_steps: int = option(100, "of each search", least=1)
    search_rate: float = option(5e-3, "AdamW's learning rate there", least=0)
    search_batch: int = option(8, "pictures a step there", least=1)
    empty: float = option(0.125, "share under the empty prompt, and of the retain pictures too", least=0)
    unrelated: float = option(0.0, "share under prompts of the retain set", least=0)

    def __post_init__(self):
        super().__post_init__()
        if (total := self.attacked + self.inverted + self.empty + self.unrelated) > 1:
            raise SalunError(
                f"The shares attacked, inverted, empty and unrelated are {total:g} in all: give at most 1."
            )


class SalUnAdv(SalUn):
    """SalUn's loss where the condition of a forget picture is not always its own prompt's.

    The loss is ``E‖ε0(x_t | anchor) − ε(x_t | c)‖² + α · retain`` on noised pictures x_t of the concept. For a share of
    them c is, in place of the plain prompt's embedding,

    - ``attacked``: that embedding, moved within a radius to where the model of now draws the concept again;
    - ``inverted``: the prompt with a word in the concept's place which textual inversion has found on the model as it
      was. ``rounds`` searches part the training into ``rounds + 1`` equal spans, and the words of all stay in use;
    - ``empty`` or ``unrelated``: the empty prompt, or one of the retain set, so that the concept is not left in what
      the network predicts whatever it is asked for. As many retain pictures have the empty prompt, to hold that.

    Pictures of the anchor (``anchored``) have plain prompts.
    """

    title = "SalUn, adversarial"
    Options = SalUnAdvOptions
    needs = ("text", "embeddings")
    phased = True

    @classmethod
    def check_fit(cls, model, options, by):
        super().check_fit(model, options, by)
        if options.inverted and options.rounds:
            model.need(["words"], f"{by} with --inverted above 0")
        if options.attacked and options.attack_tokens == "concept":  # the concept's words are marked where these are
            model.need(["cross-attention"], f"{by} without --attack_tokens all")

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        rounds, self.rounds = options.rounds if options.inverted else 0, Rounds(None)
        self.starts = [batches.max_train_steps * (i + 1) // (rounds + 1) for i in range(rounds)]
        if rounds:
            self.inversion = Inversion(model, batches, options.search_steps, options.search_rate, options.search_batch)
            self.rounds = Rounds(self.inversion.prompts)

    def state(self):
        return self.rounds.state()

    def load_state(self, state):
        self.rounds.load_state(state)

    def retained(self, retain):
        kinds = self._chances(retain, "retained")[:, 0] < self.options.empty
        return replace(retain, condition=self._filled(retain.condition, kinds, self.model.empty))

    def losses(self, forget, retain):
        while len(self.rounds) < sum(start <= forget.step for start in self.starts):
            self.rounds.add(self.inversion.search(len(self.rounds)))
        forget, shown = self.mixed(forget)
        frozen = self.options.target == "frozen"
        with self.change.at_base() if frozen else nullcontext(), torch.no_grad():
            anchor = self.predict(forget.noisy, forget.timesteps, forget.anchor_condition)
        forget = replace(forget, condition=self._told(forget, ~shown, anchor))
        erased, kept = self.predict_both(forget, retain)
        return misaligned_prompt(erased, anchor), denoising(kept, retain.target)

    def _chances(self, batch: Batch, purpose: str) -> torch.Tensor:
        """Two numbers in [0, 1) for each picture."""
        return (uniform(self.batches, batch, purpose, torch.Size([2])).cpu() + 1) / 2

    def _told(self, forget: Batch, concept: torch.Tensor, anchor: torch.Tensor) -> Condition:
        """What the network is told of each picture, in place of its prompt where it shows the ``concept``."""
        options = self.options
        kind, which = self._chances(forget, "kinds").T.contiguous()
        shares = torch.tensor([options.attacked, options.inverted, options.empty, options.unrelated]).cumsum(0)
        kind = torch.where(concept, torch.bucketize(kind, shares, right=True), len(shares))
        condition = forget.condition
        for number, learned in enumerate(self.rounds.conditions):
            rows = (kind == 1) & ((which * len(self.rounds)).long() == number)
            own = self.rounds.prompts.pair_of[forget.index]
            found = {key: self.model.moved(value[own]) for key, value in learned.items()}
            condition = self._filled(condition, rows, found)
        condition = self._filled(condition, kind == 2, self.model.empty)
        kept = self.batches.retain
        prompts = kept.prompt_index[(which * len(kept)).long()]
        others = {key: self.model.moved(value[prompts]) for key, value in kept.condition.items()}
        condition = self._filled(condition, kind == 3, others)
        if (kind == 0).any():
            condition = self._filled(condition, kind == 0, self._attacked(forget, kind == 0, anchor))
        return condition

    def _filled(self, condition: Condition, rows: torch.Tensor, other: Condition) -> Condition:
        """``condition`` with that of ``other`` (a batch of as many, or of one) in some rows, bool ``(batch,)``."""
        if not rows.any():
            return condition
        filled = {}
        for key, value in condition.items():
            where = rows.to(value.device).view(-1, *[1] * (value.ndim - 1))
            filled[key] = torch.where(where, self.model.moved(other[key]).expand_as(value), value)
        return filled

    def _attacked(self, forget: Batch, rows: torch.Tensor, anchor: torch.Tensor) -> Condition:
        """The forget batch's condition, its embeddings attacked in ``rows``, bool ``(batch,)``."""
        options = self.options
        rows = rows.nonzero().flatten().to(forget.noisy.device)
        noisy, t = forget.noisy[rows], forget.timesteps[rows]
        condition = {key: value[rows] for key, value in forget.condition.items()}
        if options.attack_goal == "concept":
            with self.change.at_base(), torch.no_grad():
                goal = self.predict(noisy, t, condition)
        else:
            goal = forget.target[rows] if options.attack_goal == "noise" else anchor[rows]
        sign = -1 if options.attack_goal == "far" else 1

        def loss(tokens: torch.Tensor) -> torch.Tensor:
            predicted = self.predict(noisy, t, self.model.with_embeddings(condition, tokens))
            return sign * (predicted.float() - goal.float()).square().sum()

        tokens = self.model.embeddings(condition)
        start = uniform(self.batches, replace(forget, rows=forget.rows[rows.cpu()]), "attack", tokens.shape[1:])
        if options.attack_tokens == "concept":
            start = start * (forget.tokens["concept"] | forget.tokens["end"])[rows][..., None]
        radius = options.radius * tokens.float().square().mean((1, 2), keepdim=True).sqrt()
        found = embedding_pgd(loss, tokens, start, radius, options.attack_steps, options.step_size)
        whole = self.model.embeddings(forget.condition).index_copy(0, rows, found.to(tokens))
        return self.model.with_embeddings(forget.condition, whole)

"""PIU, the unlearning of an identity in Arc2Face (arXiv 2605.22311, IJCB 2026), by its authors' code."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..options import option
from .base import GradientMethod

NEAR = 0.01  # how far from `likeness` an anchor's may be


@dataclass(frozen=True)
class PIUOptions:
    """The values of the authors' code."""

    likeness: float = option(0.2, "τ: the cosine that the anchor's mean vector has to the person's")
    repulsion: float = option(1.0, "η: how far beyond the anchor's prediction, away from the person's own", least=0)


class PIU(GradientMethod):
    """On pure noise, a person's vectors are to predict what the base model predicts for another person (the anchor),
    and less of what it predicts for them; everyone else's predict what they did.

    The two losses, ε* being the base model's prediction::

        MSE(ε(c_f), ε*(c_a) − η [ε*(c_f) − ε*(c_a)]) + α MSE(ε(c_r), ε*(c_r))

    No picture is drawn. c_f is a mix of the person's vectors, its shares a Dirichlet(1) sample. The anchor is chosen
    once, by the seed, from those whose mean vector has a cosine of ``likeness`` ± 0.01 to the person's; of nobody it
    is the nearest to that. From the authors' code; it leaves open, and is chosen here: a mix is made of length one
    again, as all that the model was told; c_a is the anchor's mean; c_r is one vector of one of the kept people, all
    alike likely; both terms share noise and timesteps, and a step of 32 is one batch (theirs: 2 of 16). Their AdamW
    decays weights by 0.01; nothing is decayed here.
    """

    title = "PIU"
    scope = r"(down_blocks\.2|mid_block|up_blocks\.[12])\..*\.attn2\."  # 4.3% of Stable Diffusion 1.5
    forget_set = "name"
    has_anchor = False  # it chooses its own
    uses_retain = False  # no pictures of the others, but `alpha` counts
    ignores = ("retain_target", "retain_data", "num_retain_images", "anchor")
    settings = {"max_train_steps": 400, "learning_rate": 1e-4, "train_batch_size": 32, "alpha": 10.0}
    Options = PIUOptions
    needs = ("identities", "diffusion")

    def __init__(self, model, options, batches):
        super().__init__(model, options, batches)
        names = batches.sets["name"]
        self.forgotten = [model.person(names.prompts[i]) for i in names.prompt_index]
        self.kept = [name for name in model.people if name not in self.forgotten]
        centroids = {name: model.centroid(name) for name in model.people}
        self.anchors = []
        for name in self.forgotten:
            generator = batches.generator("piu anchor", name)
            anchor = anchor_of(centroids, name, self.kept, options.likeness, generator)
            cosine = float(centroids[name] @ centroids[anchor])
            batches.accelerator.print(f"{name} is to be drawn as {anchor}, at a cosine of {cosine:.2f}.")
            self.anchors.append(centroids[anchor])

    def losses(self, forget, retain):
        drawn = [self._drawn(forget.step, row, i) for row, i in zip(forget.rows.tolist(), forget.index, strict=True)]
        # the encoder's place is the model's business; what it says of the three has no gradient
        told = self.model.encode_vectors(torch.cat([torch.stack(part) for part in zip(*drawn, strict=True)]))
        count = len(drawn)
        noise, t = forget.noise.repeat(3, 1, 1, 1), forget.timesteps.repeat(3)
        with self.change.at_base(), torch.no_grad():
            person, kept, anchor = self.predict(noise, t, told).float().split(count)
        both = {key: value[: 2 * count] for key, value in told.items()}
        found, same = self.predict(noise[: 2 * count], t[: 2 * count], both).float().split(count)
        aim = anchor - self.options.repulsion * (person - anchor)
        return F.mse_loss(found, aim), F.mse_loss(same, kept)

    def _drawn(self, step: int, row: int, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vectors of the person, of somebody who is kept, and of the anchor, for a row of a step's global batch."""
        generator, people = self.batches.generator("piu", step, row), self.model.people
        person = mixed(people[self.forgotten[which]], generator)
        other = people[self.kept[int(torch.randint(len(self.kept), (), generator=generator))]]
        return person, other[torch.randint(len(other), (), generator=generator)], self.anchors[which]


def mixed(vectors: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A mix of a person's ``vectors`` ``(n, width)`` by a Dirichlet(1) sample, of length one, ``(width,)``."""
    shares = torch.empty(len(vectors)).exponential_(generator=generator)  # over their sum, they are one
    return F.normalize(shares @ vectors, dim=0)


def anchor_of(
    centroids: dict[str, torch.Tensor], name: str, others: list[str], likeness: float, generator: torch.Generator
) -> str:
    """One of the ``others`` whose cosine to ``name`` is ``likeness`` ± ``NEAR``, all alike likely, or the nearest.

    Args:
        centroids: everybody's mean vector, of length one, ``(width,)``.
        name: who is forgotten.
        others: who may be drawn instead.
        likeness: the cosine.
        generator: of the choice.
    """
    off = (torch.stack([centroids[other] for other in others]) @ centroids[name] - likeness).abs()
    near = (off < NEAR).nonzero().flatten()
    if not len(near):
        return others[int(off.argmin())]
    return others[near[torch.randint(len(near), (), generator=generator)]]

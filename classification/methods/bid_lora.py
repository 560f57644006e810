"""BID-LoRA (2604.12686): three low-rank adapters, one to keep, one to forget, one to learn new classes, each moved by
its own loss alone, merged in the end. From the LaTeX draft; its λ_ce, λ_emb, scaling and learning rate are not
published, so those here are ours.

h = Wx + (B_r A_r + B_n A_n + B_f A_f) x. With e(x) what the last layer is given, in turn for a batch of each set:

- kept classes, a tenth of the retain set alone: λ_ce CE + λ_emb MSE(e, e of the source), and the kept classes' rows of
  the last layer move;
- forgotten classes: MSE(e, α d), d = argmin over ‖d‖ = 1 of max_i d·c_i for the kept classes' mean embeddings c_i; the
  last layer gets no gradient of it, and all that is forgotten ends at one point, so in one class;
- new classes, if there are any: CE, and their rows move.

As published, attention layers have the adapters; a model without attention has them on its convolutions and linear
layers, the last apart, which is our adaptation. There e comes out of a ReLU, and the escape point, whose coordinates
are mostly negative, is beyond its reach: the forgotten end near 0. Batch-norm's statistics stay.
"""

import math
import warnings
from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm

from salun_diffusion.errors import SalunError

from ..data import Pictures, spread
from ..training import EVALUATION_BATCH, inputs, seeded
from .boundary import last_layer
from .damp import prototypes
from .task import Task

RANKS = {"retain": 8, "forget": 4, "new": 8}  # as published
REPLAY = 0.1  # the share of the retain set that is used, as published
CE, EMBEDDING = 1.0, 1.0  # λ_ce and λ_emb
ESCAPE_STEPS = 2000


def bid_lora(task: Task) -> None:
    """Nothing new is learnt: two adapters. ``alpha`` is λ_esc, the escape point's distance from 0."""
    adapt(task)


def replayed(pictures: Pictures) -> Pictures:
    """The tenth that may be used, of each class its share."""
    rows = spread(pictures.labels.cpu(), math.ceil(REPLAY * len(pictures)))
    return pictures[rows.to(pictures.labels.device)]


def adapt(task: Task, new: Pictures | None = None) -> None:
    """Forget ``task.forget``, keep a tenth of ``task.retain``, learn ``new``.

    Raises:
        SalunError: a model with nothing but a last layer.
    """
    name, head = last_layer(task.model, task.classes)
    sets = {"retain": replayed(task.retain), "forget": task.forget} | ({"new": new} if new else {})
    source = deepcopy(task.model.eval()).requires_grad_(False)
    embed, taught = Embedding(task.model, head), Embedding(source, source.get_submodule(name))
    centres = prototypes(torch.cat([taught(pixels)[1] for pixels in _inputs(sets["retain"])]), sets["retain"].labels)
    target = task.settings.alpha * escape(centres, task.generator)

    def retain_loss(pixels, labels):
        answers, found = embed(pixels)
        return CE * F.cross_entropy(answers, labels) + EMBEDDING * F.mse_loss(found, taught(pixels)[1])

    def forget_loss(pixels, labels):
        found = embed(pixels)[1]
        return F.mse_loss(found, target.expand_as(found))

    def new_loss(pixels, labels):
        return F.cross_entropy(embed(pixels)[0], labels)

    tuned = _with_adapters(task, [*sets], adapted(task.model, name))
    head.requires_grad_(True)
    with warnings.catch_warnings():
        # peft merges attention's adapters for every pass, and says of each but the first that there was one before
        warnings.filterwarnings("ignore", "Already following adapters were merged")
        _train(task, tuned, head, sets, {"retain": retain_loss, "forget": forget_loss, "new": new_loss})
        tuned.merge_and_unload(adapter_names=[*sets])
    task.model.requires_grad_(True).eval()


def _with_adapters(task: Task, parts: list[str], layers: list[str]) -> nn.Module:
    """The model with an adapter for each part on ``layers``, and nothing else that moves."""
    configs = {part: LoraConfig(r=RANKS[part], lora_alpha=RANKS[part], target_modules=layers) for part in parts}
    with seeded(int(torch.randint(2**31, (), generator=task.generator))):
        tuned = get_peft_model(task.model, configs[parts[0]], parts[0])
        for part in parts[1:]:
            tuned.add_adapter(part, configs[part])
    return tuned.eval()


def _train(task: Task, tuned: nn.Module, head: nn.Linear, sets: dict[str, Pictures], losses: dict) -> None:
    """A step of each part in turn, on its own adapter and its own classes' rows of the last layer."""
    optimisers = {part: _optimiser(task, tuned, part, head) for part in sets}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, task.settings.epochs) for each in optimisers.values()]
    rows = {part: _rows(pictures, task.classes) for part, pictures in sets.items()}
    for _ in tqdm(range(task.settings.epochs), desc=task.title, unit="epoch", leave=False):
        for turn in together({part: [*task.batches(pictures)] for part, pictures in sets.items()}):
            for part, (pixels, labels) in turn.items():
                # all work; but for attention peft lets the gradient through to the last of them alone
                tuned.base_model.set_adapter([*(other for other in sets if other != part), part])
                tuned.zero_grad()
                losses[part](pixels, labels).backward()
                for weight in head.parameters():
                    if weight.grad is not None:
                        weight.grad[~rows[part]] = 0
                optimisers[part].step()
        for schedule in schedules:
            schedule.step()


class Embedding:
    """Pictures → the model's answers, ``(n, classes)``, and what its last layer was given, ``(n, width)``."""

    def __init__(self, model: nn.Module, head: nn.Linear):
        self.model, self.head = model, head

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = []
        hook = self.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            return self.model(pixels), seen[0]
        finally:
            hook.remove()


def escape(centres: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The direction that is farthest from all: argmin over ‖d‖ = 1 of max_i d·c_i, from a random start by steps against
    the nearest centre that grow shorter.

    Args:
        centres: fp32 ``(classes, width)``.
        generator: on the CPU; it draws the start.

    Returns:
        fp32 ``(width,)``; the best that was met.
    """
    unit = centres / centres.norm(dim=1).max().clamp(min=1e-12)
    d = F.normalize(torch.randn(centres.shape[1], generator=generator).to(centres), dim=0)
    best, least = d, float("inf")
    for step in range(ESCAPE_STEPS):
        reach = unit @ d
        if reach.max() < least:
            best, least = d, float(reach.max())
        d = F.normalize(d - unit[reach.argmax()] / (1 + step) ** 0.5, dim=0)
    return best


def adapted(model: nn.Module, head: str) -> list[str]:
    """The names of the layers that get adapters.

    Raises:
        SalunError: there is none before the last.
    """
    modules = dict(model.named_modules())
    attention = [name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    found = attention or [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    if found in ([], [head]):
        raise SalunError("BID-LoRA adapts the layers before the last, and this model has none: leave it out.")
    return [name for name in found if name != head]


def together(parts: dict[str, list]) -> Iterator[dict[str, tuple]]:
    """A batch of each, over the longest; the others begin again."""
    for number in range(max(map(len, parts.values()))):
        yield {part: each[number % len(each)] for part, each in parts.items()}


def _inputs(pictures: Pictures) -> Iterator[torch.Tensor]:
    return (inputs(images) for images in pictures.images.split(EVALUATION_BATCH))


def _rows(pictures: Pictures, classes: int) -> torch.Tensor:
    """Bool ``(classes,)``, true for those that there are pictures of."""
    found = torch.zeros(classes, dtype=torch.bool, device=pictures.labels.device)
    found[pictures.labels] = True
    return found


def _optimiser(task: Task, tuned: nn.Module, part: str, head: nn.Linear) -> torch.optim.Optimizer:
    """AdamW on one adapter, and on the last layer without decay, which would move the rows that others own."""
    mine = [weight for name, weight in tuned.named_parameters() if f".{part}." in name and ".lora_" in name]
    s, rows = task.settings, [] if part == "forget" else [{"params": [*head.parameters()], "weight_decay": 0.0}]
    return torch.optim.AdamW([{"params": mine}, *rows], s.learning_rate, weight_decay=s.weight_decay)

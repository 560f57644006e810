"""What every unlearning method has; a new one subclasses :class:`GradientMethod` or :class:`ClosedForm` in a file of
its own and gets a line in ``METHODS``. Data, masks, checkpoints, the delta file and the evaluation come with that.

A method sees the model, its own options, the batches and the change: never the trainer that calls it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..models.base import Condition, Model
from ..options import assigned
from . import NEEDS_DRAWING, NEEDS_SALIENCY

NEEDS_RETAIN = ("alpha", "retain_target", "retain_data", "num_retain_images")
NEEDS_TRAINING = (
    "learning_rate", "lr_scheduler", "max_train_steps", "train_batch_size", "validation_steps", "alpha",
    "retain_target", "retain_data", "gradient_accumulation_steps", "auto_batch_size", "gradient_checkpointing",
    "quantize_frozen", "offload",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to", "num_inference_steps",
    "condition_dropout",
)  # fmt: skip


@dataclass
class Batch:
    """Noised pictures of one set: ``noisy``, ``noise`` and ``target`` ``(batch, channels, height, width)``,
    ``timesteps`` ``(batch,)``, and the prompts' ``condition``. In a forget batch also that of the anchor prompts, and
    which ``tokens`` are the "concept" and which the "end" of the prompt, bool ``(batch, sequence)``.

    ``dropped`` says whose condition is left out, bool ``(batch,)``, or None for no one's.

    ``step`` counts the steps of the training from 0; ``rows`` are the places of the pictures in the step's global
    batch, whatever processes and accumulation make of that, and ``index`` those in their set. ``noisy`` and ``target``
    are unused for sets of names.
    """

    noisy: torch.Tensor
    noise: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    condition: Condition
    anchor_condition: Condition | None
    tokens: dict[str, torch.Tensor]
    step: int
    index: torch.Tensor
    rows: torch.Tensor
    dropped: torch.Tensor | None = None


class Change(Protocol):
    """What a method may do with the change that is trained (``MaskedChange`` or ``AdapterChange`` of
    :mod:`salun_diffusion.training`).
    """

    values: dict[str, torch.nn.Parameter]  # what an optimizer moves, fp32

    def clear_gradients(self) -> None:
        """Drop what an earlier backward left in the gradients of :attr:`values`."""

    def reduce(self, accelerator: Any) -> None:
        """Replace those gradients by the processes' mean."""

    def write(self) -> None:
        """Give the network what :attr:`values` are by now."""

    def deltas(self) -> dict[str, torch.Tensor]:
        """By parameter, the change of the weights that may move, fp32, with a gradient: packed row-major, or whole."""

    def at_base(self) -> AbstractContextManager:
        """Within it, the network has the base model's weights."""

    def packed(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        """What ``dense``, of the parameter's shape, holds for the weights that may move, as :meth:`deltas` has them."""


class Batches(Protocol):
    """What a method may ask of the sets (:class:`salun_diffusion.training.batches.Batches`)."""

    sets: dict[str, Any]  # by kind
    retain: Any  # the retain set, or None
    seed: int
    size: int  # pictures of each set at once
    num_inference_steps: int
    drawing: dict[str, Any]  # how the run draws: what ``Model.draw`` is given beside the rows
    max_train_steps: int
    accelerator: Any

    def generator(self, *key: Any) -> torch.Generator:
        """Random numbers on the CPU that depend on the seed and ``key`` alone."""

    def noised(
        self, images: Any, index: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, step: int = 0,
        dropped: torch.Tensor | None = None,
    ) -> Batch:  # fmt: skip
        """The pictures ``index`` of a set with ``noise`` at timesteps ``t``, the condition left out of those
        ``dropped``.
        """

    def draw(self, images: Any, count: int, *key: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` noises and timesteps that depend on the seed and ``key`` alone."""

    def micro_batches(self, images: Any, index: torch.Tensor, name: str, step: int) -> Iterator[Batch]:
        """This process's share of the pictures ``index`` of a set, noised, in parts that fit; ``name`` and ``step`` are
        the key of their noise.
        """

    def cached(self, kind: str, settings: dict, make: Any) -> dict[str, torch.Tensor]:
        """The tensors that ``make`` gives, from the cache if it holds some of these ``settings``."""


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none of its own."""


class Method:
    """What holds unless the user, or the concept's preset, says otherwise."""

    title: str  # for tables
    component: str | None = None  # the network that is edited (models.load.COMPONENTS); None for the denoiser
    scope = "cross-attention"  # which weights of it may move (models.scopes)
    mask = "none"  # or "saliency"
    adapter: str | None = None  # the kind that it trains, whatever the user says (config.ADAPTERS) …
    rank: int | None = None  # … and its rank, unless the user gives another
    settings: dict[str, Any] = {}  # of EraseConfig: what the paper used, where it is not the general default
    Options: type = NoOptions  # the method's own options: a dataclass of `option` fields
    needs: tuple[str, ...] = ()  # capabilities of the model (models.base.CAPABILITIES)
    forget_set = "forget"  # what forget batches are of: pictures of the concept, of its "anchor", or its "name" alone
    has_anchor = True  # whether the concept is to be drawn as its anchor
    uses_retain = True  # whether it has a retain term
    ignores: tuple[str, ...] = ()  # settings that it has no use for: giving one is an error
    closed_form = False
    sparse = False  # of a closed form: whether it changes single weights, which are then all that the file holds
    guard: type | None = None  # what it makes in place of new weights (methods/guard.py)
    phased = False  # whether what a step does depends on how many there are in all

    @classmethod
    def sets(cls, mask: str | None, options: Any) -> list[str]:
        """The sets of pictures that a run with ``mask`` and these ``options`` of :attr:`Options` needs."""
        wanted = [
            cls.forget_set,
            *(["forget"] if mask == "saliency" else []),
            *(["retain"] if cls.uses_retain else []),
        ]
        return list(dict.fromkeys(wanted))

    @classmethod
    def unused(cls, mask: str | None, options: Any) -> list[str]:
        """The settings that a run with ``mask`` and these ``options`` has no use for."""
        sets = cls.sets(mask, options)
        return [
            *cls.ignores,
            *(NEEDS_SALIENCY if mask != "saliency" else ()),
            *(["forget_data"] if "forget" not in sets else []),
            *(["num_forget_images", *NEEDS_DRAWING] if sets == ["name"] else []),
            *(NEEDS_DRAWING if not sets else ()),
        ]

    @classmethod
    def check_fit(cls, model: Model, options: Any, by: str) -> None:
        """Pass if ``model`` has what the method needs with these ``options``.

        Args:
            model: the base model.
            options: of :attr:`Options`.
            by: who needs it, for the message: "--method salun".

        Raises:
            SalunError: it has not.
        """
        model.need(cls.needs, by)

    @classmethod
    def by_prompt(cls, options: Any) -> bool:
        """Whether its adapter is to be scaled by how near each prompt is to the concept's names."""
        return False

    @classmethod
    def check_scope(cls, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Pass if the method can change ``parameters``, those of the scope, by name; asked before pictures are drawn.

        Raises:
            SalunError: it cannot.
        """

    @classmethod
    def parse(cls, given: list[str]) -> Any:
        """:attr:`Options` with those ``NAME=VALUE`` put in that were ``given``; the last one of a name counts.

        Raises:
            SalunError: a name that the method lacks, or a value of another type.
        """
        return assigned(cls.Options, given, "--method_option ", "this method")


class GradientMethod(Method):
    """A method that trains: it gives the two losses of a step, and the trainer minimises ``forget + alpha · retain``.

    It is made once, before the saliency and the training, when the network still has the base model's weights.

    Args:
        model: whose network is edited.
        options: of the class's ``Options``.
        batches: the sets, and what the seed fixes.
    """

    change: Change
    own: dict[str, torch.nn.Parameter] = {}  # what trains beside the change and is not kept, by name, fp32 …
    own_rate = 0.0  # … and its learning rate, which falls as the change's does

    def __init__(self, model: Model, options: Any, batches: Batches):
        self.model, self.options, self.batches = model, options, batches
        self.predict = model.predict

    def begin(self, change: Change) -> None:
        """Called once before the first step, with the change that is trained (still zero)."""
        self.change = change

    def told(self, batch: Batch, images: Any) -> Condition:
        """What the network is told of a ``batch`` of the set ``images`` in the saliency's loss, with a gradient to what
        is trained, where that makes it.
        """
        return batch.condition

    def nothing(self) -> Condition:
        """The empty prompt's condition there, a batch of one."""
        return self.model.empty

    def retained(self, retain: Batch) -> Batch:
        """The retain batch as the method wants it; called before the base model's predictions become its target."""
        return retain

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold besides the change, for a method that finds something on its way."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from :meth:`state`; called after :meth:`begin`, with the trained weights in place."""

    def predict_both(self, forget: Batch, retain: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions for a forget and a retain batch by their own conditions, in one call."""
        condition = {key: torch.cat([forget.condition[key], retain.condition[key]]) for key in forget.condition}
        noisy, t = (torch.cat(pair) for pair in ((forget.noisy, retain.noisy), (forget.timesteps, retain.timesteps)))
        return self.predict(noisy, t, condition).split([len(forget.noisy), len(retain.noisy)])

    def losses(self, forget: Batch, retain: Batch | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scalars, each a mean over its batch; the second is 0 where ``uses_retain`` is false (``retain`` is then
        None).
        """
        raise NotImplementedError

    def close(self) -> None:
        """Leave the network as it was found, but for its weights."""


class ClosedForm(Method):
    """A method that computes the new weights itself, where others are trained: from prompts alone, unless its
    :meth:`sets` name pictures.

    Args:
        model: whose network is edited; it is in eval mode.
        options: of the class's ``Options``.
        batches: the sets, and what the seed fixes.
    """

    closed_form = True
    scope = "cross-attention-kv"
    uses_retain = False
    ignores = NEEDS_TRAINING

    @classmethod
    def sets(cls, mask: str | None, options: Any) -> list[str]:
        return []

    def __init__(self, model: Model, options: Any, batches: Batches):
        self.model, self.options, self.batches = model, options, batches

    def solve(
        self, parameters: dict[str, torch.nn.Parameter], pairs: list[list[tuple[str, str]]], kept: list[str]
    ) -> dict[str, torch.Tensor]:
        """The new values of ``parameters``, by name, float32, on the CPU. The network is left as it was found.

        Args:
            parameters: those of the scope, at the base model's weights.
            pairs: for each concept its prompts, and the anchor's wording of each; distinct.
            kept: distinct prompts that must be drawn as before.
        """
        raise NotImplementedError

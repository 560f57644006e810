"""What every unlearning method has; a new one subclasses :class:`Gradient` or :class:`ClosedForm` in a file of its own
and gets a line in ``METHODS``. Data, masks, checkpoints, the delta file and the evaluation come with that."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SalunError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..concepts.concept import Concept
    from ..config import EraseConfig
    from ..training.batches import Batch
    from ..training.trainer import Trainer

NEEDS_RETAIN = ("alpha", "retain_target", "retain_data", "num_retain_images")
NEEDS_TRAINING = (
    "learning_rate", "lr_scheduler", "max_train_steps", "train_batch_size", "validation_steps",
    "alpha", "retain_target", "retain_data",
)  # fmt: skip


class Method:
    """What holds unless the user, or the concept's preset, says otherwise."""

    title: str  # for tables
    scope = "cross-attention"  # which weights may move (masks.scope.SCOPES)
    mask = "none"  # or "saliency"
    settings: dict[str, Any] = {}  # of EraseConfig: what the paper used, where it is not the general default
    options: dict[str, Any] = {}  # for --method_option: a number, a text, or a tuple of words, of which one is taken
    forgets = "forget"  # the set that forget batches are of: pictures of the concept, of its "anchor", or its "name"
    anchored = True  # whether the concept is to be drawn as its anchor
    retains = True  # whether it has a retain term
    unused: tuple[str, ...] = ()  # settings that mean nothing to it: naming one is an error
    closed_form = False

    @classmethod
    def sets(cls, mask: str | None) -> list[str]:
        """The sets of pictures that a run with ``mask`` needs."""
        wanted = [cls.forgets, *(["forget"] if mask == "saliency" else []), *(["retain"] if cls.retains else [])]
        return list(dict.fromkeys(wanted))

    @classmethod
    def chosen(cls, given: Iterable[str]) -> dict[str, Any]:
        """``options`` with those ``NAME=VALUE`` put in that were ``given``.

        Raises:
            SalunError: a name that the method lacks, or a value of another type.
        """
        found = {name: own[0] if isinstance(own, tuple) else own for name, own in cls.options.items()}
        for text in given:
            name, _, value = text.partition("=")
            if name not in found:
                listed = ", ".join(f"{name}={own}" for name, own in found.items()) or "none"
                raise SalunError(f"--method_option {text}: this method has no option '{name}'. Its own: {listed}.")
            own = cls.options[name]
            if isinstance(own, tuple) and value not in own:
                raise SalunError(f"--method_option {text}: choose one of {', '.join(own)}.")
            try:
                found[name] = value if isinstance(own, tuple) else type(own)(value)
            except ValueError:
                raise SalunError(f"--method_option {text}: '{value}' must be of type {type(own).__name__}.") from None
        return found


class Gradient(Method):
    """A method that trains: it gives the two losses of a step, and the trainer minimises ``forget + alpha · retain``.

    It is made once, before the saliency and the training, when the network still has the base model's weights.
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        self.predict = trainer.predict
        self.chose = self.chosen(trainer.config.method_option)

    def losses(self, forget: "Batch", retain: "Batch | None") -> tuple[torch.Tensor, torch.Tensor]:
        """Scalars, each a mean over its batch; the second is 0 where ``retains`` is false (``retain`` is then None)."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the network as it was found, but for its weights."""


class ClosedForm(Method):
    """A method that computes the new weights from prompts alone."""

    closed_form = True
    scope = "cross-attention-kv"
    retains = False
    unused = NEEDS_TRAINING

    @classmethod
    def sets(cls, mask: str | None) -> list[str]:
        return []

    def __init__(self, config: "EraseConfig"):
        self.config = config
        self.chose = self.chosen(config.method_option)

    def solve(
        self, pipe: "DiffusionPipeline", parameters: dict[str, torch.nn.Parameter], concepts: "list[Concept]"
    ) -> dict[str, torch.Tensor]:
        """The new values of ``parameters``, by name, float32."""
        raise NotImplementedError

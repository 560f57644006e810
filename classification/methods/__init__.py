"""The unlearning methods: one paper a file, and one row of ``METHODS`` a method.

The row is all that a method is registered with: the command line's list, what a configuration may name, the table's
titles, the default settings, masks and tuning follow from it. A new method is a file in this folder and a row here. No
torch is imported until a method is called, so that ``--help`` answers at once.

The defaults are the published ones where there are such (CIFAR-10, ResNet-18, 10% forgotten at random).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .task import Task


TRAINING = ("epochs", "learning_rate", "batch_size", "momentum", "weight_decay", "augment")


@dataclass(frozen=True)
class Method:
    """A row: ``METHODS[name](task)`` changes ``task.model`` in place.

    Attributes:
        title: as the table and the plots call it.
        function: "module.function" within this folder.
        description: what it does, in half a sentence.
        paper: authors and year.
        defaults: where its settings differ from those of :class:`classification.methods.task.Settings`.
        settings: those of them that it reads; a configuration that names another is refused.
        takes_mask: whether ``unlearn --mask FILE`` may replace the mask that it would make.
        tuned: the one setting that ``tune`` chooses.
        last_layer: whether it needs a model that ends in a linear layer of classes.
        whole_classes: whether it can forget whole classes alone; ``all`` leaves it out elsewhere.
    """

    title: str
    function: str
    description: str
    paper: str = ""
    defaults: dict = field(default_factory=dict)
    settings: tuple[str, ...] = TRAINING
    takes_mask: bool = False
    tuned: Literal["learning_rate", "alpha"] = "learning_rate"
    last_layer: bool = False
    whole_classes: bool = False

    def __call__(self, task: "Task") -> None:
        """Unlearn: run the function on ``task``, whose ``model`` changes in place or is replaced."""
        self.load()(task)

    def load(self) -> Callable[["Task"], None]:
        """The function, imported."""
        module, _, name = self.function.rpartition(".")
        return getattr(import_module(f".{module}", __name__), name)


METHODS: dict[str, Method] = {
    "retrain": Method("Retrain", "retrain.retrain", "the retain set alone, from nothing", settings=()),
    "ft": Method("FT", "finetune.finetune", "goes on with the retain set", "Warnecke et al. 2021"),
    "rl": Method(
        "RL", "random_label.random_label", "random labels for the forget set, then the retain set, in each epoch",
        "Golatkar et al. 2020",
    ),
    "ga": Method(
        "GA", "gradient_ascent.gradient_ascent", "climbs the forget set's loss", "Thudi et al. 2022",
        {"learning_rate": 1e-4, "epochs": 5},
    ),
    "iu": Method(
        "IU", "influence.influence", "one Newton step against the forget set's influence",
        "Koh & Liang 2017, Izzo et al. 2021", {"alpha": 10.0}, ("alpha",), tuned="alpha",
    ),
    "be": Method(
        "BE", "boundary.boundary_expanding", "teaches the forget set one more class, then removes it",
        "Chen et al. 2023", {"learning_rate": 1e-4}, last_layer=True,
    ),
    "bs": Method(
        "BS", "boundary.boundary_shrink", "teaches the forget set the answers to its pictures moved by FGSM",
        "Chen et al. 2023", {"learning_rate": 1e-4},
    ),
    "l1_sparse": Method(
        "l1-sparse", "finetune.l1_sparse", "FT with an ℓ1 penalty that decays to nothing", "Jia et al. 2023",
        {"alpha": 1e-4}, (*TRAINING, "alpha"), tuned="alpha",
    ),
    "salun": Method(
        "SalUn", "salun.salun", "RL, but only the weights salient for the forget set may move", "Fan et al. 2024",
        {"learning_rate": 0.013}, (*TRAINING, "density"), takes_mask=True,
    ),
    "salun_soft": Method(
        "SalUn-soft", "salun.salun_soft", "RL, with the smallest changes shrunk to nothing after each step",
        "Fan et al. 2024", {"learning_rate": 0.013}, (*TRAINING, "density"),
    ),
    "neggrad_plus": Method(
        "NegGrad+", "gradient_ascent.neggrad_plus",
        "climbs the forget set's loss while descending the retain set's", "Kurmanji et al. 2023", {"alpha": 0.95},
        (*TRAINING, "alpha"),
    ),
    "ieu": Method(
        "IEU", "ieu.ieu", "NegGrad+ with a capped ascent, and noise on the weights", "2604.09391, reconstructed",
        {"alpha": 0.5, "momentum": 0.0}, (*TRAINING, "alpha"),
    ),
    "mcu": Method(
        "MCU", "mode_connectivity.mode_connectivity", "the best point of a curve learnt from the source to RL's model",
        "2505.10859", {"alpha": 0.2}, (*TRAINING, "alpha"),
    ),
    "damp": Method(
        "DAMP", "damp.damp", "projects the class's own directions out of each layer's input",
        "2604.15166, reconstructed", {"alpha": 1.0}, ("alpha",), tuned="alpha", whole_classes=True,
    ),
    "sisa": Method(
        "SISA", "sisa.sisa", "networks that share the classes; the one of the class goes back to before it",
        "2604.27804", {"epochs": 80, "alpha": 0.43}, (*TRAINING, "alpha"), tuned="alpha", whole_classes=True,
    ),
    "bid_lora": Method(
        "BID-LoRA", "bid_lora.bid_lora", "one low-rank adapter draws the class to a far point, one holds the others",
        "2604.12686", {"epochs": 50, "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 0.01, "alpha": 10.0},
        ("epochs", "learning_rate", "batch_size", "weight_decay", "augment", "alpha"), last_layer=True,
        whole_classes=True,
    ),
    "bias_shift": Method(
        "BiasShift", "head.bias_shift", "lowers the class's bias in the last layer", "2605.08730", {"alpha": 10.0},
        ("alpha",), tuned="alpha", last_layer=True, whole_classes=True,
    ),
    "ts_bgrm": Method(
        "TS-BGRM", "head.ts_bgrm", "GA in the last layer alone, then one pass of the retain set",
        "2605.08730", {"epochs": 8, "weight_decay": 1e-4},
        ("epochs", "learning_rate", "batch_size", "weight_decay", "augment"), last_layer=True, whole_classes=True,
    ),
    "lb_hr": Method(
        "LB-HR", "head.lb_hr", "the retain set in the last layer alone, its biases held above a floor", "2605.08730",
        {"learning_rate": 0.1, "alpha": 1.0}, (*TRAINING, "alpha"), last_layer=True, whole_classes=True,
    ),
}  # fmt: skip

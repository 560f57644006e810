"""The unlearning methods, one paper a file: ``METHODS`` maps a name to a function that changes ``task.model`` in place,
and ``DEFAULTS`` to where its settings differ from those of :class:`Settings`.

The defaults are the published ones where there are such (CIFAR-10, ResNet-18, 10% forgotten at random).
"""

from collections.abc import Callable

from .boundary import boundary_expanding, boundary_shrink
from .finetune import finetune, l1_sparse
from .gradient_ascent import gradient_ascent, neggrad_plus
from .influence import influence
from .random_label import random_label
from .retrain import retrain
from .salun import salun, salun_soft
from .task import Settings, Task

METHODS: dict[str, Callable[[Task], None]] = {
    "retrain": retrain,
    "ft": finetune,
    "rl": random_label,
    "ga": gradient_ascent,
    "iu": influence,
    "be": boundary_expanding,
    "bs": boundary_shrink,
    "l1_sparse": l1_sparse,
    "salun": salun,
    "salun_soft": salun_soft,
    "neggrad_plus": neggrad_plus,
}

TITLES = {
    "retrain": "Retrain", "ft": "FT", "rl": "RL", "ga": "GA", "iu": "IU", "be": "BE", "bs": "BS",
    "l1_sparse": "l1-sparse", "salun": "SalUn", "salun_soft": "SalUn-soft", "neggrad_plus": "NegGrad+",
}  # fmt: skip

DEFAULTS: dict[str, dict] = {
    "ga": {"learning_rate": 1e-4, "epochs": 5},
    "iu": {"alpha": 10.0},
    "be": {"learning_rate": 1e-4},
    "bs": {"learning_rate": 1e-4},
    "l1_sparse": {"alpha": 1e-4},
    "salun": {"learning_rate": 0.013},
    "salun_soft": {"learning_rate": 0.013},
    "neggrad_plus": {"alpha": 0.95},
}

__all__ = ["DEFAULTS", "METHODS", "TITLES", "Settings", "Task"]

"""Attacks on an erasure, one paper a file: a new one is a file and a line in ``ATTACKS``.

An attack's file says ``ABOUT`` (an :class:`About`), ``Options`` (a dataclass of ``option`` fields whose defaults are
the published ones), ``SMALL`` (those of ``--budget small``), and

- ``attack(target, cases, options, learned)``, which attacks several prompts at once and returns an
  :class:`~.target.Outcome` for each, in their order: its last picture is the one that is judged;
- where something is learned once for a model, not for each prompt: ``learn(target, options)``, the
  :class:`~.target.Learned` tensors that ``attack`` is then given (an empty one otherwise).

It sees the model through :class:`~.target.Target` alone. Nothing heavy is imported at its top but torch.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from salun_diffusion.errors import SalunError
from salun_diffusion.options import assigned

ATTACKS = (  # in the order of tables
    "concept_inversion",
    "soft_prompt",
    "unlearndiffatk",
    "ring_a_bell",
    "mma",
    "tina",
    "noise_probe",
    "p4d",
    "p4d_k",
    "completion",
    "inpainting",
    "image_guided",
    "quantize",
    "prune",
    "finetune",
    "scale",
)
PLAIN = "plain"  # the set of the prompts as they are
BUDGETS = ("small", "published")


@dataclass(frozen=True)
class About:
    """What tables and pages say of an attack.

    Attributes:
        title: what it is called for readers.
        paper: whose it is.
        protocol: its name and version, and in words what was done: to quote beside the number.
        access: what the attacker has, such as "white box".
        pictures: whether it learns from pictures of the concept that are not the attacked prompts' own.
        sees_base: whether it may ask the base model, the erasure taken off.
        redraws: it is given the very picture of the concept that it then draws, so that a model that never knew the
            concept may do as well.
        keeps_plain: a prompt that shows the concept as it is counts as won, and is not attacked.
    """

    title: str
    paper: str
    protocol: str
    access: str
    pictures: bool = False
    sees_base: bool = False
    redraws: bool = False
    keeps_plain: bool = False


def find_attack(name: str) -> ModuleType:
    """The module of a name in ``ATTACKS``, imported now."""
    return import_module(f".{name}", __name__)


def chosen_options(names: list[str], budget: str, given: list[str]) -> dict[str, Any]:
    """Attack → its options: the budget's, with what was ``given`` as NAME.KEY=VALUE put in.

    Raises:
        SalunError: an option of an attack that is not among ``names``, or that it has not.
    """
    own: dict[str, list[str]] = {name: [] for name in names}
    for text in given:
        name, dot, rest = text.partition(".")
        if not dot or name not in own:
            raise SalunError(
                f"--attack_option {text}: write ATTACK.NAME=VALUE, of one of the attacks that are run "
                f"({', '.join(names)})."
            )
        own[name].append(rest)
    found = {}
    for name, words in own.items():
        module = find_attack(name)
        small = [f"{key}={value}" for key, value in (module.SMALL if budget == "small" else {}).items()]
        found[name] = assigned(module.Options, [*small, *words], f"--attack_option {name}.", f"{name}")
    return found

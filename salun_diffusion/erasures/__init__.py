"""Erasures, one kind a file: what a kind must have is in ``base.py``, and ``KINDS`` says which there are."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..tensors import read_metadata

if TYPE_CHECKING:
    from .base import Erasure

KINDS = {  # by the format that a file's metadata names
    "salun-delta": "salun_diffusion.erasures.weights.MaskedWeights",
    "salun-lora": "salun_diffusion.erasures.lora.LowRankAdapter",
    "salun-guard": "salun_diffusion.erasures.guard.WornGuard",
}


def load(path: Path) -> "Erasure":
    """The erasure in a safetensors file, of the kind that its metadata names.

    Raises:
        SalunError: no such file, a damaged one, or one of no known kind.
    """
    named = read_metadata(path).get("format")
    module, kind = KINDS.get(named, KINDS["salun-delta"]).rsplit(".", 1)  # the delta's reader says what is wrong
    return getattr(import_module(module), kind).load(path)

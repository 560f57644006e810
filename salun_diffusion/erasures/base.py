"""What a pipeline can wear, whatever it is made of: masked weights, low-rank adapters, or guards that change no
weight. A new kind is a subclass of :class:`Erasure` in a file of its own and a line in ``KINDS``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..models.load import component


class Erasure:
    """One erasure, read from its file.

    Attributes:
        FORMAT: what the file's metadata calls its ``format``.
        metadata: what the file says of itself: concept, method, density, base_model …
        component: the network of the pipeline that it goes onto (``models.load.COMPONENTS``); None for the denoiser.
        in_weights: whether it acts in the denoiser's layers: then it can be fused with them, and a saved denoiser's
            config tells of it.
        unfusable: why no weights can hold it even so, for messages; "" if they can.
    """

    FORMAT: str
    in_weights = True
    unfusable = ""
    metadata: dict
    component: str | None = None

    @classmethod
    def load(cls, path: Path) -> "Erasure":
        """Read a file.

        Raises:
            SalunError: it is damaged, or of another format.
        """
        raise NotImplementedError

    def network(self, pipe) -> nn.Module:
        """The network of ``pipe`` that it goes onto.

        Raises:
            SalunError: the pipeline has none of that name.
        """
        return component(pipe, self.component)

    def digest(self) -> str:
        """SHA-256 (hex) of all that it does to a pipeline, whatever file it came from."""
        raise NotImplementedError

    def is_same(self, other: "Erasure") -> bool:
        """Whether their digests are equal; a kind may know a quicker way to tell."""
        return self.digest() == other.digest()

    def check_fit(self, pipe, path: Path, check_base: bool, applied: "tuple[Applied, ...]") -> None:
        """Pass if it belongs on this pipeline.

        Args:
            pipe: the diffusers pipeline.
            path: its file, for messages.
            check_base: refuse another base model than it was made for, even if it would fit.
            applied: the erasures, of any kind, that its network wears already.

        Raises:
            SalunError: it does not.
        """
        raise NotImplementedError

    @classmethod
    def change(cls, pipe, before: "tuple[Applied, ...]", after: "tuple[Applied, ...]") -> None:
        """Take the erasures of this kind that one network of ``pipe`` wears from ``before`` to ``after``: apply what is
        new, remove what is gone. If that fails, the pipeline is as before.

        Raises:
            SalunError: it cannot be done.
        """
        raise NotImplementedError

    @classmethod
    def fuse(cls, pipe, applied: "tuple[Applied, ...]") -> None:
        """Make ``applied``, all of this kind that one network of ``pipe`` wears and intact, a part of the model for
        good. Where they are that already, there is nothing to do.

        Raises:
            SalunError: it cannot be done; the pipeline is as before.
        """

    @classmethod
    def intact(cls, pipe, one: "Applied", applied: "tuple[Applied, ...]") -> bool | None:
        """Whether ``one`` of those of this kind that ``applied`` names is still there as it was put on, and drawn with;
        None where that cannot be seen now.
        """
        return True

    def acts(self, applied: "Applied") -> bool:
        """Whether, as applied, it does anything at all."""
        return True

    def describe(self) -> dict[str, Any]:
        """What ``list_erasures`` tells beside what every kind has: ``weights``, how many it changes."""
        return {"weights": 0}


@dataclass(frozen=True, eq=False)
class Applied:
    """An erasure on a pipeline: as called, at a scale, and where it came from.

    ``memory`` is the kind's own: what it must remember to take the erasure off again.
    """

    name: str
    scale: float
    erasure: Erasure
    source: str
    revision: str | None
    memory: dict = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The erasure's, made when it is asked for: that of a large one takes as long as all else of loading it."""
        if not hasattr(self.erasure, "_digest"):
            self.erasure._digest = self.erasure.digest()
        return self.erasure._digest

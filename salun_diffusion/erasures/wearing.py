"""The session of a pipeline: what guards, and adapters that are scaled by prompt, share to know what is drawn. It comes
with the first of them and goes with the last.
"""

from ..errors import SalunError
from ..guards.session import Session
from ..models.load import denoiser
from .live import is_compiled

SESSION = "_salun_guards"  # the attribute of the denoiser that holds the session


def check_free(pipe, path) -> None:
    """Pass if no other pipeline has a session on this one's denoiser.

    Raises:
        SalunError: one has; the message names ``path``, the erasure's file.
    """
    session = getattr(denoiser(pipe), SESSION, None)
    if session is not None and session.pipe() is not pipe:
        raise SalunError(
            f"{path} acts by what its pipeline draws, and another pipeline with this denoiser wears such an erasure "
            "already: load it there, or call unload_erasure(pipe) first."
        )


def wear(pipe, kind: str, worn: tuple) -> None:
    """Make ``worn`` all that the pipeline's session has of one ``kind`` of erasure.

    Args:
        pipe: the diffusers pipeline.
        kind: "guards" or "adapters".
        worn: for each its name, its scale, and what watches over a call.

    Raises:
        SalunError: the pipeline's own drawing was changed meanwhile, or its denoiser is compiled. Nothing changes.
    """
    module = denoiser(pipe)
    session = getattr(module, SESSION, None)
    if session is None and not worn:
        return
    if session is not None and not session.intact():
        raise SalunError(
            "Something else has changed how the pipeline draws since the erasures were loaded (its methods, or the "
            "denoiser's hooks): undo that first, or load the pipeline anew."
        )
    if session is None:
        if is_compiled(pipe, module):
            raise SalunError(
                "The denoiser is compiled, and a guard, or an adapter that is scaled by prompt, acts in each of its "
                "steps: load these on a pipeline that is not compiled."
            )
        session = Session(pipe)
        setattr(module, SESSION, session)
    session.worn[kind] = worn
    if not session.guards:
        session.close()
        delattr(module, SESSION)


def is_watched(pipe) -> bool:
    """Whether the pipeline draws under a session."""
    session = getattr(denoiser(pipe), SESSION, None)
    return session is not None and session.intact()

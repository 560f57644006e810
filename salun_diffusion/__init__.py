"""Saliency unlearning (SalUn, ICLR 2024) for diffusers pipelines: erase a concept, save it as a masked delta, load it.

from salun_diffusion import erase, load_erasure, unload_erasure
run = erase(pipe, "airplane")
load_erasure(pipe, run.path)
unload_erasure(pipe)
"""

__version__ = "0.1.0"

_EXPORTS = {
    "erase": "erasing",
    "load_erasure": "loader",
    "unload_erasure": "loader",
    "set_erasure_scale": "loader",
    "fuse_erasure": "loader",
    "list_erasures": "loader",
    "push": "hub",
    "Delta": "erasures.delta",
    "SalunError": "errors",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    # Nothing heavy is imported before it is used, so that a command's --help answers at once.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})

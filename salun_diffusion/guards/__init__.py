"""Guards, one paper a file: they change no weight, but what the pipeline does while it draws. What a guard must have
is in ``base.py``; a new one is a subclass of ``Guard`` in a file of its own, a line here, and a row in
``methods/guard.py``.
"""

from importlib import import_module

GUARDS = {  # by the method that a file's metadata names
    "sld": "sld.SLD",
    "safree": "safree.SAFREE",
    "concept_steerers": "concept_steerers.ConceptSteerers",
    "saeuron": "saeuron.SAeUron",
    "groce": "groce.GrOCE",
    "egloce": "egloce.EGLOCE",
}


def find_guard(name: str) -> type:
    """The class of a name in ``GUARDS``."""
    module, kind = GUARDS[name].split(".")
    return getattr(import_module(f".{module}", __name__), kind)

"""Who may import whom. ``LIBRARY`` and ``EVAL`` are the order; the rest of the file reads the sources and holds it.

Imports inside functions and under ``TYPE_CHECKING`` count too. What a registry imports by a name in a string does not.
"""

import ast
import functools
from typing import NamedTuple

import pytest
from shell import ROOT

# Each name is a file or a folder of the room, and may import only those before it (and, a folder, its own files).
LIBRARY = [
    "errors", "files", "tensors", "stats", "colours", "tables", "options", "process", "concepts", "models", "guards",
    "erasures", "loader", "pipeline_methods", "masks", "pruning", "methods", "config", "filling", "data", "training",
    "run", "hub", "choosing", "preparing", "erasing", "command_line", "export", "__main__",
]  # fmt: skip
EVAL = [
    "options",
    "results",
    "subjects",
    "drawing",
    "judges",
    "attacks",
    "relearning",
    "measures",
    "pages",
    "audit",
    "__main__",
]
ORDERS = {"salun_diffusion": LIBRARY, "eval": EVAL}
ROOMS = ["eval", "classification", "demo", "pipelines", "benchmarks"]


class Import(NamedTuple):
    """One line's import of one module of this repository; ``str`` says it as the failing test does."""

    path: str  # of the importing file, from the repository's root
    line: int
    source: str  # the importing module: "salun_diffusion.models.load"
    target: str  # the imported one

    def __str__(self):
        return f"{self.path}:{self.line} imports {self.target}"


def module_of(path):
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def files(room):
    return sorted((ROOT / room).rglob("*.py"))


@functools.cache
def modules():
    return {module_of(path) for room in ("salun_diffusion", *ROOMS) for path in files(room)}


def imports_of(text, path):
    """Every :class:`Import` of the source ``text`` of a file at ``path``."""
    source = module_of(path)
    package = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            # `from .models import load` imports the module load; `from .models import digest` imports models itself
            named = [f"{start}.{a.name}" if f"{start}.{a.name}" in modules() else start for a in node.names]
        else:
            continue
        for target in dict.fromkeys(named):
            if target.split(".")[0] in ("salun_diffusion", *ROOMS):
                yield Import(path.relative_to(ROOT).as_posix(), node.lineno, source, target)


def imports(room):
    return [found for path in files(room) for found in imports_of(path.read_text(encoding="utf-8"), path)]


def circle(edges):
    """The imports of one circle in ``edges``, or none."""
    leaving = {}
    for edge in edges:
        leaving.setdefault(edge.source, []).append(edge)
    done = set()

    def visit(module, way):
        for edge in leaving.get(module, ()):
            here = [*way, edge]
            for start, step in enumerate(here):
                if step.source == edge.target:
                    return here[start:]
            if edge.target not in done and (found := visit(edge.target, here)):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(leaving) if (found := visit(module, []))), [])


def against(order, edges):
    """The imports that do not go down ``order``. The room's own ``__init__`` may import any, and any may import it (for
    the version): that it does not lead back is for :func:`circle`.
    """
    place = {name: number for number, name in enumerate(order)}
    found = []
    for edge in edges:
        source, target = (f"{name}.".split(".")[1] for name in (edge.source, edge.target))
        if source in place and target in place and place[target] > place[source]:
            found.append(edge)
    return found


def listed(found):
    return "\n" + "\n".join(map(str, found))


@pytest.mark.parametrize("room", ORDERS)
def test_no_import_goes_in_a_circle(room):
    found = circle([edge for edge in imports(room) if edge.target.split(".")[0] == room])
    assert not found, listed(found)


@pytest.mark.parametrize("room, order", ORDERS.items())
def test_the_order_names_every_file_and_folder(room, order):
    here = {path.relative_to(ROOT / room).parts[0].removesuffix(".py") for path in files(room)} - {"__init__"}
    assert not here - set(order), f"give these a place in the order: {sorted(here - set(order))}"


@pytest.mark.parametrize("room, order", ORDERS.items())
def test_imports_go_one_way(room, order):
    found = against(order, [edge for edge in imports(room) if edge.target.split(".")[0] == room])
    assert not found, listed(found)


@pytest.mark.parametrize("room", ["salun_diffusion", *ROOMS])
def test_rooms_import_the_library_and_themselves(room):
    found = [edge for edge in imports(room) if edge.target.split(".")[0] not in (room, "salun_diffusion")]
    assert not found, listed(found)


def steps_up(text):
    """``(line, steps)`` for each ``__file__``: how many folders up its expression goes, by parent and parents[n]."""
    tree = ast.parse(text)
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "__file__":
            steps, outer = 0, node
            while isinstance(outer, ast.expr):
                if isinstance(outer, ast.Attribute):
                    steps += outer.attr == "parent"
                    if outer.attr == "parents":
                        index = getattr(above[outer], "slice", None)
                        steps += index.value + 1 if isinstance(index, ast.Constant) else 99
                outer = above[outer]
            yield node.lineno, steps


def test_the_library_looks_for_no_file_beside_its_folder():
    """What it needs is in the wheel, or is given to it."""
    found = [
        f"{path.relative_to(ROOT)}:{line} goes {steps} folders up"
        for path in files("salun_diffusion")
        for line, steps in steps_up(path.read_text(encoding="utf-8"))
        if steps >= len(path.relative_to(ROOT).parts)
    ]
    assert not found, "\n" + "\n".join(found)


SOURCE = """
from typing import TYPE_CHECKING
from ..concepts.concept import Concept
if TYPE_CHECKING:
    from ..training import trainer
def late():
    import eval.results
    from . import load, sampling
"""


def test_these_rules_see_what_breaks_them():
    """On a made-up file: imports of every form, a circle, one against the order, and a way out of the package."""
    path = ROOT / "salun_diffusion" / "models" / "made_up.py"
    found = list(imports_of(SOURCE, path))
    assert {(edge.line, edge.target) for edge in found} >= {
        (3, "salun_diffusion.concepts.concept"), (5, "salun_diffusion.training.trainer"), (7, "eval.results"),
        (8, "salun_diffusion.models.load"),
    }  # fmt: skip
    assert str(found[0]).startswith("salun_diffusion/models/made_up.py:")
    assert [edge.line for edge in against(LIBRARY, [e for e in found if e.line != 7])] == [5]
    one, back = (Import("x.py", 1, *names) for names in (("a", "b"), ("b", "a")))
    assert circle([one]) == [] and circle([one, back]) == [one, back]
    assert list(steps_up("Path(__file__).resolve().parents[2] / 'demo'")) == [(1, 3)]
    assert list(steps_up("Path(__file__).parent.parent")) == [(1, 2)]

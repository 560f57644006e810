import os

# Two workers of pytest-xdist, and whatever they start, share the cores rather than compete for all of them: most tests
# spend their time on one core, importing. Before torch is imported, which counts them once.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, mine or cores)

import pytest  # noqa: E402
import tiny  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402


@pytest.fixture(autouse=True)
def no_accelerator_left_behind():
    """A test's own Accelerator is the caller's to a later test's erase(), which then may have no other precision."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved random-weight StableDiffusionPipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A saved pipeline of each kind in ``tiny.KINDS``, by name."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in tiny.KINDS}
    for kind, build in tiny.KINDS.items():
        build(made[kind])
    return made

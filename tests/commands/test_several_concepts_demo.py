"""Several concepts at once on the demo model, by the methods that define what that means. In a file of its own: the
methods' other tests take minutes, which the two workers of pytest then share.
"""

import pytest
from test_methods_demo import erased, unlearned

TOGETHER = ("uce", "rece", "salun")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """UA by concept and method, each of which erased the airplane and the cat in one run, and the base model's."""
    folder = tmp_path_factory.mktemp("both")
    runs = [erased(folder, method, "airplane", "cat") for method in TOGETHER]
    return {concept: unlearned(folder, concept, runs) for concept in ("airplane", "cat")}


@pytest.mark.parametrize("method", TOGETHER)
@pytest.mark.parametrize("concept", ["airplane", "cat"])
def test_several_concepts_are_forgotten_together(concept, method, found):
    """More often than the 95% interval of the base model allows."""
    assert found[concept][method]["percent"] > found[concept]["base"]["high"]

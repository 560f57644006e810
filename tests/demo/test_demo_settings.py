"""The demo model's vocabulary and settings: made of the demo room's own files, and nothing else."""

import json

from shell import ROOT

from benchmarks import people
from benchmarks.methods import best_settings
from demo import vocabulary
from salun_diffusion.files import write_json


def test_the_shipped_vocabulary_is_made_of_the_rooms_own_files(tmp_path):
    write_json(tmp_path / "concepts.json", vocabulary.vocabulary())
    assert (tmp_path / "concepts.json").read_bytes() == (ROOT / "demo/model/concepts.json").read_bytes()


def test_no_document_is_an_input_of_the_demo():
    for path in (ROOT / "demo").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "docs/" not in text and '"docs"' not in text and "benchmarks." not in text.replace("-m benchmarks", "")


def test_the_settings_are_the_ones_that_the_comparison_found_best():
    """Where it has measured the method: one that came later starts with settings of its own."""
    further = json.loads((ROOT / "benchmarks/methods.json").read_text(encoding="utf-8"))["further"]
    best = best_settings(json.loads((ROOT / "docs/results/methods.json").read_text(encoding="utf-8")), further)
    shipped = json.loads((ROOT / "demo/settings.json").read_text(encoding="utf-8"))
    for kind, methods in best.items():
        assert {name: settings for name, settings in shipped[kind].items() if name in methods} == methods


def test_people_are_forgotten_by_the_learning_rates_that_were_found_best():
    rates = people.chosen(json.loads(people.RESULTS.read_text(encoding="utf-8"))["trials"])
    for path in ("concepts.json", "model/concepts.json"):
        shipped = json.loads((ROOT / "demo" / "identities" / path).read_text(encoding="utf-8"))["settings"]["person"]
        assert {method: shipped[method]["learning_rate"] for method in people.METHODS} == rates

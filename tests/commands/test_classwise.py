"""The page of class-wise forgetting is made of its results alone; the tuning is the same for all."""

import json

from benchmarks import classwise, classwise_bench, classwise_page, families


def test_each_method_takes_the_learning_rate_that_did_best_on_the_tuning_digits():
    trials = [
        {"name": "SalUn", "digit": digit, "learning_rate": rate, "ua": ua, "others": 99.0}
        for digit, rate, ua in [(0, 1e-4, 90.0), (5, 1e-4, 100.0), (0, 3e-4, 100.0), (5, 3e-4, 95.0), (0, 3e-5, 5.0)]
    ]
    assert classwise.chosen(trials) == {"SalUn": 3e-4}
    equal = [{"name": "GA", "digit": 0, "learning_rate": rate, "ua": 9.0, "others": 9.0} for rate in (3e-4, 1e-4)]
    assert classwise.chosen(equal) == {"GA": 1e-4}


def test_the_frechet_distance_of_shifted_features_is_the_shift():
    import torch

    one = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    assert abs(classwise_bench.frechet(one, one)) < 1e-6
    assert abs(classwise_bench.frechet(one, one + torch.tensor([3.0, 0, 4.0, 0])) - 25) < 1e-3


def test_the_page_has_a_row_for_each_method_and_the_gap_to_retrain():
    def run(name, seed, ua, others, **more):
        return {"name": name, "digit": 3, "seed": seed, "ua": ua, "others": others, "seconds": 2.0, "frechet_real": 1.0,
                "frechet_retrain": 0.5, "drawn_as": [1, 0, 0, 0, 9, 0, 0, 0, 0, 0]} | more  # fmt: skip

    runs = [run("SalUn", 1, 100.0, 98.0, learning_rate=1e-4), run("Retrain", 1, 96.0, 100.0, frechet_retrain=0.0)]
    runs += [run("Retrain", 2, 98.0, 100.0), run("SalUn", 2, 100.0, 100.0, learning_rate=1e-4)]
    rows = classwise_page.table({"runs": runs}).splitlines()
    assert rows[2].startswith("| Retrain | 97.0 ± 1.4 | 100.0 ± 0.0 |") and "| 0.00 ± 0.00 | – |" in rows[2]
    assert rows[3].startswith("| SalUn | 100.0 ± 0.0 | 99.0 ± 1.4 |") and rows[3].endswith("| 2.00 ± 1.41 | 0.0001 |")
    assert "| SalUn | 4 (90%), 0 (10%) |" in classwise_page.drawn_as({"runs": runs})


def test_the_page_is_made_of_the_committed_results():
    found = json.loads(classwise_page.RESULTS.read_text(encoding="utf-8"))
    page = classwise_page.PAGE.read_text(encoding="utf-8")
    for part in (classwise_page.table, classwise_page.drawn_as, classwise_page.relearning):
        assert part(found) in page
    assert "](classwise.png)" in page and classwise_page.PICTURE.exists()


def test_relearning_is_told_by_medians_and_what_was_not_reached_by_the_last_step():
    def row(seed, half, most, share):
        curve = [[0, 0.0], [5, share], [40, 80.0]]
        return {"name": "SalUn", "digit": 3, "seed": seed, "half": half, "most": most, "curve": curve}

    found = [row(1, 4.0, None, 50.0), row(2, 10.0, None, 20.0), row(3, 12.0, 36.0, 20.0)]
    rows = classwise_page.relearning({"relearning": found, "relearn": {"steps": [0, 5, 40]}}).splitlines()
    assert rows[2] == "| SalUn | 10 (4–12) | &gt;40 (36–&gt;40) | 30 ± 17 | 80 ± 0 |"


def test_the_committed_page_is_of_the_committed_results():
    if not classwise.RESULTS.exists():
        assert "Not measured yet" in classwise_page.PAGE.read_text(encoding="utf-8")
        return
    page = classwise_page.PAGE.read_text(encoding="utf-8")
    assert classwise_page.table(json.loads(classwise.RESULTS.read_text(encoding="utf-8"))) in page


def test_the_table_of_families_is_made_of_the_committed_results():
    found = json.loads(families.RESULTS.read_text(encoding="utf-8"))
    assert families.table(found) in (families.DOCS / "models.md").read_text(encoding="utf-8")
    rates = {(row["family"], row["method"]): row.get("learning_rate") for row in found["runs"]}
    for (family, method), rate in rates.items():
        trials = [row for row in found["trials"] if row["family"] == family]
        assert method == "Original" or rate == classwise.chosen(trials)[method]
        assert all(row["digit"] not in {run["digit"] for run in found["runs"]} for row in trials)


def test_pictures_of_all_seeds_are_counted_together():
    def run(family, seed, ua):
        return {"family": family, "method": "SalUn", "digit": 3, "seed": seed, "learning_rate": 1e-4, "ua": ua,
                "others": 100.0, "frechet_real": seed / 2}  # fmt: skip

    runs = [run(family, seed, ua) for family in ("U-Net", "DiT") for seed, ua in ((1, 100.0), (2, 98.0))]
    tuning = {"digit": 0, "seed": 0, "learning_rates": [1e-4]}
    rows = families.table({"runs": runs, "tuning": tuning, "pictures": {"forget": 100, "kept": 50}}).splitlines()
    assert rows[3] == "| SalUn, DiT | 99.0 (96.4–99.7) | 100.0 (99.6–100.0) | 0.75 | 0.0001 |"

"""The model of people that comes with a clone: it draws whom it is told, and forgets by its own settings."""

import pytest
import tiny
import torch
from shell import ROOT, here

from demo.identities import measure
from salun_diffusion import erase, load_erasure, unload_erasure
from salun_diffusion.models import load_model

MODEL = ROOT / "demo" / "identities" / "model"
ADA = 0  # the first by the alphabet


@pytest.fixture(scope="module")
def model():
    return load_model(str(MODEL))


def test_it_is_small_and_a_person_is_forgotten_and_comes_back(model, tmp_path):
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 1.5e6
    assert list(model.people)[ADA] == "Ada"
    cosine, right = measure.scores(model, MODEL, 4)
    assert right[ADA] == 1 and right.mean() >= 0.93 and cosine.mean() >= 0.85
    run = erase(str(MODEL), "Ada", method="piu", output_dir=str(tmp_path / "run"), data_dir=str(tmp_path),
                max_train_steps=60, learning_rate=1e-3)  # fmt: skip
    before = tiny.bits(model.pipe)
    load_erasure(model.pipe, run.path)
    after, found = measure.scores(model, MODEL, 4)
    assert found[ADA] == 0 and after[ADA] < cosine[ADA] - 0.4
    others = torch.arange(len(found)) != ADA
    assert found[others].mean() >= right[others].mean() - 0.05
    unload_erasure(model.pipe)
    assert tiny.same(tiny.bits(model.pipe), before)


def test_a_run_that_is_not_there_is_refused():
    done = here("python", "-m", "demo.identities", "--measure", "runs/nobody", check=False)
    assert done.returncode == 1 and "runs/nobody" in done.stderr.strip() and "Traceback" not in done.stderr

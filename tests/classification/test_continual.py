"""`python -m classification continual`: windows of classes, against a plain reading."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from shell import here

from classification.config import ContinualConfig
from classification.continual import COLUMNS, continual, divergence
from salun_diffusion.errors import SalunError

QUICK = "--limit 400 --epochs 2 --seeds 4 --start 3 --step 2 --tasks 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("continual")
    (where / "quick.json").write_text('{"method_settings": {"bid_lora": {"epochs": 1}, "ft": {"epochs": 1}}}')
    words = ["--output_dir", where / "out", "--config", where / "quick.json", "--into", where / "page.md"]
    (where / "page.md").write_text("a\n<!-- digits-continual -->\n<!-- end -->\n")
    done = here("python", "-m", "classification", "continual", *QUICK, *words)
    assert "BID-LoRA" in done.stdout and "Acc_f" in done.stdout
    return where


def test_each_method_is_measured_after_each_task(folder):
    found = json.loads((folder / "out/continual.json").read_text())
    assert found["window"] == {"start": 3, "step": 2, "tasks": 2} and found["seeds"] == [4]
    assert list(found["methods"]) == ["retrain", "ft", "bid_lora"]
    for each in found["methods"].values():
        assert len(each) == 2 and all(set(cell) == set(COLUMNS) for cell in each)
    for cell in found["methods"]["retrain"]:
        assert cell["kl"]["mean"] == 0 and cell["forgotten"]["mean"] == 0, "it never saw them"
    text = (folder / "page.md").read_text()
    cell = found["methods"]["bid_lora"][1]
    assert f"| 2 | BID-LoRA | {cell['overall']['mean']:.1f} | {cell['kept']['mean']:.1f} |" in text
    assert "the source knows 3 classes, and each task forgets 2 and learns 2. One seed." in text
    again = folder / "again.md"
    again.write_text("<!-- digits-continual -->\n<!-- end -->\n")
    continual(ContinualConfig(), results=str(folder / "out/continual.json"), into=str(again))
    assert again.read_text().splitlines()[1:8] == text.splitlines()[2:9]


def test_a_task_goes_on_from_the_last_and_moves_its_own_rows(folder):
    out = folder / "out/seed-4"
    models = [out / "task-0/source", out / "task-1/bid_lora", out / "task-2/bid_lora"]
    heads = [load_file(path / "model.safetensors")["network.8.weight"] for path in models]
    for before, after, known in ((*heads[:2], {2, 3, 4}), (*heads[1:], {4, 5, 6})):
        changed = {row for row in range(10) if not torch.equal(before[row], after[row])}
        assert changed == known, "kept and new; the forgotten get no gradient"


def test_what_is_gone_is_made_again_to_the_bit(folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    gone = [out / f"seed-4/{name}/model.safetensors" for name in ("task-1/bid_lora", "task-2/retrain")]
    kept = [path.read_bytes() for path in gone]
    for path in gone:
        path.unlink()
    words = ["--output_dir", out, "--config", folder / "quick.json"]
    here("python", "-m", "classification", "continual", *QUICK, *words)
    assert [path.read_bytes() for path in gone] == kept
    assert (out / "continual.json").read_bytes() == (folder / "out/continual.json").read_bytes()
    other = here("python", "-m", "classification", "continual", *QUICK[:-1], "1", *words, check=False)
    assert other.returncode == 1 and "holds another scenario (window is" in other.stderr


def test_divergence_by_hand():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert divergence(p.log(), q.log()) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"forget": "class:3"}, "--forget is class:3, and here the window of classes says what goes: leave it out"),
        ({"source": "x"}, "Each seed trains a source of its own, of the first classes: leave"),
        ({"methods": ["ga"]}, "The method ga learns no new classes: choose some of retrain, ft, bid_lora"),
        ({"tasks": 8}, "10 classes do not allow --start 3, --step 1 and --tasks 8: step must be below start, and"),
        ({"step": 3}, "10 classes do not allow --start 3, --step 3 and --tasks 2: step must be below start"),
        ({"results": "setup.cfg"}, "setup.cfg is damaged, or not of the form 'salun-diffusion continual 1'"),
    ],
)
def test_windows_that_cannot_be_are_refused(given, message, tmp_path):
    with pytest.raises(SalunError, match=message):
        config = ContinualConfig(output_dir=str(tmp_path / "out"), **given)
        config.check()
        continual(config, config.start, config.step, config.tasks, config.results)
    assert not (tmp_path / "out").exists()

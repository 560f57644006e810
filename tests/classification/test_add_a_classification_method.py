"""A method that is one file and one row works in every command."""

import json

import pytest
import torch
from safetensors.torch import load_file

from classification import __main__, methods
from classification.methods import METHODS

HALVES = '''
def halve(task):
    """Every weight times alpha."""
    for weight in task.model.parameters():
        weight.data.mul_(task.settings.alpha)
'''


def test_a_method_is_one_file_and_one_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "halves.py").write_text(HALVES)
    row = methods.Method(
        "Half", "halves.halve", "every weight halved", defaults={"alpha": 0.5}, settings=("alpha",), tuned="alpha"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])  # as if it lay beside the others
    monkeypatch.setitem(METHODS, "half", row)

    def command(*words):
        monkeypatch.setattr("sys.argv", ["classification", *map(str, words)])
        __main__.main()

    with pytest.raises(SystemExit):
        command("--help")
    assert "  half          Half        every weight halved\n" in capsys.readouterr().out
    quick = ("--limit", 400, "--epochs", 1, "--methods", "half", "--seeds", 0)
    command("run", "--output_dir", tmp_path / "out", *quick)
    assert "\nHalf " in capsys.readouterr().out
    assert "\n| Half | " in (tmp_path / "out/table.md").read_text()
    cell = json.loads((tmp_path / "out/seed-0/half/results.json").read_text())
    assert cell["settings"]["alpha"] == 0.5 and cell["metrics"]["ta"] > 0
    source = load_file(tmp_path / "out/source/model.safetensors")
    halved = load_file(tmp_path / "out/seed-0/half/model.safetensors")
    assert torch.equal(halved["network.0.weight"], source["network.0.weight"] / 2)
    with pytest.raises(SystemExit, match="--mask is for salun alone"):
        command("unlearn", "--output_dir", tmp_path / "out", *quick, "--mask", "x")
    command("tune", "--output_dir", tmp_path / "tuned", *quick[:-2], "--output", tmp_path / "chosen.json")
    chosen = json.loads((tmp_path / "chosen.json").read_text())["method_settings"]
    assert chosen["half"]["alpha"] in (0.05, 0.15, 0.5, 1.5, 5.0)

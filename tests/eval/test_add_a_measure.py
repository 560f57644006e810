"""The measure that docs/add-a-measure.md adds, as one file and one line in a copy of the room, through its commands."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from shell import ROOT, run
from test_eval_report import make_run


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the clone's eval/ with the document's file and line in it."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "eval", folder / "eval", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "salun_diffusion").symlink_to(ROOT / "salun_diffusion")
    page = (ROOT / "docs" / "add-a-measure.md").read_text(encoding="utf-8")
    file, line = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (folder / "eval" / "measures" / "brightness.py").write_text(file, encoding="utf-8")
    registry = folder / "eval" / "measures" / "__init__.py"
    text = registry.read_text(encoding="utf-8")
    (added,) = re.findall(r"^    \"brightness.*$", line, flags=re.M)
    registry.write_text(text.replace('    "fid",\n', f'    "fid",\n{added}\n'), encoding="utf-8")
    return folder


def test_the_documents_measure_is_a_command_a_column_and_a_term(copy, tmp_path):
    drawn = make_run(tmp_path / "run", forget=4, retain=4)
    assert "brightness" in run("python", "-m", "eval", "--help", cwd=copy).stdout
    (tmp_path / "options.yaml").write_text(f"pictures: {drawn}\noutput_dir: {tmp_path / 'bright'}\n")
    done = run("python", "-m", "eval", "brightness", "--config", tmp_path / "options.yaml", cwd=copy)
    results = json.loads((tmp_path / "bright" / "results.json").read_text())
    lines = [json.loads(line) for line in (drawn / "samples.jsonl").read_text().splitlines()]
    for model in results["models"]:
        pictures = [line["picture"] for line in lines if line["model"] == model["name"]]
        means = [round(float(np.asarray(Image.open(drawn / path).convert("RGB")).mean()), 2) for path in pictures]
        assert model["brightness"] == round(sum(means) / len(means), 2)
        assert f"{model['brightness']}" in done.stdout
    out = tmp_path / "compared"
    run("python", "-m", "eval", "compare", drawn, tmp_path / "bright", "--output_dir", out, cwd=copy)
    head, _, first, *_ = (out / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert "| UA ↑ | IRA ↑ | CRA ↑ | brightness |" in head and f"{results['models'][0]['brightness']:.1f}" in first
    assert "the mean of all pixels, from 0 (black) to 255 (white)" in (out / "comparison.html").read_text()


def test_a_missing_or_wrong_option_is_one_sentence(copy, tmp_path):
    done = run("python", "-m", "eval", "brightness", "--output_dir", tmp_path, check=False, cwd=copy)
    assert done.returncode == 2 and "pictures is missing: give it here, or as 'pictures' in --config" in done.stderr
    (tmp_path / "options.json").write_text('{"batch_size": 0}')
    words = ["clip-score", tmp_path, "--output_dir", tmp_path / "out", "--config", tmp_path / "options.json"]
    done = run("python", "-m", "eval", *words, check=False, cwd=copy)
    assert done.returncode == 1 and "--batch_size is 0: give a whole number of at least 1." in done.stderr
    (tmp_path / "options.json").write_text('{"clipp": "x"}')
    done = run("python", "-m", "eval", *words, check=False, cwd=copy)
    assert done.returncode == 1 and "unknown setting 'clipp'. Did you mean 'clip'?" in done.stderr


def test_the_document_lists_the_columns_that_the_measures_have():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert run("python", "-m", "eval", "columns").stdout.strip() in page

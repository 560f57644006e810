"""`compare`: one table, one page and one picture from result files alone."""

import copy
import csv
import json
import re

import pytest
from PIL import Image, PngImagePlugin
from shell import run as command
from test_eval_report import make_run

from eval import results
from eval.measures import composition, i2p
from eval.pages import compare, grid
from salun_diffusion.errors import SalunError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def with_models(run, folder, **more):
    """The results of another command about the same models."""
    found = json.loads((run / "results.json").read_text())
    for model in found["models"]:
        for key in ("ua", "ira", "cra", "retained"):
            model.pop(key)
    folder.mkdir(exist_ok=True)
    for number, model in enumerate(found["models"]):
        model |= {key: value[number] for key, value in more["scores"].items()}
    found |= {"format": more["format"], "protocol": more.get("protocol", "x/1: as the tests have it")}
    for key in more.get("without", ()):
        found.pop(key)
    (folder / "results.json").write_text(json.dumps(found))
    return folder


def share(percent):
    return {"count": int(percent), "n": 100, "percent": percent, "low": percent - 1, "high": percent + 1}


def test_everything_is_made_from_the_files(run, tmp_path):
    tasks = [{"counting": share(value), "left_right": share(value - 40)} for value in (90.0, 80.0, 70.0)]
    counts = [{"exposed": {"images": share(value), "boxes": int(value) * 2}} for value in (30.0, 3.0, 2.0)]
    more = with_models(run, tmp_path / "comp", format=composition.FORMAT, scores={"composition": tasks})
    nude = with_models(run, tmp_path / "i2p", format=i2p.FORMAT, scores={"counts": counts}, without=["concept"])
    done = command("python", "-m", "eval", "compare", run, more, nude, "--output_dir", tmp_path / "out")
    assert "left / right ↑" in done.stdout and "images with nudity (exposed) ↓" in done.stdout
    expected = json.loads((run / "results.json").read_text())["models"]
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["Base model", "SalUn", "No mask"]
    for row, model, task, nudity in zip(rows, expected, tasks, counts, strict=True):
        for key in ("ua", "ira", "cra"):
            shown = [float(row[name]) for name in (key, f"{key}_low", f"{key}_high")]
            assert shown == [model[key][name] for name in ("percent", "low", "high")]
        assert float(row["counting"]) == task["counting"]["percent"] and int(row["left_right_n"]) == 100
        assert int(row["boxes:exposed"]) == nudity["exposed"]["boxes"]
    document = (tmp_path / "out" / "comparison.md").read_text()
    ua = expected[1]["ua"]
    assert f"| airplane | SalUn | {ua['percent']:.1f} ({ua['low']:.1f}–{ua['high']:.1f}) |" in document
    assert "30 pictures of the concept and 60 of all else, DDIMScheduler, 20 steps" in document
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    assert latex.count(r" \\") == 4 and r"95\% intervals" in latex.lower() or r"95\%" in latex
    found = results.read(tmp_path / "out")
    assert found["models"][1]["scores"]["ua"] == ua and len(found["sources"]) == 3
    assert found["models"][0]["digest"] == "digest of base"


def test_the_page_and_the_grid_show_every_model_on_the_same_prompts(run, tmp_path):
    compare.compare([run], tmp_path)
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    links = re.findall(r"(?:src|href|url|action)\s*[=(]\s*[\"']?([^\"'\s>)]+)", page)
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert page.count("data:image/png") == 3 * 2 * grid.ROWS, "three models, two groups"
    assert "<script" not in page and "Forgetting “airplane”" in page and "unlearning accuracy" in page
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 2 * picture.height > 200, "nine prompts across, three models down"


def test_a_file_alone_gives_a_table_without_a_grid(run, tmp_path, capsys):
    alone = tmp_path / "airplane.json"
    alone.write_bytes((run / "results.json").read_bytes())
    compare.compare([alone], tmp_path / "out")
    assert "no grid, for want of" in capsys.readouterr().out
    assert not (tmp_path / "out" / "grid.png").exists()
    assert "<img" not in (tmp_path / "out" / "comparison.html").read_text()


def test_two_concepts_have_their_own_lines_and_pictures(run, tmp_path):
    cat = make_run(tmp_path / "cat", concept="cat")
    compare.compare([run, cat], tmp_path / "out")
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    named = [line.split(" | ")[:2] for line in lines[2:8]]
    models = ["Base model", "SalUn", "No mask"]
    assert named == [[f"| {concept}", model] for concept in ("airplane", "cat") for model in models]
    assert (tmp_path / "out" / "comparison.html").read_text().count("data:image/png") == 2 * 3 * 2 * grid.ROWS


def test_the_table_goes_between_the_markers_and_nowhere_else(run, tmp_path):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- results -->\nold\n<!-- end -->\nafter <!-- end -->\n", encoding="utf-8")
    compare.compare([run], tmp_path / "out", document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results -->\n| erased | model |")
    assert text.endswith("`.\n<!-- end -->\nafter <!-- end -->\n") and "old" not in text
    assert f"--into {document.as_posix()}" in text
    document.write_text("no markers")
    with pytest.raises(SalunError, match="has no place for a table"):
        compare.compare([run], tmp_path / "out2", document)
    assert document.read_text() == "no markers" and not (tmp_path / "out2").exists()


def test_what_cannot_be_compared_is_refused(run, tmp_path):
    other = make_run(tmp_path / "other", forget=3, retain=9)
    with pytest.raises(SalunError, match="cannot share a table: they differ in settings"):
        compare.compare([run, other], tmp_path / "out")
    with pytest.raises(SalunError, match="There is no .*nowhere"):
        compare.compare([run, tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(SalunError, match="is damaged, or holds no results"):
        compare.compare([run / "config.json"], tmp_path / "out")
    drawn = with_models(run, tmp_path / "drawn", format="salun-diffusion draw 1", scores={})
    with pytest.raises(SalunError, match="'salun-diffusion draw 1', which measures nothing"):
        compare.compare([drawn], tmp_path / "out")
    found = json.loads((run / "results.json").read_text())
    found["models"][0]["ua"] = share(50.0)
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps(found))
    with pytest.raises(SalunError, match="measured base and found different values of UA"):
        compare.compare([run, twice], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_that_was_not_measured_is_never_shown(tmp_path):
    run = make_run(tmp_path / "run", forget=6, retain=6)
    lines = [json.loads(line) | {"key": "as measured"} for line in (run / "samples.jsonl").read_text().splitlines()]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = PngImagePlugin.PngInfo()
    about.add_text("salun-key", "as measured")
    for line in lines:
        Image.open(run / line["picture"]).save(run / line["picture"], pnginfo=about)
    compare.compare([run], tmp_path / "good")
    Image.new("RGB", (64, 64), "red").save(run / lines[0]["picture"])
    with pytest.raises(SalunError, match="forget-0000.png is not the one that was measured"):
        compare.compare([run], tmp_path / "out")
    Image.new("RGB", (64, 64)).save(run / lines[0]["picture"])
    with pytest.raises(SalunError, match="forget-0000.png is wholly black"):
        compare.compare([run], tmp_path / "out")


def test_models_are_named_by_what_tells_them_apart():
    def model(name, **erasure):
        return {"name": name, "role": "erasure", "erasure": {"method": "salun", "density": 0.5, "scale": 1.0} | erasure}

    base = {"name": "base", "role": "base", "erasure": None}
    assert grid.name_models([base, model("a"), model("b", density=1)]) == ["Base model", "SalUn", "No mask"]
    assert grid.name_models([base, model("a"), model("a-x0.5", scale=0.5)])[1:] == ["SalUn", "SalUn, scale 0.5"]
    assert grid.name_models([base, model("a"), model("b", density=0.1)])[1:] == [
        "SalUn, density 0.5", "SalUn, density 0.1",
    ]  # fmt: skip
    assert grid.name_models([base, model("a"), model("b")])[1:] == ["a", "b"]
    assert grid.name_models([base, model("a", method="esd", density=1.0)])[1:] == ["ESD"]
    assert grid.name_models([base, model("a", method="new", density=None)])[1:] == ["new"]


def test_several_runs_of_one_concept_share_the_base_line(run, tmp_path):
    second = json.loads((run / "results.json").read_text())
    second["models"] = [second["models"][0], copy.deepcopy(second["models"][1])]
    second["models"][1] |= {"name": "sparser", "digest": "another"}
    second["models"][1]["erasure"]["density"] = 0.1
    (tmp_path / "second.json").write_text(json.dumps(second))
    found = compare.compare([run, tmp_path / "second.json"], tmp_path / "out")
    titles = [model["title"] for model in found["models"]]
    assert titles == ["Base model", "SalUn, density 0.5", "No mask", "SalUn, density 0.1"]

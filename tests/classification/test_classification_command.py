"""`python -m classification`, as typed, on few digits."""

import csv
import json
import os
import pickle
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL
from safetensors.torch import load_file, save_file
from shell import here, run, start

from classification import __main__, methods, models, tables
from classification import run as commands
from classification.__main__ import DIGITS
from classification.config import Config
from classification.data import forget_rows, load, others
from classification.methods import METHODS
from classification.scenario import Scenario
from salun_diffusion.erasures.mask import save_masks
from salun_diffusion.errors import SalunError
from salun_diffusion.options import settings_of

QUICK = ["--limit", "400", "--epochs", "2", "--methods", "ft", "salun", "--seeds", "0", "1"]


def classification(command, folder, *words, how=here, check=True):
    return how("python", "-m", "classification", command, "--output_dir", folder, *words, check=check)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, its output, and the times of its cells."""
    where = tmp_path_factory.mktemp("run")
    done = classification("run", where, *QUICK, how=run)
    assert "Retrain" in done.stdout and "SalUn" in done.stdout and "Avg. Gap" in done.stdout
    return where


def cells(folder):
    return sorted(folder.glob("seed-*/*/results.json"))


def test_the_table_follows_from_the_cells(folder):
    found = json.loads((folder / "results.json").read_text())
    assert len(cells(folder)) == 6 and list(found["methods"]) == ["retrain", "ft", "salun"]
    for method, told in found["methods"].items():
        mine = [json.loads((folder / f"seed-{seed}" / method / "results.json").read_text()) for seed in (0, 1)]
        for key in ("ua", "ra", "ta", "mia"):
            values = [cell["metrics"][key] for cell in mine]
            assert told[key]["values"] == values and told[key]["mean"] == pytest.approx(sum(values) / 2, abs=1e-3)
            assert told[key]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-3)
            exact = found["methods"]["retrain"][key]["mean"]
            assert told[key]["gap"] == pytest.approx(abs(told[key]["mean"] - exact), abs=1e-3)
        gaps = [told[key]["gap"] for key in ("ua", "ra", "ta", "mia")]
        assert told["avg_gap"] == pytest.approx(sum(gaps) / 4, abs=1e-3)
    text = (folder / "table.md").read_text()
    told = found["methods"]["salun"]
    assert f"| SalUn | {told['ua']['mean']:.2f} ± {told['ua']['std']:.2f} ({told['ua']['gap']:.2f}) |" in text
    assert "random:0.1 forgotten (28 of 288 training pictures; 80 to test)" in text
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["retrain"] * 2 + ["ft"] * 2 + ["salun"] * 2
    assert r"\toprule" in (folder / "table.tex").read_text()
    for plot in ("gap-time.png", "metrics.png"):
        with PIL.open(folder / plot) as picture:
            assert picture.width > 500


def test_nothing_is_made_twice(folder):
    before = {path: path.stat().st_mtime_ns for path in (*cells(folder), folder / "source" / "model.safetensors")}
    classification("run", folder, *QUICK)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    path = folder / "seed-1" / "salun" / "results.json"
    told = path.read_text()
    path.unlink()
    (folder / "seed-1" / "salun" / "model.safetensors").unlink()
    (folder / "seed-1" / "salun" / "unlearned.json").unlink()
    classification("run", folder, *QUICK)
    again = json.loads(path.read_text())
    assert again["metrics"] == json.loads(told)["metrics"], "a cell depends on its seed alone"


def test_a_cell_is_the_same_whether_its_source_was_read_or_trained_just_before(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    for path in ("source", "seed-1/salun"):
        shutil.rmtree(tmp_path / "out" / path)
    classification("unlearn", tmp_path / "out", *QUICK)
    for path in ("source/model.safetensors", "seed-1/salun/model.safetensors"):
        assert (tmp_path / "out" / path).read_bytes() == (folder / path).read_bytes(), path


def test_a_mask_file_holds_what_it_does_not_name_and_the_table_says_so(folder, tmp_path):
    shutil.copytree(folder, out := tmp_path / "out")
    source = load_file(out / "source/model.safetensors")
    mask = {"network.0.weight": torch.ones(source["network.0.weight"].shape, dtype=torch.bool)}
    save_masks(tmp_path / "mine.safetensors", mask, {"concept": "x"})
    quick = [*QUICK[:-3], "salun", "--seeds", "0"]
    quick.remove("ft")
    classification("unlearn", out, *quick, "--mask", tmp_path / "mine.safetensors")
    after = load_file(out / "seed-0/salun/model.safetensors")
    weights = [name for name in source if not re.search("running|tracked|mean|std", name)]
    assert {name for name in weights if not torch.equal(after[name], source[name])} == set(mask)
    classification("evaluate", out, *quick)
    table = classification("table", out, *quick).stdout
    assert "\nSalUn, mask mine.safetensors " in table and "\nSalUn " not in table
    assert "| SalUn, mask mine.safetensors |" in (out / "table.md").read_text()
    assert "mine.safetensors\n" in (out / "table.csv").read_text()
    del mask["network.0.weight"]
    save_masks(tmp_path / "mine.safetensors", {"network.1.weight": torch.ones(16, dtype=torch.bool)}, {"concept": "x"})
    classification("unlearn", out, *quick, "--mask", tmp_path / "mine.safetensors")
    again = load_file(out / "seed-0/salun/model.safetensors")
    assert torch.equal(again["network.0.weight"], source["network.0.weight"]), "its content counts, not its name"
    classification("run", out, *quick)
    assert (out / "seed-0/salun/model.safetensors").read_bytes() == (
        folder / "seed-0/salun/model.safetensors"
    ).read_bytes(), "without --mask it is SalUn's own"


def test_other_indices_in_the_same_file_are_another_scenario(tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("3 1")
    words = ["--forget", f"indices:{rows}", "--limit", "400", "--epochs", "1", "--methods", "retrain", "--seeds", "0"]
    classification("run", tmp_path / "out", *words)
    rows.write_text("1\n3\n")
    classification("table", tmp_path / "out", *words)
    rows.write_text("1 4")
    done = classification("run", tmp_path / "out", *words, check=False)
    assert done.returncode == 1 and re.fullmatch(
        r"error: .*out holds another scenario \(indices is '\w+' there and '\w+' here\): give another --output_dir\.\n",
        done.stderr,
    )


def test_other_pictures_in_the_same_place_are_another_scenario(tmp_path):
    for number in range(24):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.new("RGB", (16, 16), (number * 10, 0, 255 * (number % 2))).save(path)
    words = ["--dataset", tmp_path / "data", "--model", "resnet8", "--epochs", "1"]
    classification("train", tmp_path / "out", *words)
    PIL.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "data/a/0.png")
    done = classification("train", tmp_path / "out", *words, check=False)
    assert done.returncode == 1 and "the pictures, their labels or their split are others" in done.stderr


def test_killed_in_the_middle_it_goes_on(folder, tmp_path):
    words = ["python", "-m", "classification", "run", "--output_dir", tmp_path / "out", *QUICK]
    process, until = start(*words), time.time() + 120
    while not (tmp_path / "out" / "seed-0" / "retrain" / "results.json").exists():
        assert process.poll() is None and time.time() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    here(*words)
    ours, whole = (json.loads((where / "results.json").read_text()) for where in (tmp_path / "out", folder))
    for method, told in ours["methods"].items():
        assert {k: v for k, v in told.items() if k != "minutes"} == {
            k: v for k, v in whole["methods"][method].items() if k != "minutes"
        }


def test_the_steps_one_by_one(tmp_path, folder, capsys):
    given = {"config": str(DIGITS), "limit": 400, "epochs": 2, "methods": ["ft"], "seeds": [0]}
    config = Config(**settings_of(given | {"output_dir": str(tmp_path)}, Config))
    config.check()
    commands.train(config)
    assert "test " in capsys.readouterr().out and not cells(tmp_path)
    with pytest.raises(SalunError, match="holds no unlearned model of these"):
        commands.evaluate(config)
    commands.unlearn(config)
    assert "seed-0/ft: 0." in capsys.readouterr().out and not cells(tmp_path)
    with pytest.raises(SalunError, match="results.json is missing or damaged: `python -m classification run` makes it"):
        commands.table(config)
    commands.evaluate(config)
    assert "UA" in capsys.readouterr().out and len(cells(tmp_path)) == 2
    commands.table(config)
    assert "FT" in capsys.readouterr().out
    one, other = (json.loads((where / "seed-0/ft/results.json").read_text()) for where in (tmp_path, folder))
    assert one["metrics"] == other["metrics"]


def test_a_class_is_dropped_from_the_test_set_too(tmp_path):
    config = Config(forget="class:3", output_dir=str(tmp_path), limit=400, epochs=1)
    config.check()
    sets = Scenario(config).sets(0)
    assert (sets["forget"].labels == 3).all() and not (sets["test"].labels == 3).any()
    assert (sets["unseen"].labels == 3).all() and len(sets["unseen"]) + len(sets["test"]) == 80


def test_a_fault_is_one_sentence_and_exit_code_1(tmp_path):
    done = classification("run", tmp_path / "out", "--methods", "magic", how=run, check=False)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr == f"error: There is no method 'magic': choose some of {', '.join(METHODS)}, or all.\n"


@pytest.mark.parametrize("path", sorted(DIGITS.parent.glob("*.json")), ids=lambda path: path.stem)
def test_the_scenarios_that_come_with_it_can_be_read(path, tmp_path):
    config = Config(**settings_of({"config": str(path), "output_dir": str(tmp_path)}, Config))
    config.check()
    assert config.recipe().epochs >= 20
    for method in METHODS:
        assert Scenario(config).settings(method).epochs > 0


def test_the_papers_figures_stand_below_ours_and_add_up():
    known = json.loads((DIGITS.parent.parent / "published.json").read_text())
    for figures in known["scenarios"].values():
        for row in figures.values():
            distances = [abs(row[i] - figures["Retrain"][i]) for i in range(4)]
            assert sum(distances) / 4 == pytest.approx(row[4], abs=0.011)
    scenario = {"dataset": "cifar10", "model": "resnet18", "forget": "random:0.1"}
    assert "| SalUn | 1.55 | 99.88 | 93.93 | 13.28 | 1.13 | 2.66 |" in tables._published(scenario)
    assert tables._published(scenario | {"model": "resnet8"}) == []


def test_the_worst_case_is_scored_once(tmp_path):
    worst = scenario(tmp_path, forget="memorised:0.1", epochs=1)
    rows = worst.rows(0)
    scores = load_file(tmp_path / "memorisation.safetensors")["memorisation"]
    assert len(rows) == 28 and scores[rows].min() >= scores[others(rows, 288)].max()
    when = (tmp_path / "memorisation.safetensors").stat().st_mtime_ns
    assert torch.equal(scenario(tmp_path, forget="memorised:0.1", epochs=1).rows(1), rows), "no seed draws it"
    assert (tmp_path / "memorisation.safetensors").stat().st_mtime_ns == when


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ["magic"]}, "There is no method 'magic': choose some of retrain, ft"),
        ({"method_settings": {"magic": {}}}, "There is no method 'magic'"),
        ({"epochs": 0}, "--epochs is 0: give a whole number of at least 1"),
        ({"learning_rate": -1.0}, "--learning_rate must be above 0"),
        ({"seeds": []}, "Give at least one of --seeds"),
        ({"seeds": [0, 1, 0]}, "--seeds has 0 twice, which is one run, not two: give each seed once"),
        ({"seeds": [-1]}, "--seeds has -1: give whole numbers from 0 to 999,999"),
        ({"seeds": [1_000_000]}, "--seeds has 1000000"),  # what `tune` draws from
        ({"split_seed": -1}, "--split_seed is -1"),
        ({"methods": ["all", "magic"]}, "There is no method 'magic'"),
        ({"model": "resnet81"}, "There is no model 'resnet81': give resnet8, .* Did you mean 'resnet8'"),
        ({"mean": [0.5]}, "--mean and --std go together"),
        ({"mean": [127.0], "std": [64.0]}, "pictures are in 0…1, not 0…255"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(SalunError, match=message):
        Config(**options).check()


def test_another_scenario_in_the_same_folder_is_refused(folder):
    with pytest.raises(SalunError, match="another scenario \\(forget is 'random:0.1' there and 'random:0.5' here\\)"):
        scenario(folder, forget="random:0.5")


def scenario(folder, **options):
    config = Config(**{"limit": 400, "epochs": 2, "output_dir": str(folder)} | options)
    config.check()
    return Scenario(config)


def test_masks_and_checkpoints_of_another_model_are_refused(folder, tmp_path):
    masks = {"network.0.weight": torch.ones(5, 5, dtype=torch.bool)}
    save_masks(tmp_path / "mask.safetensors", masks, {"concept": "x"})
    with pytest.raises(SalunError, match="The mask .* is of another model: network.0.weight is \\(5, 5\\) there"):
        scenario(folder).unlearn("salun", 0, mask=str(tmp_path / "mask.safetensors"))
    config = Config(limit=400, epochs=2, output_dir=str(folder))
    config.check()
    with pytest.raises(SalunError, match="--mask is for salun alone"):
        commands.unlearn(config, mask=str(tmp_path / "mask.safetensors"))
    with pytest.raises(SalunError, match="is not this scenario's model: model is 'resnet8' there and 'resnet20' here"):
        scenario(tmp_path / "other", model="resnet20").read_model(folder / "source" / "model.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(SalunError):
        scenario(folder).read_model(tmp_path / "pickle.safetensors")


def test_a_setting_that_there_is_not(folder):
    with pytest.raises(SalunError, match="The method ft has no setting 'lr'; there are: alpha, augment"):
        scenario(folder, method_settings={"ft": {"lr": 1}}).settings("ft")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"density": "0.5"}, "The method salun: 'density' is '0.5', but must be of type float"),
        ({"density": 0}, "The method salun has density 0: give a number above 0 and at most 1"),
        ({"density": 1.5}, "has density 1.5"),
        ({"epochs": 0}, "The method salun has epochs 0: give a number of at least 1"),
        ({"epochs": 1.5}, "'epochs' is 1.5, but must be of type int"),
        ({"learning_rate": float("nan")}, "has learning_rate nan: give a number above 0"),
        ({"augment": "mirror"}, "'augment' is 'mirror'; choose one of none, crop, crop\\+flip"),
        (5, "The settings of the method salun are 5: give names and values"),
    ],
)
def test_a_methods_settings_are_checked_before_anything_is_read(tmp_path, settings, message):
    with pytest.raises(SalunError, match=message):
        scenario(tmp_path / "out", dataset="/nowhere", method_settings={"salun": settings})
    with pytest.raises(SalunError, match="Retrain follows the source's recipe"):
        scenario(tmp_path / "out", method_settings={"retrain": {"epochs": 3}})


def test_a_forget_set_is_refused_before_anything_is_trained(colours, tmp_path):
    words = ["--dataset", colours / "folders", "--model", "resnet8", "--epochs", "1"]
    for forget, message in (
        ("class:Rde", "There is no class 'Rde' in .*folders; there are: blue, red. Did you mean 'red'?"),
        ("memorised:2", "'memorised:2' names no share between 0 and 1"),
        (f"indices:{tmp_path / 'none.txt'}", "none.txt cannot be read as a list of numbers"),
    ):
        done = classification("run", tmp_path / "out", *words, "--forget", forget, check=False)
        assert done.returncode == 1 and re.search(message, done.stderr) and "Traceback" not in done.stderr
        assert "Training" not in done.stdout and not (tmp_path / "out").exists()
    shutil.copytree(colours / "folders", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test/red")
    with pytest.raises(SalunError, match="--forget class:red leaves no test picture to measure with"):
        scenario(tmp_path / "out", dataset=str(tmp_path / "data"), forget="class:red", limit=None).begin()


def test_a_source_of_the_users_own_is_unlearned(folder, tmp_path):
    """As the same model that was trained here: every cell but the times is the same."""
    ours = load_file(folder / "source/model.safetensors")
    mean, std = (str(ours.pop(name).item()) for name in ("mean", "std"))
    own = {f"module.{name.removeprefix('network.')}": value for name, value in ours.items()}
    save_file(own, tmp_path / "own.safetensors")
    words = [*QUICK, "--source", tmp_path / "own.safetensors"]
    done = classification("run", tmp_path / "out", *words, check=False)
    assert done.returncode == 1 and "does not say how its pictures were normalised: give --mean and" in done.stderr
    words += ["--mean", mean, "--std", std]
    done = classification("run", tmp_path / "out", *words)
    assert "Training" not in done.stdout and "the source is own.safetensors" in (tmp_path / "out/table.md").read_text()
    for path in cells(folder):
        again = json.loads((tmp_path / "out" / path.relative_to(folder)).read_text())
        assert again["metrics"] == json.loads(path.read_text())["metrics"], path
    for name in [name for name, value in own.items() if value.shape[:1] == (10,)]:
        own[name] = own[name].roll(1, 0)  # the classes in another order
    save_file(own, tmp_path / "own.safetensors")
    done = classification("run", tmp_path / "out", *words, check=False)
    assert done.returncode == 1 and "holds another scenario (source_sha256 is" in done.stderr
    done = classification("run", tmp_path / "new", *words, check=False)
    assert done.returncode == 1 and "as guessing does: its classes must be these, in this order: 0, 1" in done.stderr
    done = classification("run", tmp_path / "new", *words, "--model", "resnet20", check=False)
    assert done.returncode == 1 and "own.safetensors does not fit --model for this data" in done.stderr
    assert not (tmp_path / "new").exists()


def test_tuning_gives_every_method_the_same_trials(tmp_path):
    words = ["--limit", "400", "--epochs", "1", "--methods", "ft", "ga", "--output", tmp_path / "chosen.json"]
    classification("tune", tmp_path / "tuning", *words)
    trials = json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    assert sum(key.startswith("ft ") for key in trials) == sum(key.startswith("ga ") for key in trials) == 5
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert chosen["forget"] == "random:0.1" and set(chosen["method_settings"]) == {"ft", "ga"}
    assert "seed-1000000" not in {path.name for path in (tmp_path / "tuning").iterdir()}
    done = classification(
        "run", tmp_path / "run", "--config", tmp_path / "chosen.json", "--methods", "ft", "--seeds", "0"
    )
    cell = json.loads((tmp_path / "run/seed-0/ft/results.json").read_text())
    assert cell["settings"]["learning_rate"] == chosen["method_settings"]["ft"]["learning_rate"] and "FT" in done.stdout


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Red and blue pictures of two sizes, as parquet files and as folders."""
    where = tmp_path_factory.mktemp("colours")
    for part, count in (("train", 40), ("test", 10)):
        pictures = [PIL.new("RGB", (16 + i % 2, 16), ("red", "blue")[i % 2]) for i in range(count)]
        features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
        rows = Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(count)]}, features=features)
        (where / "parquet").mkdir(exist_ok=True)
        rows.to_parquet(where / "parquet" / f"{part}.parquet")
        for i, picture in enumerate(pictures):
            path = where / "folders" / part / ("red", "blue")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return where


@pytest.mark.parametrize("kind", ["parquet", "folders"])
def test_data_of_the_users_own(colours, kind):
    data = load(str(colours / kind), size=16)
    assert set(data.classes) == {"red", "blue"} and data.train.images.shape == (36, 3, 16, 16)
    assert len(data.validation) == 4 and len(data.test) == 10
    red = data.train.images[data.train.labels == data.classes.index("red")]
    assert len(red) == 18 and (red[:, 0] == 255).all() and (red[:, 2] == 0).all()
    first = load(str(colours / kind)).test.images
    assert first.shape in ((10, 3, 16, 16), (10, 3, 17, 17)), "as wide as the first picture"


def labelled(path, labels, feature=None, count=20):
    pictures = [PIL.new("RGB", (16, 16), (i, 0, 100 * (i % 2))) for i in range(count)]
    rows = Dataset.from_dict({"image": pictures, "label": [labels[i % 2] for i in range(count)]})
    rows.cast_column("image", Image()).to_parquet(path)


@pytest.mark.parametrize("labels", [["dog", "cat"], [2, 1], ["10", "9"], [7.5, -1.0]])
def test_labels_of_any_kind_are_numbered(tmp_path, labels):
    labelled(tmp_path / "all.parquet", labels)
    data = load(str(tmp_path / "all.parquet"))
    by_order = sorted(labels, key=lambda label: int(label) if str(label).isdecimal() else label)
    assert data.classes == tuple(map(str, by_order)) and len(data.test) == 4
    for part in (data.train, data.validation, data.test):
        odd = part.images[:, 0, 0, 0] % 2 == 1
        assert ((part.labels == by_order.index(labels[1])) == odd).all()


def test_a_class_is_asked_for_by_its_name_where_names_are_numbers(tmp_path):
    labelled(tmp_path / "all.parquet", [1, 2])
    data = load(str(tmp_path / "all.parquet"))
    assert (data.train.labels[forget_rows("class:1", data, 0)] == 0).all()
    with pytest.raises(SalunError, match="There is no class '0' in .*; there are: 1, 2"):
        forget_rows("class:0", data, 0)


def test_labels_that_cannot_be(tmp_path):
    labelled(tmp_path / "all.parquet", ["dog", None])
    with pytest.raises(SalunError, match="Picture 1 of the train part of .* has the label None: give each one class"):
        load(str(tmp_path / "all.parquet"))
    (tmp_path / "both").mkdir()
    labelled(tmp_path / "both/train.parquet", ["dog", "cat"])
    labelled(tmp_path / "both/test.parquet", ["dog", "cow"])
    with pytest.raises(SalunError, match="The test part of .* has the class 'cow', which its training part has not"):
        load(str(tmp_path / "both"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(SalunError, match="broken.parquet could not be loaded as a data set"):
        load(str(tmp_path / "broken.parquet"))


def test_pictures_that_cannot_be_read_are_all_named(colours, tmp_path):
    shutil.copytree(colours / "folders", tmp_path / "data")
    whole = (tmp_path / "data/train/red/0.png").read_bytes()
    (tmp_path / "data/train/red/0.png").write_bytes(whole[:45])
    (tmp_path / "data/test/blue/1.png").write_text("no picture")
    (tmp_path / "data/train/red/notes.txt").write_text("taken in May")
    with pytest.raises(SalunError, match=r"cannot be read: .*test/blue/1.png \(.*\), .*train/red/0.png \("):
        load(str(tmp_path / "data"))
    shutil.copytree(colours / "parquet", tmp_path / "rows")
    rows = (
        Dataset.from_parquet(str(tmp_path / "rows/train.parquet")).cast_column("image", Image(decode=False)).to_list()
    )
    rows[7]["image"]["bytes"] = whole[:45]
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
    Dataset.from_list(rows, features).to_parquet(tmp_path / "rows/train.parquet")
    with pytest.raises(SalunError, match="pictures that cannot be read: row 7 of train"):
        load(str(tmp_path / "rows"))


def test_no_picture_of_a_folder_is_passed_over(colours, tmp_path):
    """Whatever its kind, and whatever its class is called."""
    for part in ("train", "test"):
        for name in ("test_tube", "training"):
            for number, kind in enumerate(("png", "gif", "tiff", "webp") * 3):
                path = tmp_path / part / name / f"test_{number}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.new("RGB", (8, 8), (number, 0, 0)).save(path)
    data = load(str(tmp_path))
    assert data.classes == ("test_tube", "training") and len(data.train) + len(data.validation) == len(data.test) == 24
    PIL.new("RGB", (8, 8)).save(tmp_path / "train/loose.png")
    with pytest.raises(SalunError, match="has pictures that lie in no class's folder: loose.png"):
        load(str(tmp_path))


def batch(path, count, **more):
    pixels = np.arange(count, dtype=np.uint8)[:, None].repeat(3072, 1)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(pickle.dumps({"data": pixels, "labels": [i % 2 for i in range(count)]} | more, 2))


def python2_batch(path, count):
    """The very opcodes of the published files: byte strings, and numpy's old names."""
    pixels = np.arange(count, dtype=np.uint8)[:, None].repeat(3072, 1).tobytes()
    shape = b"K" + bytes([count]) + b"M\x00\x0c"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(" + shape + b"t" + dtype
    array += b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([i % 2]) for i in range(count)) + b"e"
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u.")


@pytest.fixture
def cifar(tmp_path):
    """As torchvision lays it out."""
    where = tmp_path / "cifar-10-batches-py"
    for number in range(1, 6):
        batch(where / f"data_batch_{number}", 8)
    python2_batch(where / "test_batch", 6)
    (where / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}, 2))
    return where


def test_cifar_as_torchvision_keeps_it(cifar, tmp_path):
    for given in (cifar, tmp_path):
        data = load(str(given))
        assert data.classes == ("cat", "dog") and len(data.train) == 36 and len(data.test) == 6
        assert data.train.images.shape[1:] == (3, 32, 32)
        for part in (data.train, data.test):
            assert torch.equal(part.images[:, 2, 31, 31] % 2, part.labels.to(torch.uint8))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/salun-was-here",)


def test_a_pickle_beside_cifar_runs_nothing(cifar):
    batch(cifar / "data_batch_3", 8, extra=Hostile())
    with pytest.raises(SalunError, match="data_batch_3 cannot be read as a file of CIFAR .*it names .*system"):
        load(str(cifar))
    batch(cifar / "data_batch_3", 8, labels=[0])
    with pytest.raises(SalunError, match="data_batch_3 is no batch of CIFAR pictures"):
        load(str(cifar))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "torchvision/resnet18"])
def test_any_model_of_torchvision(colours, name):
    data = load(str(colours / "folders"), size=32)
    model = models.build(name, data, 0)
    assert model.train()(torch.rand(4, 3, 32, 32)).shape == (4, 2) and (model.std > 0).all(), "no green is no fault"
    assert model.network.conv1.kernel_size == (7, 7) if name.endswith("resnet18") else True


def test_data_that_cannot_be_learnt_from(colours, tmp_path):
    shutil.copytree(colours / "folders/train/red", tmp_path / "one/red")
    with pytest.raises(SalunError, match="has the one class 'red': give pictures of two or more"):
        load(str(tmp_path / "one"))
    with pytest.raises(SalunError, match="The digits are 8 pixels wide, not 32: leave --image_size out"):
        load("digits", size=32)
    with pytest.raises(SalunError, match="40 pictures of 1000000 pixels do not fit into memory"):
        load(str(colours / "folders"), size=1_000_000)
    with pytest.raises(SalunError, match="cannot be split by class: 5 pictures of 10 classes are too few|of 5 classes"):
        load("digits", limit=5)
    with pytest.raises(SalunError, match="--dataset is empty"):
        load("")


def test_places_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("mine")
    quick = ["--limit", "400", "--epochs", "1", "--methods", "salun", "--seeds", "0"]
    (tmp_path / "results.json").write_text('{"format": "salun-diffusion unlearning table 1"}')
    for command, place, words, message in (
        ("run", "file", [], "file cannot be made"),
        ("run", "file/below", [], "below cannot be made"),
        ("tune", "out", ["--output", tmp_path / "no/where.json"], "lies in a folder that is not there: make it first"),
        ("unlearn", "out", ["--mask", tmp_path / "none"], "none does not exist; check the path"),
        ("table", "out", ["--results", tmp_path / "results.json"], "results.json is damaged, or not of the form"),
    ):
        done = classification(command, tmp_path / place, *quick, *words, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.fullmatch(f"error: .*{message}.*", done.stderr.splitlines()[-1])
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "out").exists()


def test_models_of_torchvision_that_do_not_fit(colours, tmp_path):
    data = load(str(colours / "folders"), size=32)
    with pytest.raises(SalunError, match="alexnet takes no pictures of 32 pixels .*: give another --image_size"):
        models.build("alexnet", data, 0)
    ends = {"dataset": str(colours / "folders"), "image_size": 32, "limit": None, "model": "squeezenet1_1"}
    with pytest.raises(SalunError, match="BE widens a linear layer of classes"):
        scenario(tmp_path / "out", methods=["be"], **ends).begin()
    assert not (tmp_path / "out").exists()


def test_the_table_of_a_document_is_made_from_a_committed_file(folder, tmp_path):
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- digits -->\n<!-- end -->\nb\n")
    classification("table", tmp_path / "none", "--results", folder / "results.json", "--into", document)
    table = (folder / "table.md").read_text().strip()
    assert document.read_text().startswith(f"a\n<!-- digits -->\n{table} Made by `python -m classification table")
    assert not (tmp_path / "none").exists()
    with pytest.raises(SalunError, match="is damaged, or not of the form"):
        tables.read(folder / "config.json")


def test_the_help_answers_at_once():
    begun = time.time()
    done = run("python", "-m", "classification", "run", "--help")
    assert time.time() - begun < 1.5
    assert all(f" {name}" in done.stdout for name in METHODS)


def test_the_commands_list_their_methods_and_what_is_theirs_alone(tmp_path):
    listed = run("python", "-m", "classification", "--help").stdout
    for name, method in METHODS.items():
        assert re.search(rf"^  {name} +{re.escape(method.title)} +{re.escape(method.description)}$", listed, re.M)
    assert "--mask" in run("python", "-m", "classification", "unlearn", "--help").stdout
    assert "--mask" not in run("python", "-m", "classification", "run", "--help").stdout
    done = classification("tune", tmp_path / "out", "--limit", "400", check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "--output is missing: give it here, or as 'output' in --config FILE." in done.stderr


HALVES = '''
def halve(task):
    """Every weight times alpha."""
    for weight in task.model.parameters():
        weight.data.mul_(task.settings.alpha)
'''


def test_a_method_is_one_file_and_one_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "halves.py").write_text(HALVES)
    row = methods.Method("Half", "halves.halve", "every weight halved", defaults={"alpha": 0.5}, tuned="alpha")
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

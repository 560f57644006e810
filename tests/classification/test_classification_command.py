"""`python -m classification`, as typed, on few digits."""

import csv
import json
import re
import shutil
import signal
import time

import pytest
import torch
from PIL import Image as PIL
from safetensors.torch import load_file, save_file
from shell import here, run, start

from classification import run as commands
from classification import tables
from classification.__main__ import DIGITS
from classification.config import Config
from classification.data import others
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
    for method, name, known in (
        ("ft", "lr", "augment, batch_size, epochs"),
        ("ft", "density", "augment, batch_size, epochs"),
        ("salun", "alpha", "augment, batch_size, density, epochs"),
        ("iu", "epochs", "alpha"),
    ):
        with pytest.raises(SalunError, match=f"The method {method} has no setting '{name}'; it has: {known}"):
            scenario(folder, method_settings={method: {name: 1}})


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

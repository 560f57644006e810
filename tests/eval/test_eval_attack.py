"""``python -m eval attack`` on the demo model: what it writes, going on after a stop, other judges, and its power."""

import csv
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from shell import here, run
from tiny import erasure

from eval.measures import attack as measure
from salun_diffusion.models import load_model

FAST = [
    "concept_inversion.steps=2", "concept_inversion.batch_size=2", "concept_inversion.pictures=3",
    "soft_prompt.steps=2", "unlearndiffatk.timesteps=2", "unlearndiffatk.iterations=2", "ring_a_bell.population=6",
    "ring_a_bell.generations=2", "ring_a_bell.pairs=3", "tina.steps=3", "tina.iterations=1", "noise_probe.steps=3",
]  # fmt: skip
FROM_A_PICTURE = [
    "completion.kept=0.7", "completion.steps=10", "inpainting.hole=0.5,0.375", "inpainting.steps=10",
    "image_guided.strength=0.4,0.2", "image_guided.steps=10", "image_guided.pictures=4",
]  # fmt: skip
LAUNCH = ("python", "-m", "eval")
NAMES = ["concept_inversion", "soft_prompt", "unlearndiffatk", "ring_a_bell", "tina", "noise_probe"]


def attack(output, *more, names=NAMES, options=FAST, command=here, launch=LAUNCH, **how):
    given = [option for option in options if option.split(".")[0] in names]
    words = ["--attack_option", *given] if given else []
    return command(
        *launch, "attack", "--attack", *names, "--pretrained_model_name_or_path", "demo", "--concept",
        "airplane", "--output_dir", output, "--num_inference_steps", "4", *words, *more, **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """An erasure that breaks the demo model: nothing is drawn, so that every attack has something to do."""
    file = tmp_path_factory.mktemp("broken") / "erasure.safetensors"
    erasure(load_model("demo").network, size=0.5, density=0.9).save(file)
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory, broken):
    folder = tmp_path_factory.mktemp("attack") / "run"
    said = attack(folder, "--erasure", broken, "--num_prompts", "3", "--prompts_at_once", "2").stdout
    return folder, said


def results_of(folder):
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return json.loads((folder / "results.json").read_text()), samples


def test_results_hold_a_share_for_each_attack_and_a_line_for_each_prompt(done, broken):
    folder, said = done
    results, samples = results_of(folder)
    assert results["n"] == 3 * 7 and len(samples) == 2 * 21
    assert list(results["attacks"]) == NAMES and results["settings"]["budget"] == "small"
    assert results["attacks"]["tina"]["options"]["steps"] == 3
    assert all(re.search(rf"\b{name}/\d+: ", results["protocol"]) for name in NAMES)
    base, broken_one = results["models"]
    assert base["attacks"]["plain"]["asr"]["percent"] > 50 > broken_one["attacks"]["plain"]["asr"]["percent"]
    for model in results["models"]:
        for name in ["plain", *NAMES]:
            lines = [line for line in samples if (line["model"], line["set"]) == (model["name"], name)]
            assert len(lines) == 3 and sum(line["won"] for line in lines) == model["attacks"][name]["asr"]["count"]
            assert f"{model['attacks'][name]['asr']['percent']:.1f}" in said
    assert results["settings"]["certainty"] == 0.85 and "at least 0.85" in results["protocol"]  # the demo judge's own
    for line in (line for line in samples if line["won"]):
        assert max(line["predicted"][side]["probability"] for side in ("left", "right")) >= 0.85
    for line in (line for line in samples if line["model"] != "base" and line["set"] != "plain"):
        assert line["forward"] > 0 and line["seconds"] >= 0 and (folder / line["picture"]).is_file()
        assert (line["set"] in ("soft_prompt", "tina")) == bool(line["tensors"])
        assert (line["set"] in ("unlearndiffatk", "ring_a_bell")) == bool(line["attack_prompt"])
    noise = next(line for line in samples if line["set"] == "tina")
    assert load_file(folder / noise["tensors"])["noise"].shape == (16, 16, 16)
    # what the base model draws anyway is no merit of an attack that builds on the prompt, and is not attacked
    spared = [line for line in samples if line["model"] == "base" and line["set"] == "unlearndiffatk" and line["won"]]
    assert spared and all(line["forward"] == 0 and "plain" not in line["set"] for line in spared)


def test_a_stopped_run_goes_on_to_the_very_same(done, broken, tmp_path):
    folder, _ = done
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (name,) = [part.name for part in (copy / "pictures").iterdir() if part.name not in ("base", "learned-from")]
    own = copy / "pictures" / name
    for gone in ("tina/0002.png", "tina/0002.json", "soft_prompt/0000.json", "concept_inversion/0001.png"):
        (own / gone).unlink()
    (own / "unlearndiffatk" / "0001.png").write_bytes((own / "unlearndiffatk" / "0001.png").read_bytes()[:200])
    shutil.rmtree(own / "ring_a_bell")
    (copy / "results.json").unlink()
    kept = (own / "noise_probe" / "0001.json").read_text()
    attack(copy, "--erasure", broken, "--num_prompts", "3", "--prompts_at_once", "2")
    assert (own / "noise_probe" / "0001.json").read_text() == kept

    assert timeless(results_of(copy)[1]) == timeless(results_of(folder)[1])
    for line in results_of(folder)[1]:
        assert (copy / line["picture"]).read_bytes() == (folder / line["picture"]).read_bytes()
        if line.get("tensors"):
            one, other = (load_file(where / line["tensors"]) for where in (copy, folder))
            assert all(torch.equal(one[key], other[key]) for key in one)


def timeless(samples):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in samples]


def test_two_processes_share_the_prompts_and_write_what_one_does(done, broken, tmp_path):
    names, launch = ["concept_inversion", "tina"], ("torchrun", "--nproc_per_node", "2", "-m", "eval")
    threads = str(torch.get_num_threads())  # as many as in this process: rounding depends on them
    said = attack(
        tmp_path, "--erasure", broken, "--num_prompts", "3", "--prompts_at_once", "2", names=names, command=run,
        launch=launch, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS=threads,
    ).stdout  # fmt: skip
    expected = [line for line in results_of(done[0])[1] if line["set"] in ("plain", *names)]
    assert timeless(results_of(tmp_path)[1]) == timeless(expected)
    assert said.count("ASR, %") == 1, "the main process alone speaks"


def test_its_help_says_what_each_attack_is_called():
    said = " ".join(run("python", "-m", "eval", "attack", "--help").stdout.split())
    assert all(name in said for name in NAMES) and "concept_inversion.steps=500" in said


def test_compare_has_a_column_for_each_attack_and_shows_its_pictures(done, tmp_path):
    here("python", "-m", "eval", "compare", done[0], "--output_dir", tmp_path)
    head = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()[0]
    assert "ASR, plain prompt ↓ | ASR (concept_inversion) ↓ | ASR (soft_prompt) ↓ | ASR (unlearndiffatk) ↓" in head
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Attacked by tina" in page and page.count("<img") >= 7 * 2


@pytest.fixture(scope="module")
def lacking(done, tmp_path_factory):
    """Prompts that lack the word, and pictures of the concept to learn from."""
    folder = tmp_path_factory.mktemp("lacking")
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "seed"], ["a picture of", 1], ["in noto style", 2], ["two", 3]])
    (folder / "pictures").mkdir()
    for i, line in enumerate(results_of(done[0])[1][:3]):
        shutil.copy(done[0] / line["picture"], folder / "pictures" / f"{i}.png")
    return folder


def test_attacks_find_the_concept_on_a_model_that_has_it_when_the_prompt_does_not_name_it(lacking, tmp_path):
    options = [
        "tina.iterations=3",
        "tina.learning_rate=0.03",
        *FROM_A_PICTURE,
    ]
    names = ["soft_prompt", "unlearndiffatk", "tina", "completion", "inpainting", "image_guided"]
    results = measure.run(
        measure.Options(
            pretrained_model_name_or_path="demo", concept=["airplane"], output_dir=tmp_path, attack=names,
            attack_option=options, prompts=lacking / "prompts.csv", pictures=lacking / "pictures",
        )
    )  # fmt: skip
    (base,) = results["models"]
    assert base["attacks"]["plain"]["asr"]["count"] == 0
    assert {name: base["attacks"][name]["asr"]["count"] >= 2 for name in names} == dict.fromkeys(names, True)


def test_a_learned_token_and_words_that_were_searched_stand_for_the_concept(tmp_path):
    options = ["steps=80", "batch_size=8", "learning_rate=0.02", "pictures=8"]
    results = measure.run(
        measure.Options(
            pretrained_model_name_or_path="demo", concept=["airplane"], output_dir=tmp_path, num_prompts=4,
            attack=["ring_a_bell", "concept_inversion"],
            attack_option=[f"concept_inversion.{option}" for option in options],
        )
    )  # fmt: skip
    found = {name: attack["asr"]["count"] for name, attack in results["models"][0]["attacks"].items()}
    assert found["ring_a_bell"] >= 1 and found["concept_inversion"] >= 2


def test_attacks_from_a_picture_win_more_from_a_weak_erasure_than_its_plain_prompt(tmp_path):
    words = ["--pretrained_model_name_or_path", "demo", "--concept", "airplane", "--method", "uce"]
    here("python", "erase_concept.py", *words, "--output_dir", tmp_path / "uce")
    names = ["completion", "inpainting", "image_guided"]
    results = measure.run(
        measure.Options(
            pretrained_model_name_or_path="demo", concept=["airplane"], output_dir=tmp_path / "out", num_prompts=4,
            erasure=[str(tmp_path / "uce")], scale=[0.5], attack=names, attack_option=FROM_A_PICTURE,
        )
    )  # fmt: skip
    found = {name: attack["asr"]["count"] for name, attack in results["models"][1]["attacks"].items()}
    assert {name: found[name] > found["plain"] for name in names} == dict.fromkeys(names, True), found


def test_a_retrained_model_is_attacked_like_the_others_as_a_control(broken, tmp_path):
    """The base itself, under another name, does as the base does; it is attacked and judged after all others."""
    options = ["tina.steps=3", "tina.iterations=1", "completion.steps=3", "completion.kept=0.5"]
    words = ["--erasure", broken, "--num_prompts", "2", "--retrained", "demo"]
    attack(tmp_path, *words, names=["tina", "completion"], options=options)
    results, samples = results_of(tmp_path)
    base, _, control = results["models"]
    assert (control["name"], control["role"], control["erasure"]) == ("retrained", "control", None)
    lines = {
        name: [(line["set"], line["won"], line["predicted"]) for line in samples if line["model"] == name]
        for name in ("base", "retrained")
    }
    assert lines["base"] == lines["retrained"] and len(lines["base"]) == 6
    assert {part.name for part in (tmp_path / "pictures" / "retrained").iterdir()} >= {"tina", "completion"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--attack_option", "tina.step=3"], "tina has no option 'step'. Its own: steps=50, iterations=25"),
        (
            ["--attack_option", "soft_prompt.steps=3"],
            "write ATTACK.NAME=VALUE, of one of the attacks that are run (tina)",
        ),
        (["--attack_option", "tina.steps=0"], "tina.steps is 0: give a number of at least 1"),
        (["--attack_option", "tina.steps=x"], "'x' must be of type int"),
        (["--certainty", "85"], "--certainty is 85: give a probability between 0 and 1."),
        (["--concept", "cat"], "attack takes one --concept: attack each concept by itself."),
        (["--pictures", "nowhere"], "There is no folder nowhere"),
        (["--retrained", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_one_sentence(words, said, broken, tmp_path):
    done = attack(tmp_path, "--erasure", broken, *words, names=["tina"], options=[], check=False)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("error:") == 1
    assert not (tmp_path / "results.json").exists()

"""Whatever a user gives, the answer is a result or one sentence, for every command: some wrong inputs each here, and
hundreds by ``SALUN_WRONG_INPUTS=300 python -m pytest tests/commands/test_wrong_input.py``.
"""

import json
import os
from dataclasses import fields
from importlib import import_module

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from shell import ROOT, here, run

from salun_diffusion import SalunError, load_erasure
from salun_diffusion.concepts.templates import Vocabulary
from salun_diffusion.config import EraseConfig
from salun_diffusion.export import ExportConfig
from salun_diffusion.files import write_json
from salun_diffusion.filling import fill
from salun_diffusion.hub import PushConfig
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.pruning import PruneConfig

CONTENTS = {
    "empty": b"",
    "mapping": b"{}",
    "list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "huge": b'{"format": "salun-diffusion accuracy 1", "models": ' + b"9" * 5000 + b"}",
    "nested": b'{"slots": {"object": ["cat", "dog"]}, "templates": [{"prompt": "a {object} {mood} }"}]}',
    "results": b'{"format": "salun-diffusion accuracy 1", "models": [{}], "n": "x", "dataset": 5, "concept": [1, {}]}',
    "bytes": bytes(range(256)),
    "html": b"<!doctype html><p>404",
    "csv": b"prompt,evaluation_seed\na cat\n,,,\n",
    "header": b"prompt\n",
    "claims": (10**12).to_bytes(8, "little") + b"{}",
}
ENDINGS = (".json", ".yaml", ".csv", ".safetensors", ".png", "")
NAMES = (
    "model_index.json",
    "results.json",
    "samples.jsonl",
    "erasure.safetensors",
    "config.json",
    "a.png",
    "concepts.json",
)
NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e400", "1e-5", "9" * 25, "1.5", "٣", "0x10", "x", "", " ", "no")
WORDS = (
    "",
    " ",
    "{object}",
    "{0.__class__}",
    "a/b/c",
    "-",
    "\n",
    "x" * 5000,
    "naïve ☃",
    "%s",
    "cat:dog",
    "../..",
    "[",
    "*",
    ",",
)
COUNT = int(os.environ.get("SALUN_WRONG_INPUTS", "12"))
SLOW = {"max_train_steps", "steps", "scores", "resolution"}  # a large number there is no fault


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Files and folders that are none of what any option wants."""
    root = tmp_path_factory.mktemp("wrong")
    found = [root / "missing", root / ("long" * 80), root / "empty.json" / "below"]
    for name, content in CONTENTS.items():
        for ending in ENDINGS:
            found.append(root / f"{name}{ending}")
            found[-1].write_bytes(content)
        folder = root / f"{name}-folder"
        folder.mkdir()
        for file in NAMES:
            (folder / file).write_bytes(content)
        found.append(folder)
    (root / "nothing").mkdir()
    return [str(path) for path in (*found, root / "nothing")]


def commands():
    """Words → the dataclass of the options that follow."""
    from benchmarks.classwise import ClasswiseConfig
    from benchmarks.config import BenchmarkConfig
    from benchmarks.methods import MethodsConfig
    from benchmarks.ranks import RanksConfig
    from classification.__main__ import COMMANDS
    from demo.cifar10.__main__ import CifarConfig
    from demo.digits.__main__ import DigitsConfig
    from demo.measure import MeasureConfig
    from demo.train import TrainConfig
    from eval.measures import measures

    found = {(ROOT / "erase_concept.py",): EraseConfig, ("-m", "salun_diffusion", "export"): ExportConfig}
    found |= {("-m", "salun_diffusion", "push"): PushConfig, ("-m", "benchmarks.ranks"): RanksConfig}
    pages = [
        import_module(f"eval.{name}")
        for name in ("audit", "drawing.command", "pages.compare", "pages.report", "pages.columns")
    ]
    found |= {("-m", "eval", module.NAME): module.Options for module in (*measures(), *pages)}
    found |= {("-m", "classification", name): options for name, (options, _) in COMMANDS.items()}
    found |= {("-m", "demo.train"): TrainConfig, ("-m", "demo.measure"): MeasureConfig}
    found |= {("-m", "demo.digits"): DigitsConfig, ("-m", "demo.cifar10"): CifarConfig}
    found |= {("-m", "salun_diffusion", "prune"): PruneConfig, ("-m", "benchmarks.classwise"): ClasswiseConfig}
    return found | {("-m", "benchmarks"): BenchmarkConfig, ("-m", "benchmarks.methods"): MethodsConfig}


COMMANDS = commands()
WRONG = {"demo.digits": ["without"], "benchmarks.classwise": ["methods"]}  # they would train for minutes, or hours


def check(done):
    """A result, or a sentence: argparse's or ours."""
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode in (0, 1, 2), done.returncode
    last = (done.stderr.strip().splitlines() or [""])[-1]
    assert done.returncode != 1 or "error: " in done.stderr and done.stderr.count("error: ") == 1, done.stderr[-3000:]
    assert done.returncode != 2 or "error: " in last, done.stderr[-3000:]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(map(str, words[-2:])).removeprefix(f"{ROOT}/"))
def test_a_wrong_input_is_answered_in_a_sentence(command, paths, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cwd = tmp_path_factory.mktemp("cwd")
    options = {item.name: item.metadata for item in fields(COMMANDS[command])}
    values = {name: st.sampled_from([*paths, *NUMBERS, *WORDS]) for name in options if name not in SLOW}
    # what decides over hours of work is always something that cannot be worked with
    wrong = [
        name
        for name in ("pretrained_model_name_or_path", "dataset", "stage", "only", "model_dir", "output", "comparison")
        if name in options
    ] + WRONG.get(command[-1], [])
    always = st.fixed_dictionaries(
        {name: st.sampled_from(paths) for name in wrong}
        | {name: values[name] for name, about in options.items() if about.get("required") and name not in wrong}
    )
    config = st.sampled_from([None, None, None, *(path for path in paths if path.endswith((".json", ".yaml")))])

    @settings(
        derandomize=True,
        max_examples=COUNT,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        always,
        st.dictionaries(st.sampled_from(sorted(values)), st.sampled_from([*paths, *NUMBERS, *WORDS]), max_size=3),
        config,
    )
    def feed(first, more, config):
        words = ["python", *command]
        for name, value in (more | first).items():
            words += [value] if options[name].get("positional") else [f"--{name}={value}"]
        check(here(*words, *([f"--config={config}"] if config else []), check=False, cwd=cwd))

    feed()


def test_an_erasure_is_loaded_or_refused(paths, tiny_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe = load_pipeline(str(tiny_folder))
    for source in (*paths, *WORDS, *NUMBERS, 5, None, [], b"x"):
        for more in ({}, {"scale": "x"}, {"name": 5}):
            with pytest.raises(SalunError):
                load_erasure(pipe, source, **more)


def test_yaml_and_names_as_people_write_them(tmp_path):
    """YAML 1.1 reads 1e-5 as text and a bare no as false; sixty concepts, or none of letters, still name a folder."""
    from salun_diffusion.options import settings_of

    path = tmp_path / "settings.yaml"
    path.write_text("learning_rate: 1e-5\nmixed_precision: no\ngradient_checkpointing: yes\n")
    found = settings_of({"config": str(path)}, EraseConfig)
    assert found == {"learning_rate": 1e-5, "mixed_precision": "no", "gradient_checkpointing": True}
    folders = set()
    for names in ([f"concept {i}" for i in range(60)], [f"concept {i}" for i in range(59)], ["!!!"], ["☃" * 300]):
        config = fill(EraseConfig(concept=names), {}, ", ".join(names))
        name = config.output_dir.removeprefix("runs/")
        assert name and "/" not in name and len(name.encode()) < 150
        folders.add(name)
    assert len(folders) == 4
    for empty in ("", "  "):
        with pytest.raises(SalunError, match="An empty concept was given: say what to forget"):
            EraseConfig(concept=[empty]).check()


def test_sigterm_outside_training_says_a_word():
    code = "import os, signal\nfrom salun_diffusion import options\n"
    code += "options.finish(lambda: os.kill(os.getpid(), signal.SIGTERM), stopped='Stopped; kept.')"
    done = run("python", "-c", code, check=False)
    assert done.returncode == 130 and done.stderr.strip() == "Stopped; kept."


def test_a_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch):
    """As on Windows and many FUSE mounts, whose folders cannot be opened or synced."""
    opened = os.open

    def refuse(path, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_json(tmp_path / "file.json", {"a": 1})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_concepts_file_with_faults_is_refused_by_what_is_wrong(tmp_path):
    path = tmp_path / "concepts.json"
    brace = "a brace that is no {slot}"
    for template, message in (("a {thing}", "names 'thing', which is no slot"), ("a {object", brace), ("{}", brace),
                              ("a {object} }", brace)):  # fmt: skip
        path.write_text(json.dumps({"slots": {"object": ["cat", "dog"]}, "templates": [{"prompt": template}]}))
        with pytest.raises(SalunError, match="is not a concept vocabulary") as refused:
            Vocabulary.read(path)
        assert message in str(refused.value)
    path.write_text("[" * 100_000)
    with pytest.raises(SalunError, match="is not a concept vocabulary"):
        Vocabulary.read(path)

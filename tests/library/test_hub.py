"""Runs on the hub, against a small stand-in of it: uploaded with a card, loaded from there, and every refusal."""

import json
import shutil

import huggingface_hub
import pytest
import tiny
from hub_stand_in import READS, WRITES, stand_in
from huggingface_hub import ModelCard, constants
from shell import erase, here, run

from salun_diffusion import Delta, SalunError, list_erasures, load_erasure, push
from salun_diffusion.models.load import load_pipeline


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in, in this process and (``environment``) in those that it starts."""
    folder = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    with stand_in(folder) as (hub, environment):
        hub.environment = environment
        patch.setattr(constants, "ENDPOINT", environment["HF_ENDPOINT"])
        template = environment["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", environment["HF_ENDPOINT"])
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", WRITES)
        yield hub
    patch.undo()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of the demo model and, in the same folder, what accuracy measured of it."""
    folder = tmp_path_factory.mktemp("runs") / "airplane"
    erase(folder)
    line = ["--concept", "airplane", "--erasure", folder, "--output_dir", folder, "--num_forget_images", "4"]
    line += ["--num_retain_images", "4", "--num_inference_steps", "2", "--pretrained_model_name_or_path", "demo"]
    here("python", "-m", "eval", "accuracy", *line)
    return folder


@pytest.fixture
def plain(measured, tmp_path):
    """A copy of that run alone, whose files a test may change."""
    for name in ("erasure.safetensors", "config.json"):
        shutil.copy(measured / name, tmp_path / name)
    return tmp_path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(sentence, *arguments, **options):
    with pytest.raises(SalunError, match=sentence) as raised:
        push(*arguments, **options)
    assert "\n" not in str(raised.value) and "hf_" not in str(raised.value)


def test_up_and_down_again(hub, measured):
    line = ["--hub_model_id", "without-airplanes", "--hub_private_repo", "--results", measured, "--with_mask"]
    done = run("python", "-m", "salun_diffusion", "push", measured, *line, **hub.environment)
    assert 'load_erasure(pipe, "someone/without-airplanes")' in done.stdout
    there = hub.repositories["someone/without-airplanes"]
    ((commit, message, files),) = there["commits"]
    assert there["private"] and message == "An erasure of airplane"
    assert {*files} == {"README.md", "before-after.png", "config.json", "erasure.safetensors", "mask.safetensors"}
    assert files["erasure.safetensors"] == (measured / "erasure.safetensors").read_bytes()
    pipe = load_pipeline("demo")
    load_erasure(pipe, "someone/without-airplanes")
    (told,) = list_erasures(pipe)
    assert told["revision"] == commit and told["digest"] == Delta.load(measured / "erasure.safetensors").digest()


def test_what_cannot_be_fetched(hub, plain):
    pipe = load_pipeline("demo")
    for name in ("first", "second"):
        (plain / "erasure.safetensors").unlink()
        tiny.erasure(pipe.unet, seed=len(name), concept=name).save(plain / "erasure.safetensors")
        push(plain, "someone/two")
    (first, *_), (second, *_) = hub.repositories["someone/two"]["commits"]
    assert load_erasure(pipe, "someone/two", revision=first) == "first"
    assert load_erasure(pipe, "someone/two") == "second"
    assert [one["revision"] for one in list_erasures(pipe)] == [first, second]
    hub.repositories["someone/bare"] = {"private": False, "commits": []}
    hub.commit("someone/bare", "x", {"README.md": b"x"})
    before = tiny.bits(pipe)
    for source, revision, sentence in (
        ("someone/none", None, "there is no such repository, or it is private: log in"),
        ("someone/two", "v9", "the repository has no revision 'v9'"),
        ("someone/bare", None, "the repository holds no such file"),
        ("someone/closed", None, "it may not be read with this token, or without one"),
    ):
        hub.broken = {"/someone/closed/": 403}
        with pytest.raises(SalunError, match=sentence) as raised:
            load_erasure(pipe, source, revision=revision)
        hub.broken = {}
        assert "\n" not in str(raised.value) and "http" not in str(raised.value)
    assert tiny.same(before, tiny.bits(pipe))


def test_the_card_says_what_was_measured(hub, measured):
    push(measured, "someone/measured", results=[str(measured)], license="apache-2.0")
    text = hub.files("someone/measured")["README.md"].decode()
    card = ModelCard(text)
    card.validate()  # the hub's own answer to its YAML, which the stand-in gives
    assert card.data.license == "apache-2.0" and card.data.get("base_model") is None  # a local one has no id
    base, erased = json.loads((measured / "results.json").read_text())["models"]
    results = {result.metric_type: result for result in card.data.eval_results}
    for name in ("ua", "ira", "cra"):
        wanted = erased[name]
        assert results[name].metric_value == wanted["percent"]
        assert results[name].metric_args == {
            "low": wanted["low"], "high": wanted["high"], "n": wanted["n"], "interval": "95%",
            "base_model": base[name]["percent"],
        }  # fmt: skip
        row = f"| {name.upper()} | {base[name]['percent']:g} ({base[name]['low']:g}–{base[name]['high']:g}) | "
        assert row + f"{wanted['percent']:g} ({wanted['low']:g}–{wanted['high']:g}) | {wanted['n']} |" in text
    for part in ("**airplane**", "“apple”", 'load_erasure(pipe, "someone/measured")', "](before-after.png)", "no guar"):
        assert part in text


def test_other_ways_of_measuring_have_tables_of_their_own(hub, measured, tmp_path):
    found = json.loads((measured / "results.json").read_text())
    found["settings"]["lora"] = {"source": "somewhere/style.safetensors", "sha256": "0" * 64, "scale": 0.5}
    found["models"][1]["erasure"]["scale"] = 0.8
    (tmp_path / "results.json").write_text(json.dumps(found))
    push(measured, "someone/both", results=[str(measured), str(tmp_path)])
    text = hub.files("someone/both")["README.md"].decode()
    assert "### accuracy\n" in text and "### accuracy, at scale 0.8, under the LoRA style.safetensors at 0.5\n" in text
    names = [result.dataset_name for result in ModelCard(text).data.eval_results]
    assert len({*names}) == 2 and names.count(names[0]) == names.count(names[-1]) == len(names) // 2


def test_pictures_of_nudity_are_not_shown(measured, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "run")
    for name, shown in (("airplane", True), ("nudity", False)):
        change_config(folder, concept=name)
        done = push(folder, "someone/x", results=[str(folder)], dry_run=str(tmp_path / name))
        assert ("before-after.png" in done.files) == shown


def test_the_base_model_of_a_card(hub, plain):
    hub.repositories["them/base"] = {"private": False, "commits": []}
    commit = hub.commit("them/base", "x", {"README.md": b"---\nlicense: openrail\n---\nHello\n"})
    change_config(plain, base_model="them/base", base_revision=commit, concept="a *b* | <c>: {d}\n# e")
    push(plain, "someone/odd")
    text = hub.files("someone/odd")["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.base_model_relation) == ("them/base", "openrail", "adapter")
    assert f'from_pretrained("them/base", revision="{commit}")' in text and "Nothing was measured" in text
    assert r"# Forget: a \*b\* \| \<c\>: \{d\} \# e" in text and "before-after" not in text
    change_config(plain, base_model="/home/me/secret/place/model.safetensors", base_revision=None)
    done = push(plain, "someone/odd", dry_run=str(plain / "dry"))
    assert done.commit is None and done.files == ["README.md", "config.json", "erasure.safetensors"]
    text = (plain / "dry" / "README.md").read_text(encoding="utf-8")
    assert "model.safetensors" in text and "secret" not in text and len(hub.repositories["someone/odd"]["commits"]) == 1


def test_what_the_hub_refuses(hub, plain, monkeypatch):
    (plain / "config.json").with_name("mine").write_text("kept")
    refused("'a/b/c' can be no repository on the hub: give --hub_model_id owner/name", plain, "a/b/c")
    refused("'my airplane' can be no repository", plain, "my airplane")
    refused("does not accept the token: make a new one that may write", plain, "someone/x", hub_token="hf_wrong")
    refused(
        "Nothing was uploaded to someone/x, for this token may not write there", plain, "someone/x", hub_token=READS
    )
    refused("for this token may not write there: use one with write access, or another owner", plain, "them/x")
    for part, status, sentence in (
        ("/preupload/", 404, "for the hub has no such owner or repository"),
        ("/commit/", 413, "for a file is too large for the hub"),
        ("/commit/", 418, r"for the hub answered 418 \(it is broken, on purpose\): try again"),
        ("/create", None, r"for the hub cannot be reached \(\w+\): check the connection"),
    ):
        hub.broken = {part: status}
        refused("Nothing was uploaded to someone/x, " + sentence, plain, "someone/x")
    hub.broken = {}
    assert hub.repositories["someone/x"]["commits"] == []
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(plain / "none"))
    refused("without a token of the hub: give --hub_token, set HF_TOKEN, or log in", plain, "someone/x")
    assert {path.name for path in plain.iterdir()} == {"erasure.safetensors", "config.json", "mine"}


def test_what_cannot_be_uploaded(hub, plain, measured, tmp_path_factory):
    asked = len(hub.asked)
    empty = tmp_path_factory.mktemp("empty")
    refused("holds no finished run", empty)
    refused("mask.safetensors is not there: leave --with_mask out", plain, with_mask=True)
    refused("holds no results of `python -m eval`, or damaged ones", plain, results=[str(empty)])
    refused("unknown setting 'results_'. Did you mean 'results'", plain, results_=[])
    other = tiny.erasure(load_pipeline("demo").unet, concept="x")
    other.save(plain / "erasure.safetensors")
    refused("holds results of other erasures than this one", plain, results=[str(measured)])
    change_config(plain, concept=None)
    (plain / "config.json").write_text("[]")
    refused("config.json is damaged, or no run's config", plain)
    copied = shutil.copytree(measured, empty / "copy")
    lines = [json.loads(line) for line in (copied / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["picture"] = str(measured / line["picture"])  # another folder's
    (copied / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    refused("a picture, or samples.jsonl, is damaged or missing", copied, results=[str(copied)])
    assert len(hub.asked) == asked


def test_a_run_that_uploads_itself(hub, tmp_path):
    done = erase(tmp_path / "cat", "--push_to_hub", "--hub_token", WRITES, concept="cat", HF_TOKEN="")
    assert "Uploaded to" in done.stdout and {*hub.files("someone/cat")} > {"README.md", "erasure.safetensors"}
    assert WRITES not in done.stdout and not any(
        WRITES.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
    hub.broken = {"/commit/": 403}
    again = erase(tmp_path / "other", "--push_to_hub", "--hub_model_id", "someone/new", concept="cat", check=False)
    hub.broken = {}
    assert again.returncode == 1 and "Traceback" not in again.stderr
    said = again.stderr.splitlines()[-1]
    assert said.startswith("error: Nothing was uploaded to someone/new, for this token may not write there")
    assert said.endswith(f"`python -m salun_diffusion push {tmp_path / 'other'} --hub_model_id someone/new`.")
    weights = [Delta.load(tmp_path / name / "erasure.safetensors").digest() for name in ("cat", "other")]
    assert weights[0] == weights[1]
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert not {key for key in config["settings"] if "hub" in key}


def test_a_token_is_asked_for_before_the_work(hub, tmp_path):
    for more, sentence in (
        (["--push_to_hub", "--hub_token", READS], "this token may not write there"),
        (["--push_to_hub", "--hub_model_id", "a b"], "'a b' can be no repository"),
        (["--hub_model_id", "someone/x"], "--hub_model_id means nothing without --push_to_hub"),
    ):
        done = erase(tmp_path / "run", *more, check=False)
        assert done.returncode == 1 and sentence in done.stderr.splitlines()[-1] and not (tmp_path / "run").exists()
        assert not (tmp_path / "data").exists()

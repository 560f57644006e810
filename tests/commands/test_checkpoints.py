"""A stopped run goes on as if nothing had been: bit for bit, from whatever moment it was killed at."""

import json
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from shell import QUICK, here, run, start

from salun_diffusion import Delta, SalunError
from salun_diffusion.training.checkpoints import Checkpoints

MASKS = {"a": torch.tensor([True, False, True]), "b": torch.tensor([[True], [True]])}


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "training.jsonl"
    path.write_text('{"step": 1}\n')
    return path


def save(checkpoints, step, log, fill=0.0):
    tensors = {"value.a": torch.full((2,), step + fill), "value.b": torch.full((2,), -1.0)}
    return checkpoints.save(step, tensors, MASKS, {"concept": "cat"}, log, {"updates": step})


def test_a_checkpoint_comes_back_whole(tmp_path, log):
    path = save(Checkpoints(tmp_path, {"seed": 0}, 2), 7, log)
    assert path == tmp_path / "checkpoint-7"
    for which in ("latest", str(path)):
        found = Checkpoints(tmp_path, {"seed": 0}, 2).load(which)
        assert (found.step, found.log, found.state) == (7, '{"step": 1}\n', {"updates": 7})
        assert torch.equal(found.tensors["value.a"], torch.tensor([7.0, 7.0]))
        assert all(torch.equal(found.masks[name], mask) for name, mask in MASKS.items())


def test_only_the_newest_are_kept(tmp_path, log):
    checkpoints = Checkpoints(tmp_path, {}, 2)
    for step in (2, 4, 10):
        save(checkpoints, step, log)
    assert [path.name for path in checkpoints.all()] == ["checkpoint-10", "checkpoint-4"]


@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda path: (path / "state.safetensors").write_bytes(b"short"), "state.safetensors has 5 bytes where"),
        (lambda path: (path / "manifest.json").unlink(), "its manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"format": "salun'), "its manifest.json cannot be read"),
        (lambda path: (path / "mask.safetensors").unlink(), "mask.safetensors is missing"),
        (lambda path: _flip_last_byte(path / "state.safetensors"), "state.safetensors is damaged"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_latest_is_the_newest_valid_one(damage, fault, tmp_path, log):
    checkpoints = Checkpoints(tmp_path, {}, 3)
    good, bad = (save(checkpoints, step, log) for step in (5, 6))
    damage(bad)
    assert checkpoints.load("latest").path == good
    with pytest.raises(SalunError, match=f"checkpoint-6 cannot be resumed from: {fault}.*latest"):
        checkpoints.load(str(bad))


def _flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_latest_names_the_damage(tmp_path, log):
    """A newer one is passed over in words; where no other is left, going on with latest is no advice."""
    checkpoints = Checkpoints(tmp_path, {}, 3)
    good, bad = (save(checkpoints, step, log) for step in (5, 6))
    _flip_last_byte(bad / "state.safetensors")
    assert checkpoints.load("latest").passed_over == "checkpoint-6: state.safetensors is damaged"
    (good / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(SalunError) as refused:
        checkpoints.load("latest")
    assert "checkpoint-6: state.safetensors is damaged; checkpoint-5: its manifest.json cannot be" in str(refused.value)
    assert "delete them and start anew without --resume_from_checkpoint" in str(refused.value)


def test_a_checkpoint_is_found_by_its_name(tmp_path, log):
    checkpoints = Checkpoints(tmp_path, {}, 3)
    save(checkpoints, 5, log)
    save(checkpoints, 6, log)
    assert checkpoints.load("checkpoint-5").step == 5
    with pytest.raises(SalunError, match="checkpoint-7 cannot be resumed from: there is no such folder"):
        checkpoints.load("checkpoint-7")


@pytest.mark.parametrize("schedule, steps, goes", [("constant", 9, True), ("constant", 4, False), ("cosine", 9, False)])
def test_a_run_goes_on_for_more_steps_where_none_depended_on_their_number(schedule, steps, goes, tmp_path, log):
    settings = {"lr_scheduler": schedule, "max_train_steps": 6}
    save(Checkpoints(tmp_path, settings, 2), 5, log)
    checkpoints = Checkpoints(tmp_path, settings | {"max_train_steps": steps}, 2)
    if goes:
        assert checkpoints.load("latest").step == 5
    else:
        with pytest.raises(SalunError, match=f"max_train_steps is {steps}, was 6"):
            checkpoints.load("latest")


def test_latest_of_nothing_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path, {}, 2).load("latest") is None


def test_other_settings_are_listed_and_refused(tmp_path, log):
    save(Checkpoints(tmp_path, {"seed": 0, "learning_rate": 1e-4, "alpha": 1.0}, 2), 3, log)
    with pytest.raises(SalunError) as refused:
        Checkpoints(tmp_path, {"seed": 0, "learning_rate": 2e-4, "alpha": 1.0, "scope": "all"}, 2).load("latest")
    assert "(learning_rate is 0.0002, was 0.0001; scope is 'all', was None)" in str(refused.value)


def test_a_full_disk_leaves_the_previous_one(tmp_path, log):
    checkpoints = Checkpoints(tmp_path, {}, 1)
    save(checkpoints, 1, log)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file may grow past 100 bytes
    try:
        with pytest.raises(SalunError, match=r"checkpoint-2 could not be saved .*checkpoint-1 is intact: make room"):
            save(checkpoints, 2, log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.load("latest").step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "training.jsonl"]


def test_a_new_run_spares_an_unfinished_one_and_clears_a_finished_one(tmp_path, log):
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 5, log)
    with pytest.raises(SalunError, match="belongs to an unfinished run: go on with --resume_from_checkpoint latest"):
        checkpoints.start_anew()
    assert checkpoints.load("latest").step == 5
    (tmp_path / "config.json").write_text("{}")  # what a run writes last
    checkpoints.start_anew()
    assert checkpoints.all() == []


def words(folder, *more):
    return [
        "python", "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", "airplane", *QUICK,
        "--max_train_steps", "14", "--checkpointing_steps", "3", "--data_dir", folder.parent / "data",
        "--output_dir", folder, *more,
    ]  # fmt: skip


def wait_for(happened, process, what):
    until = time.time() + 120
    while not happened():
        assert process.poll() is None, f"it ended before {what}: {process.communicate()}"
        assert time.time() < until, what
        time.sleep(0.001)


def lines(folder):
    try:
        return len((folder / "training.jsonl").read_text().splitlines())
    except FileNotFoundError:  # not begun yet, or just being written anew from a checkpoint's
        return 0


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    here(*words(tmp_path / "whole"))
    folder = tmp_path / "killed"

    process = start(*words(folder))  # killed in the middle of its first save
    wait_for(lambda: (folder / ".checkpoint-3.partial").exists(), process, "a save")
    process.kill()
    process.communicate()
    assert not (folder / "erasure.safetensors").exists()

    resume = ("--resume_from_checkpoint", "latest")
    for step in (4, 7):  # killed at random moments between steps, in the middle of one, or in a save
        process, moment = start(*words(folder, *resume)), random.uniform(0, 0.5)
        print(f"killed {moment} s after step {step}")
        wait_for(lambda step=step: lines(folder) >= step, process, f"step {step}")
        time.sleep(moment)
        process.kill()
        process.communicate()

    process = start(*words(folder, *resume))  # Ctrl-C at a step without a checkpoint
    wait_for(lambda: lines(folder) >= 10, process, "step 10")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "its state is saved. To go on: the same command with" in said
    assert "Traceback" not in said

    done = here(*words(folder, *resume, "--learning_rate", "1"), check=False)
    assert done.returncode == 1 and "learning_rate is 1.0, was 0.001" in done.stderr
    done = here(*words(folder), check=False)
    assert done.returncode == 1 and "belongs to an unfinished run" in done.stderr

    done = run(*words(folder, *resume))
    assert "Going on from" in done.stdout
    whole, killed = (Delta.load(tmp_path / name / "erasure.safetensors") for name in ("whole", "killed"))
    assert whole.digest() == killed.digest()
    logs = [(tmp_path / name / "training.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    for one, other in zip(*logs, strict=True):
        assert json.loads(one) | {"seconds": 0} == json.loads(other) | {"seconds": 0}


def test_a_loss_that_is_not_finite_stops_there_and_keeps_the_last_checkpoint(tmp_path):
    more = ("--learning_rate", "1e30", "--checkpointing_steps", "1")
    done = here(*words(tmp_path / "run", *more), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "The loss is not finite at step 2" in last and f"{tmp_path / 'run' / 'checkpoint-1'} holds the last" in last
    assert Checkpoints(tmp_path / "run", {}, 2).newest_valid() == tmp_path / "run" / "checkpoint-1"
    assert not (tmp_path / "run" / "erasure.safetensors").exists()

"""The benchmarks' measurements run, on networks of a few weights; what they measure is for the machine's own time."""

import json

from shell import ROOT, run


def test_the_measurements_run_and_record_nothing():
    before = {path: path.read_bytes() for path in (ROOT / "benchmarks").glob("*.*")}
    words = "--tiny --resolution 32 --steps 2 --scores 1000 --only our_step delta".split()
    done = run("python", "-m", "benchmarks", *words)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ours, delta = found
    assert min(ours["seconds"], ours["floor_seconds"]) > 0
    assert 0 < ours["trained_weights"] < delta["scoped_weights"] and delta["load_seconds_0.5"] > 0
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks").glob("*.*")} == before

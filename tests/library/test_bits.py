"""Three methods still end on the weights that they ended on when the demo model came, which is what is recorded.

bits.json was recorded on one core, by code that still met what was recorded before of the former demo model. Where
processor and torch are those of the recording, the delta's digest must be the same; anywhere, the norm of each
parameter's change must be, to rounding.
"""

import json
from pathlib import Path

import pytest
import torch
from shell import run

from salun_diffusion import Delta

RECORDED = json.loads((Path(__file__).parent / "bits.json").read_text(encoding="utf-8"))


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)


@pytest.mark.parametrize("method", RECORDED["methods"])
def test_a_short_run_ends_as_it_did(method, tmp_path):
    words = ["--num_retain_images", "8"] if method != "esd" else []
    words += ["--num_forget_images", "8"] if method != "esd" else []
    words += "--max_train_steps 3 --train_batch_size 4 --num_inference_steps 4".split() if method != "uce" else []
    words += {"salun": ["--anchored", "0"], "uce": ["--preserve", "0.1"]}.get(method, [])  # as when it was recorded
    code = "import sys, torch; torch.set_num_threads(1); sys.argv.pop(0); import runpy; "
    code += "runpy.run_path('erase_concept.py', run_name='__main__')"
    run(
        "python", "-c", code, "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", "airplane",
        "--method", method, "--output_dir", tmp_path / "run", "--data_dir", tmp_path / "data", *words,
    )  # fmt: skip
    delta, recorded = Delta.load(tmp_path / "run" / "erasure.safetensors"), RECORDED["methods"][method]
    norms = {name: float(value.float().norm()) for name, value in delta.values.items()}
    assert norms == pytest.approx(recorded["norms"], rel=0.02)
    here = (torch.__version__, torch.backends.cpu.get_cpu_capability(), processor())
    if here == (RECORDED["torch"], RECORDED["capability"], RECORDED["processor"]):
        assert delta.digest() == recorded["digest"]

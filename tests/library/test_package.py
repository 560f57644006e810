"""What is installed: the library alone, and it works without the rest of the clone."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from shell import ROOT, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run("python", "-m", "build", "--wheel", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


def test_the_wheel_ships_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"salun_diffusion"}
    assert {
        f"salun_diffusion/concepts/presets/{p.name}" for p in (ROOT / "salun_diffusion/concepts/presets").glob("*.json")
    } <= set(names)
    assert "salun_diffusion/methods/salun.py" in names


def test_an_installed_copy_loads_an_erasure(wheel, tiny_folder, tmp_path):
    """A fresh environment: the package is installed into it, its dependencies are lent by a path file."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    own = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    lent = tmp_path / "lent"
    lent.mkdir()
    for item in os.scandir(sysconfig.get_paths()["purelib"]):
        if "salun" not in item.name:
            (lent / item.name).symlink_to(item.path)
    (own / "lent.pth").write_text(str(lent))
    script = f"""
import torch, salun_diffusion
assert {str(own)!r} in salun_diffusion.__file__, salun_diffusion.__file__
from diffusers import StableDiffusionPipeline
from salun_diffusion import Delta, load_erasure, unload_erasure
from salun_diffusion.erasures.fingerprint import fingerprint
pipe = StableDiffusionPipeline.from_pretrained({str(tiny_folder)!r}, safety_checker=None)
name, weight = next((n, p) for n, p in pipe.unet.named_parameters() if "attn2" in n)
before = weight.detach().clone()
mask = torch.ones_like(weight, dtype=torch.bool)
base = fingerprint(pipe.unet.named_parameters())
Delta({{name: mask}}, {{name: torch.full((mask.numel(),), 0.5)}}, base, {{}}).save("one.safetensors")
load_erasure(pipe, "one.safetensors")
assert torch.equal(weight, before + 0.5)
unload_erasure(pipe)
assert torch.equal(weight, before)
from salun_diffusion.concepts.finding import find_concept
print(find_concept("nudity").anchor)
"""
    done = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a person wearing clothes" in "a " + done.stdout
    assert sys.executable != str(python)

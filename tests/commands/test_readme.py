"""Every command and every line of Python in the README is run, on less data; CI runs the two ``make`` commands."""

import json
import re
import shlex

import pytest
from markupsafe import escape
from shell import QUICK, ROOT, here, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {  # what a README command is shortened with
    "accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept guitar --method uce": [],
    "accelerate launch erase_concept.py": QUICK,
    "python -m eval accuracy": "--num_forget_images 6 --num_retain_images 6 --num_inference_steps 2".split(),
    "python -m eval report": [],
    "python -m eval composition": "--num_images 3 --num_inference_steps 2".split(),
    "python -m eval audit": "--attack noise_probe --num_forget_images 2 --num_retain_images 2 --num_images 1".split()
    + "--num_prompts 1 --steps 1 --num_inference_steps 2".split(),
    "python -m eval compare": [],
    "python -m eval i2p": [],
    "python -m classification run": "--limit 400 --epochs 1 --seeds 0 --methods salun".split(),
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a clone's root, whose runs/ is its own, with the run that the README speaks of."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("erase_concept.py", "classification", "eval", "demo", "pipelines", "salun_diffusion", "docs"):
        (folder / name).symlink_to(ROOT / name)
    words = "python erase_concept.py --pretrained_model_name_or_path demo --concept airplane"
    here(*words.split(), *QUICK, cwd=folder)
    return folder


def test_every_link_between_documents_leads_somewhere():
    pages = [page for folder in ("", "docs", "demo", "benchmarks") for page in (ROOT / folder).glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))]
    local = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(local) > 20
    assert [(page.name, link) for page, link in local if not (page.parent / link).exists()] == []


def commands():
    return [line.strip() for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_command_runs(clone):
    lines = [line for line in commands() if line not in ("make demo", "make test")]
    assert len(lines) >= 4
    for line in lines:
        start = next((start for start in SMALL if line.startswith(start)), None)
        assert start, f"the README's command '{line}' is run by no test"
        how = run if "accelerate" in line or "nudity" in line else here  # a process of its own takes seconds to begin
        done = how(*shlex.split(line), *SMALL[start], cwd=clone, check=False, HF_HUB_OFFLINE="1")
        # without a hub, SD v1.4 cannot be fetched; then the command must say so
        assert done.returncode == 0 or "nudity" in line and "the hub cannot be reached" in done.stderr, done.stderr
    assert (clone / "runs" / "ink-style" / "erasure.safetensors").exists()
    verdict = json.loads((clone / "runs" / "airplane" / "audit.json").read_text())
    assert verdict["measures"] == ["accuracy", "composition", "attack", "relearn", "probe"]
    page = (clone / "runs" / "airplane" / "report.html").read_text(encoding="utf-8")
    for text in (verdict["headline"], *(finding["says"] for finding in verdict["findings"])):
        assert escape(text) in page
    for page in ("airplane/report.html", "compared/comparison.html"):
        text = (clone / "runs" / page).read_text(encoding="utf-8")
        assert "airplane" in text and 'src="data:image/png;base64,' in text


def test_the_python_blocks_run(clone):
    """One after the other, as they stand: the second loads what the first erased."""
    done = here("python", "-c", "\n".join([*blocks("python"), "print(run.path)"]), cwd=clone)
    assert done.stdout.splitlines()[-1].endswith("runs/a") and (clone / "runs" / "a" / "erasure.safetensors").exists()
    assert (clone / "airplane.png").stat().st_size > 100
    call = re.search(r"`(DiffusionPipeline\.from_pretrained\(.*?\))`", README, flags=re.S)[1]
    lines = ["from diffusers import DiffusionPipeline", f"pipe = {call}", "pipe.load_erasure('runs/airplane')"]
    here("python", "-c", "\n".join([*lines, "pipe.unload_erasure()"]), cwd=clone)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_it_stays_short():
    """A page that is read to its end: at most 1,000 words (as ``wc -w`` counts), and one table of at most six rows."""
    assert len(README.split()) <= 1000
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    (table,) = re.findall(r"(?:^\|.*\n)+", prose, flags=re.M)
    assert len(table.splitlines()) - 2 <= 6

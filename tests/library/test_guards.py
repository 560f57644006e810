"""Guards: they change no weight, come off without a trace, and say where they cannot act."""

import re

import pytest
import tiny
import tiny_labels
import tiny_transformers
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from guarded import PROMPTS, STEPS, STRONG, close, draw, guard
from shell import here

from salun_diffusion import (
    SalunError,
    erase,
    fuse_erasure,
    list_erasures,
    load_erasure,
    set_erasure_scale,
    unload_erasure,
)
from salun_diffusion.guards import find_guard
from salun_diffusion.models import model_of
from salun_diffusion.tensors import read_safetensors, write_safetensors


@pytest.mark.parametrize("method", STRONG)
def test_it_changes_no_weight_and_comes_off_without_a_trace(method, pipe, tmp_path):
    base = draw(pipe)
    weights, before = tiny.bits(pipe), tiny.trace(pipe)
    path = guard(pipe, method, tmp_path, **STRONG[method])
    guarded = draw(pipe)
    (told,) = list_erasures(pipe)
    assert told["intact"] and told["weights"] == 0 and told["method"] == method
    assert tiny.same(weights, tiny.bits(pipe)) and dict(pipe.unet.config) == before[4]
    assert not close(guarded, base)
    set_erasure_scale(pipe, "airplane", 0.5)
    half = draw(pipe)
    assert not close(half, base) and not close(half, guarded)
    set_erasure_scale(pipe, "airplane", 0)
    assert torch.equal(draw(pipe), base)
    set_erasure_scale(pipe, "airplane", 1)
    assert torch.equal(draw(pipe), guarded)
    unload_erasure(pipe)
    assert tiny.trace(pipe) == before and tiny.same(weights, tiny.bits(pipe)) and torch.equal(draw(pipe), base)
    load_erasure(pipe, path / "erasure.safetensors")
    assert torch.equal(draw(pipe), guarded)
    unload_erasure(pipe)


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("method", STRONG)
def test_a_picture_does_not_depend_on_its_batch(method, guidance, pipe, tmp_path):
    """Two prompts, two pictures each; each alone, from its own seed. In double precision: how a processor sums a batch
    differs between machines, and guidance makes more of it.
    """
    options = {"most_steps": STEPS} if method == "safree" else STRONG[method]
    run = erase(pipe, "airplane", method=method, output_dir=tmp_path / "guard", **options)
    pipe = DiffusionPipeline.from_pretrained(pipe.name_or_path, dtype=torch.float64)
    load_erasure(pipe, run.path)
    together = draw(pipe, seeds=[5, 6, 7, 8], num_images_per_prompt=2, guidance_scale=guidance)
    assert together.dtype == torch.float64
    near = 1e-4 if method == "egloce" else 1e-10  # of latents of some 30; EGLOCE's gradients are in single precision
    for place, seed in enumerate([5, 6, 7, 8]):
        alone = draw(pipe, [PROMPTS[place // 2]], [seed], guidance_scale=guidance)
        assert torch.allclose(together[place : place + 1], alone, rtol=0, atol=near)


def test_several_at_once_and_beside_a_delta(pipe, tmp_path):
    """In any order; the delta's weights come off to the bit, and the guards stay."""
    tiny.erasure(pipe.unet, size=0.1).save(tmp_path / "delta.safetensors")
    weights, base = tiny.bits(pipe), draw(pipe)
    sld = guard(pipe, "sld", tmp_path, level="max")
    only = draw(pipe)
    safree = erase(DiffusionPipeline.from_pretrained(pipe.name_or_path), "cat", method="safree", steps="all",
                   output_dir=tmp_path / "safree").path  # fmt: skip
    load_erasure(pipe, safree)
    both = draw(pipe)
    load_erasure(pipe, tmp_path / "delta.safetensors")
    assert [one["weights"] > 0 for one in list_erasures(pipe)] == [False, False, True]
    drawn = [base, only, both, draw(pipe)]
    assert not any(close(drawn[i], drawn[j]) for i in range(4) for j in range(i))
    unload_erasure(pipe, "concept 0")
    assert tiny.same(weights, tiny.bits(pipe)) and torch.equal(draw(pipe), both)
    unload_erasure(pipe)
    load_erasure(pipe, safree)
    load_erasure(pipe, sld)
    assert close(draw(pipe), both)
    unload_erasure(pipe, "cat")
    assert torch.equal(draw(pipe), only)
    drawn, other = [only], DiffusionPipeline.from_pretrained(pipe.name_or_path)
    for method in ("concept_steerers", "saeuron", "groce", "egloce"):  # on top of one another
        run = erase(other, "cat", method=method, output_dir=tmp_path / method, **STRONG[method])
        load_erasure(pipe, run.path, name=method)
        drawn.append(draw(pipe))
    assert len(list_erasures(pipe)) == 5
    assert not any(close(drawn[i], drawn[j]) for i in range(5) for j in range(i))


def test_where_it_cannot_act_it_says_so(pipe, tmp_path):
    path = guard(pipe, "sld", tmp_path, level="max")
    with pytest.raises(SalunError, match="acts in a call of the very pipeline that it was loaded on"):
        model_of(pipe).predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), model_of(pipe).encode(["a cat"]))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(SalunError, match="acts in a call of the very pipeline"):
        other("a cat", image=torch.rand(1, 3, 16, 16), num_inference_steps=4)
    with pytest.raises(SalunError, match="'airplane' is a guard, which changes no weight, so it cannot be fused"):
        fuse_erasure(pipe)
    with pytest.raises(SalunError, match="already applied"):
        load_erasure(pipe, path)
    unload_erasure(other)  # as any erasure, from whatever pipeline shares the denoiser
    assert list_erasures(pipe) == [] and "encode_prompt" not in vars(pipe)
    guard(pipe, "sld", tmp_path)
    with pytest.raises(SalunError, match="warm-up of 10 steps leaves none of 5 to guard"):
        draw(pipe)
    unload_erasure(pipe)
    guard(pipe, "safree", tmp_path)
    with pytest.raises(SalunError, match="reads the prompt's words, and embeddings were given"):
        pipe(prompt_embeds=torch.zeros(1, 77, 16), negative_prompt_embeds=torch.zeros(1, 77, 16))
    pipe.progress_bar = None
    with pytest.raises(SalunError, match="Something else has changed how the pipeline draws"):
        unload_erasure(pipe)
    assert list_erasures(pipe)[0]["intact"] is False


@pytest.mark.parametrize("method, build", [
    ("sld", tiny_transformers.pixart), ("safree", tiny_transformers.sd3), ("sld", tiny_labels.build),
    ("safree", tiny.build_xl), ("concept_steerers", tiny.build_xl), ("groce", tiny_labels.build),
    ("saeuron", tiny_transformers.pixart),
    ("egloce", tiny.build_xl),
])  # fmt: skip
def test_a_pipeline_that_it_does_not_fit_is_refused_in_a_sentence(method, build, pipe, tmp_path):
    other = build(tmp_path / "other")
    fits = "1.x, 2.x and XL" if find_guard(method).fits_two_encoders else "1.x and 2.x"
    message = re.escape(f"is a guard for Stable Diffusion {fits}, pipelines with a U-Net and encode_prompt()")
    concept = "3" if build is tiny_labels.build else "airplane"
    with pytest.raises(SalunError, match=f"^--method {method} {message}"):
        erase(other, concept, method=method, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SalunError, match=message):
        load_erasure(other, guard(pipe, method, tmp_path, **STRONG[method]))


def test_the_phrases_are_the_concepts_own(pipe, tmp_path):
    def phrases(method, concept, **more):
        run = erase(pipe, concept, method=method, output_dir=tmp_path / "run", **more)
        return load_phrases(run.path / "erasure.safetensors")

    def load_phrases(path):
        import json

        return json.loads(read_safetensors(path)[1]["phrases"])

    assert phrases("sld", ["steam engine", "kid, child"]) == ["steam engine", "kid", "child"]
    found = phrases("safree", "steam engine")
    assert found[0] == "steam engine" and len(found) > 1 and all("steam engine" in one for one in found)
    assert phrases("safree", "steam engine", phrases="train, a locomotive") == ["train", "a locomotive"]
    assert phrases("sld", "nudity")[0] == "hate" and "Nudity" in phrases("safree", "nudity")


def test_what_is_of_no_use_or_damaged_is_said(pipe, tmp_path):
    for option in ({"density": 0.1}, {"learning_rate": 1.0}, {"mask": "none"}, {"adapter": "lora"}, {"anchor": "cat"}):
        (name,) = option
        with pytest.raises(SalunError, match=f"--{name} means nothing to --method sld: leave it out"):
            erase(pipe, "airplane", method="sld", output_dir=tmp_path / "run", **option)
    path = guard(pipe, "sld", tmp_path) / "erasure.safetensors"
    unload_erasure(pipe)
    _, text = read_safetensors(path)
    for change, message in (
        (
            {"method": "magic"},
            "holds the guard 'magic', where sld, safree, concept_steerers, saeuron, groce, egloce are known",
        ),
        ({"method": "concept_steerers", "options": "{}"}, "is damaged: it lacks the tensors direction"),
        ({"phrases": "[]"}, "is damaged: it must have options, and phrases"),
        ({"options": '{"level": "most"}'}, "is damaged: 'level' is 'most'; choose one of weak"),
        ({"options": '{"strength": 1}'}, "is damaged: unknown setting 'strength'"),
        ({"version": "2"}, "has version 2 of the salun-guard format where 1 is known"),
    ):
        write_safetensors(tmp_path / "bad.safetensors", {}, text | change)
        with pytest.raises(SalunError, match=re.escape(message)):
            load_erasure(pipe, tmp_path / "bad.safetensors")


def test_the_command_makes_one_and_tells_its_options(folders, tmp_path):
    words = ["--pretrained_model_name_or_path", folders["sd1"], "--concept", "airplane", "--output_dir", tmp_path / "r"]
    done = here("python", "erase_concept.py", *words, "--method", "sld", "--level", "strong", "--warm_up", "3")
    assert "No weight changes. SLD guards against: airplane." in done.stdout
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"erasure.safetensors", "config.json"}
    done = here("python", "erase_concept.py", *words, "--method", "sld", "--method_option", "warm_up=far", check=False)
    assert done.returncode == 1 and "'far' must be of type int" in done.stderr

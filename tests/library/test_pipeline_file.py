"""The community pipeline, loaded as its users load it."""

from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from salun_diffusion import SalunError

FILE = Path(__file__).parents[2] / "pipelines" / "salun_stable_diffusion.py"


def test_custom_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    tiny.build(tmp_path / "base")
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "base", custom_pipeline=str(FILE), trust_remote_code=True, safety_checker=None
    )
    assert isinstance(pipe, StableDiffusionPipeline) and type(pipe).__name__ == "SalunStableDiffusionPipeline"
    before = tiny.bits(pipe)
    for seed in (0, 1):
        tiny.erasure(pipe.unet, seed).save(tmp_path / f"{seed}.safetensors")
    assert pipe.load_erasure(tmp_path / "0.safetensors", scale=0.5) == "concept 0"
    pipe.load_erasure(tmp_path / "1.safetensors", name="other")
    assert [(row["name"], row["scale"]) for row in pipe.list_erasures()] == [("concept 0", 0.5), ("other", 1.0)]
    assert not tiny.same(before, tiny.bits(pipe))
    picture = pipe("a cat", num_inference_steps=1, height=16, width=16, output_type="pt").images
    assert torch.isfinite(picture).all()
    pipe.set_erasure_scale("other", 0.25)
    assert [row["scale"] for row in pipe.list_erasures()] == [0.5, 0.25]
    pipe.unload_erasure("other")
    pipe.unload_erasure()
    assert tiny.same(before, tiny.bits(pipe)) and pipe.list_erasures() == []
    with pytest.raises(SalunError, match="There is no erasure to fuse"):
        pipe.fuse_erasure()
    with pytest.raises(SalunError, match="revision='x' is for hub ids"):
        pipe.load_erasure(tmp_path / "0.safetensors", revision="x")
    pipe.load_erasure(tmp_path / "0.safetensors", check_base=False)
    pipe.fuse_erasure()
    assert pipe.list_erasures() == [] and not tiny.same(before, tiny.bits(pipe))
    pipe.save_pretrained(tmp_path / "saved")  # it loads again as what it is, with or without this file
    for custom in ({}, {"custom_pipeline": str(FILE), "trust_remote_code": True}):
        again = DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None, **custom)
        assert isinstance(again, StableDiffusionPipeline) and hasattr(again, "load_erasure") == bool(custom)
        assert tiny.same(tiny.bits(pipe), tiny.bits(again))

"""`python -m eval … --lora`: every model is drawn under a LoRA, and what was drawn without it is drawn again."""

import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from shell import here, run
from test_eval_judge import classifier

from salun_diffusion import load_erasure
from salun_diffusion.export import export

PROMPTS = ["a picture of an airplane", "a photo of a cat"]
LABELS = [f"{side}:{name}" for side in ("left", "right") for name in ("airplane", "cat", "dog", "nothing")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline's folder with prompts, an erasure of its attention, a LoRA of random weights and one that undoes the
    erasure, at scale -1.
    """
    folder = tmp_path_factory.mktemp("base")
    pipe = tiny.build(folder)
    rows = [f"{prompt},{seed}" for seed, prompt in enumerate(PROMPTS)]
    (folder / "prompts.csv").write_text("\n".join(["prompt,evaluation_seed", *rows]) + "\n")
    delta = tiny.erasure(pipe.unet, size=0.3, only="attn2.to_", base_model=str(folder))
    names = [name for name in delta.masks if name.endswith("weight")]
    delta.masks, delta.values = ({name: part[name] for name in names} for part in (delta.masks, delta.values))
    delta.save(folder / "gone.safetensors", torch.float32)
    export(folder / "gone.safetensors", "lora", folder / "inverse", rank=32)
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.unet)
    config = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder / "style", unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    return folder


def words(base, output, *more):
    line = ["draw", "--pretrained_model_name_or_path", base, "--prompts", base / "prompts.csv", "--output_dir", output]
    return ["python", "-m", "eval", *line, "--erasure", base / "gone.safetensors", "--num_inference_steps", "2", *more]


def pictures(output, name):
    paths = sorted((output / "pictures" / name).glob("*.png"))
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in paths])


def drawn(base, lora=None, scale=1.0, erasure=False):
    """The same by hand, by a pipeline that is made anew."""
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if erasure:
        load_erasure(pipe, base / "gone.safetensors")
    if lora:
        pipe.load_lora_weights(str(lora), adapter_name="x")
        pipe.set_adapters(["x"], [scale])
    noise = [torch.Generator().manual_seed(seed % 2) for seed in range(8)]  # in the company that the command draws in
    made = pipe(PROMPTS * 4, generator=noise, num_inference_steps=2, guidance_scale=7.5).images[:2]
    return np.stack([np.asarray(image, dtype=int) for image in made])


def test_all_models_wear_it(base, tmp_path):
    lora = ["--lora", base / "style" / "pytorch_lora_weights.safetensors", "--lora_scale", "0.5"]
    run(*words(base, tmp_path, *lora))
    found = json.loads((tmp_path / "results.json").read_text())
    assert np.array_equal(pictures(tmp_path, "base"), drawn(base, base / "style", 0.5))
    assert np.array_equal(pictures(tmp_path, "gone"), drawn(base, base / "style", 0.5, erasure=True))
    assert not np.array_equal(pictures(tmp_path, "gone"), drawn(base, erasure=True))
    told = found["settings"]["lora"]
    assert told["scale"] == 0.5 and told["source"].endswith("pytorch_lora_weights.safetensors")
    assert (
        f"every model under the LoRA pytorch_lora_weights.safetensors (sha256 {told['sha256'][:12]}) at scale 0.5"
        in (found["protocol"])
    )


def test_a_lora_can_bring_it_back(base, tmp_path):
    here(*words(base, tmp_path / "plain"))
    here(*words(base, tmp_path / "back", "--lora", base / "inverse", "--lora_scale", "-1"))
    wanted, gone, back = (
        pictures(tmp_path / "plain", "base"),
        *(pictures(tmp_path / name, "gone") for name in ("plain", "back")),
    )
    assert abs(gone - wanted).mean() > 3 and abs(back - wanted).max() <= 1


def test_what_was_drawn_otherwise_is_drawn_again(base, tmp_path):
    counts, digests = [], []
    for more in ([], ["--lora", base / "style"], ["--lora", base / "style"],
                 ["--lora", base / "style", "--lora_scale", "0.5"], ["--lora", base / "inverse"], []):  # fmt: skip
        here(*words(base, tmp_path, *more))
        models = json.loads((tmp_path / "results.json").read_text())["models"]
        counts.append([model["generation"]["images"] for model in models])
        digests.append(tuple(model["digest"] for model in models))
    assert counts == [[2, 2], [2, 2], [0, 0], [2, 2], [2, 2], [2, 2]]
    assert digests[1] == digests[2] and digests[0] == digests[5] and len({*sum(digests, ())}) == 8


def test_labelled_measures_wear_it_too(base, tmp_path):
    classifier(base / "judge", LABELS)
    (base / "concepts.json").write_text(json.dumps({
        "slots": {"object": ["airplane", "cat", "dog"]},
        "templates": [{"prompt": "a picture of {object:a}", "expect": {"left": "{object}"}},
                      {"prompt": "a photo of {object:a} of {object2:a}",
                       "expect": {"left": "{object}", "right": "{object2}"}}],
    }))  # fmt: skip
    line = ["--pretrained_model_name_or_path", base, "--concept", "airplane", "--erasure", base / "gone.safetensors"]
    line += ["--num_forget_images", "2", "--num_retain_images", "2", "--num_inference_steps", "2"]
    here("python", "-m", "eval", "accuracy", *line, "--output_dir", tmp_path, "--lora", base / "style")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["lora"]["scale"] == 1 and "every model under the LoRA style" in found["protocol"]


def test_words_for_what_does_not_go(base, tmp_path):
    style = load_file(base / "style" / "pytorch_lora_weights.safetensors")
    other = {key: torch.cat([value, value], 1) if "lora_A" in key else value for key, value in style.items()}
    half = {key: value for key, value in style.items() if "lora_B" not in key}
    export(base / "gone.safetensors", "diff", tmp_path / "diff.safetensors")
    for name, tensors in (("other", other), ("half", half), ("foreign", {"x.weight": torch.ones(2)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    save_file(style | {next(iter(style)): next(iter(style.values())) * float("nan")}, tmp_path / "nan.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-8])
    for more, sentence in (
        ([tmp_path / "none.safetensors"], "none.safetensors does not exist; check the path."),
        ([tmp_path / "pickle.bin"], "pickle.bin is no .safetensors file"),
        ([tmp_path / "cut.safetensors"], "cut.safetensors is cut short"),
        ([tmp_path / "nan.safetensors"], "nan.safetensors holds NaN or Inf"),
        ([tmp_path / "other.safetensors"], "other.safetensors is no LoRA for this base model"),
        ([tmp_path / "half.safetensors"], "half.safetensors is no LoRA for this base model"),
        ([tmp_path / "foreign.safetensors"], "foreign.safetensors is no LoRA for this base model"),
        ([tmp_path / "diff.safetensors"], "diff.safetensors is no LoRA for this base model"),
        ([tmp_path], "holds 6 .safetensors files: name the one that is the LoRA."),
        ([base / "style", "--lora_scale", "nan"], "--lora_scale is nan: give a finite number."),
    ):
        done = here(*words(base, tmp_path / "out", "--lora", *more), check=False)
        assert done.returncode == 1 and sentence in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr
    done = here(*words(base, tmp_path / "out", "--lora_scale", "1"), check=False)
    assert done.returncode == 1 and "--lora_scale means nothing without --lora" in done.stderr
    assert not (tmp_path / "out").exists()

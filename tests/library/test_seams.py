"""The house on its seams: a family of base models and a kind of erasure, each added with one file and one line, go
through erase, load, eval and compare.
"""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import save_file
from shell import ROOT, together
from transformers import ResNetConfig, ResNetForImageClassification

FAMILY = '''
"""Class-conditional U-Nets on pixels: the condition is a class label, and the prompt is its name."""

from functools import cached_property

import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from salun_diffusion.errors import SalunError
from salun_diffusion.models.base import Model

NAMES = ["zero", "one", "two", "three"]  # and the null class


class Labels(Model):
    capabilities = frozenset({"pictures"})

    @classmethod
    def accepts(cls, pipe):
        return isinstance(getattr(pipe, "unet", None), UNet2DModel) and pipe.unet.config.num_class_embeds

    def encode(self, prompts):
        if unknown := set(prompts) - set(NAMES):
            raise SalunError(f"The model has no class {unknown}: choose one of {', '.join(NAMES)}.")
        return {"class_labels": torch.tensor([NAMES.index(prompt) for prompt in prompts])}

    @cached_property
    def empty(self):
        return {"class_labels": torch.tensor([len(NAMES)])}

    def forward(self, noisy, timesteps, condition):
        return self.network(noisy, timesteps, condition["class_labels"], return_dict=False)[0]

    @torch.no_grad()
    def draw(self, rows, *, num_inference_steps, guidance_scale, batch_size, output_type="pil", size=None, bar=None,
             progress=None):
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        noise = [torch.randn(self.sample_shape, generator=torch.Generator().manual_seed(row.seed)) for row in rows]
        x, labels = torch.stack(noise), self.encode([row.prompt for row in rows])
        both = {key: torch.cat([value, self.repeated(self.empty, len(rows))[key]]) for key, value in labels.items()}
        for t in scheduler.timesteps:
            conditional, empty = self.predict(x.repeat(2, 1, 1, 1), t.expand(2 * len(rows)), both).chunk(2)
            x = scheduler.step(empty + guidance_scale * (conditional - empty), t, x).prev_sample
        if bar is not None:
            bar.update(len(rows))
        if output_type == "latent":
            return list(x)
        return [picture.permute(1, 2, 0).numpy() for picture in (x / 2 + 0.5).clamp(0, 1)]

    def decode(self, samples):
        pixels = (255 * (samples / 2 + 0.5).clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(picture) for picture in pixels]
'''

GUARD = '''
"""A guard: it changes no weight, but takes the sign of all that the network predicts away again."""

from salun_diffusion.erasures.base import Erasure
from salun_diffusion.files import sha256
from salun_diffusion.tensors import read_safetensors
from salun_diffusion.models.load import denoiser


class Guard(Erasure):
    FORMAT = "toy-guard"

    def __init__(self, path):
        tensors, self.metadata = read_safetensors(path)
        self.factor, self.sha = float(tensors["factor"]), sha256(path)

    @classmethod
    def load(cls, path):
        return cls(path)

    def digest(self):
        return self.sha

    def check_fit(self, pipe, path, check_base, applied):
        pass

    @classmethod
    def change(cls, pipe, before, after):
        for one in before:
            if one not in after:
                one.memory.pop("hook").remove()
        for one in after:
            if one not in before:
                factor = one.erasure.factor ** one.scale
                hook = denoiser(pipe).register_forward_hook(
                    lambda module, args, out, factor=factor: (out[0] * factor, *out[1:])
                )
                one.memory["hook"] = hook
'''


def clone(folder, path, text, registry, line):
    """A clone in ``folder`` with one more file and, after the brace of a registry's dict, one more line."""
    shutil.copy(ROOT / "erase_concept.py", folder)  # of a link, Python would search the folder that it leads to
    for name in ("salun_diffusion", "eval"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / path).write_text(text, encoding="utf-8")
    file, brace = folder / registry[0], registry[1]
    content = file.read_text(encoding="utf-8")
    assert content.count(brace) == 1
    file.write_text(content.replace(brace, f"{brace}\n    {line}"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A class-conditional model of random weights with its concepts and a classifier."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=5, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    DDPMPipeline(network, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    names = ["zero", "one", "two", "three"]
    (folder / "concepts.json").write_text(json.dumps({
        "slots": {"digit": names},
        "templates": [{"prompt": "{digit}", "expect": {"label": "{digit}"}}],
        "settings": {"digit": {"num_inference_steps": 3, "guidance_scale": 2.0}},
    }))  # fmt: skip
    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder / "judge")
    (folder / "judge" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": 1.0,
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False,
    }))  # fmt: skip
    return folder


def test_a_family_in_one_file_goes_through_erase_load_eval_and_compare(digits, tmp_path):
    registry = ("salun_diffusion/models/__init__.py", "FAMILIES = {")
    line = '"toy_labels": "salun_diffusion.models.toy_labels.Labels",'
    where = clone(tmp_path, "salun_diffusion/models/toy_labels.py", FAMILY, registry, line)
    words = ["--pretrained_model_name_or_path", digits, "--concept", "three", "--scope", "all"]
    small = "--num_forget_images 4 --num_retain_images 6 --max_train_steps 3 --train_batch_size 2".split()
    small += ["--learning_rate", "0.01", "--output_dir", tmp_path / "run", "--data_dir", tmp_path / "data"]
    measured = ["--num_forget_images", "4", "--num_retain_images", "6", "--output_dir", tmp_path / "run"]
    code = f"""
import torch
from diffusers import DiffusionPipeline
from salun_diffusion import load_erasure, unload_erasure
pipe = DiffusionPipeline.from_pretrained({str(digits)!r})
before = {{name: p.clone() for name, p in pipe.unet.named_parameters()}}
load_erasure(pipe, {str(tmp_path / "run")!r})
assert any(not torch.equal(before[name], p) for name, p in pipe.unet.named_parameters())
unload_erasure(pipe)
assert all(torch.equal(before[name], p) for name, p in pipe.unet.named_parameters())
"""
    erased, refused, *rest = together(
        ("python", "erase_concept.py", *words, *small),
        ("python", "erase_concept.py", *words[:4], "--method", "uce"),
        ("python", "-m", "eval", "accuracy", *words[:4], "--erasure", tmp_path / "run", *measured),
        ("python", "-m", "eval", "compare", tmp_path / "run", "--output_dir", tmp_path / "compared"),
        ("python", "-c", code),
        cwd=where,
    )
    assert [one.returncode for one in (erased, *rest)] == [0] * 4, [one.stderr for one in (erased, *rest)]
    assert (tmp_path / "run" / "forget.png").exists()
    assert refused.returncode == 1
    assert "--method uce needs a base model that encodes prompts as sequences of tokens (text), which" in refused.stderr
    models = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    assert models[0]["digest"] != models[1]["digest"] and models[1]["ua"]["n"] == 4
    first = [(tmp_path / "run" / "pictures" / name / "forget-0000.png").read_bytes() for name in ("base", "run")]
    assert first[0] != first[1]
    assert "| three | SalUn |" in (tmp_path / "compared" / "comparison.md").read_text()


def test_a_kind_of_erasure_in_one_file_is_loaded_listed_measured_and_compared(tiny_folder, tmp_path):
    registry = ("salun_diffusion/erasures/__init__.py", "KINDS = {  # by the format that a file's metadata names")
    line = '"toy-guard": "salun_diffusion.erasures.guard.Guard",'
    where = clone(tmp_path, "salun_diffusion/erasures/guard.py", GUARD, registry, line)
    (tmp_path / "guarded").mkdir()
    about = {"format": "toy-guard", "concept": "airplane", "method": "guard"}
    save_file({"factor": torch.tensor(0.5)}, tmp_path / "guarded" / "erasure.safetensors", about)
    code = f"""
import json, torch
from diffusers import DiffusionPipeline
from salun_diffusion import SalunError, list_erasures, load_erasure, unload_erasure
pipe = DiffusionPipeline.from_pretrained({str(tiny_folder)!r})
pipe.set_progress_bar_config(disable=True)
def drawn():
    return pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
before, weights = drawn(), [p.clone() for p in pipe.unet.parameters()]
name = load_erasure(pipe, {str(tmp_path / "guarded")!r})
(entry,) = list_erasures(pipe)
assert name == entry["name"] == "airplane" and entry["weights"] == 0 and entry["method"] == "guard", entry
assert all(torch.equal(a, b) for a, b in zip(weights, pipe.unet.parameters())) and (drawn() != before).any()
try:
    load_erasure(pipe, {str(tmp_path / "guarded")!r})
    raise AssertionError
except SalunError as error:
    assert "already applied" in str(error)
unload_erasure(pipe)
assert not list_erasures(pipe) and (drawn() == before).all() and not pipe.unet._forward_hooks
"""
    (tmp_path / "prompts.csv").write_text("prompt,evaluation_seed\na cat,1\na dog,2\n")
    out = tmp_path / "drawn"
    base, few = ("--pretrained_model_name_or_path", tiny_folder), ("--num_inference_steps", "2", "--output_dir", out)
    prompts = ("--prompts", tmp_path / "prompts.csv")
    found = together(
        ("python", "-c", code),
        ("python", "-m", "eval", "i2p", *base, "--erasure", tmp_path / "guarded", *prompts, *few),
        ("python", "-m", "eval", "compare", out, "--output_dir", tmp_path / "compared"),
        cwd=where,
    )
    assert [one.returncode for one in found] == [0] * 3, [one.stderr for one in found]
    models = json.loads((out / "results.json").read_text())["models"]
    assert [model["name"] for model in models] == ["base", "guarded"] and models[0]["digest"] != models[1]["digest"]
    assert "| guard |" in (tmp_path / "compared" / "comparison.md").read_text()

"""Class-conditional models, U-Net and DiT, through the public commands: erase, resume, load, measure."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_labels
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from shell import here
from transformers import ResNetConfig, ResNetForImageClassification

from salun_diffusion import SalunError, erase, load_erasure, unload_erasure
from salun_diffusion.concepts.concept import Row
from salun_diffusion.concepts.finding import find_concept
from salun_diffusion.masks.saliency import select
from salun_diffusion.methods.losses import guided
from salun_diffusion.models import load_model
from salun_diffusion.tensors import read_safetensors

FILE = Path(__file__).parents[2] / "pipelines" / "salun_class_conditional.py"
SMALL = "--num_forget_images 4 --num_retain_images 6 --train_batch_size 2 --num_inference_steps 3".split()


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    tiny_labels.build(folder)
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    tiny_labels.build_dit(folder)
    return folder


def erased(base, concept, output, *more, steps=3, check=True):
    small = SMALL if not {"esd", "concept_ablation"} & {*more} else SMALL[4:]
    small = [*small, "--num_forget_images", "4"] if "concept_ablation" in more else small
    return here(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", base, "--concept", concept, *small,
        "--max_train_steps", steps, "--learning_rate", "0.01", "--save_dtype", "fp32", "--output_dir", output,
        "--data_dir", Path(output).parent / "data", *more, check=check,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["salun", "esd", "gradient_ascent", "concept_ablation", "selective_amnesia"])
def test_every_method_that_needs_no_text_erases_a_class(unet, dit, tmp_path, method):
    for name, base, concept, anchor in (("u", unet, "3", "0"), ("d", dit, "golden retriever", "crane")):
        erased(base, concept, tmp_path / name, "--method", method)
        about = json.loads((tmp_path / name / "config.json").read_text())
        assert about["settings"]["anchor"] == [anchor] and about["scope"] == "all"
        pipe = load_model(str(base)).pipe
        before = tiny.bits(pipe)
        load_erasure(pipe, tmp_path / name)
        assert not tiny.same(before, tiny.bits(pipe))
        unload_erasure(pipe)
        assert tiny.same(before, tiny.bits(pipe))


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "forget_me_not"])
def test_methods_on_text_are_refused(unet, tmp_path, method):
    words = ["--concept", "3", "--method", method, "--output_dir", tmp_path / "run"]
    done = here("python", "erase_concept.py", "--pretrained_model_name_or_path", unet, *words, check=False)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert f"--method {method} needs a base model that encodes prompts as sequences of tokens" in done.stderr
    assert "(text), which ClassConditionalPipeline does not" in done.stderr


def test_a_resumed_run_ends_on_the_same_bits(unet, tmp_path):
    erased(unet, "1", tmp_path / "whole", steps=4)
    erased(unet, "1", tmp_path / "parts", "--checkpointing_steps", "2", steps=2)
    erased(unet, "1", tmp_path / "parts", "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest", steps=4)
    whole, parts = (read_safetensors(tmp_path / name / "erasure.safetensors")[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_loaded_pipeline_is_erased_by_the_names_of_its_labels(dit, tmp_path):
    pipe = DiTPipeline.from_pretrained(dit)
    before = tiny.bits(pipe)
    run = erase(
        pipe, "Tinca tinca", output_dir=tmp_path / "run", data_dir=tmp_path / "data", num_forget_images=2,
        num_retain_images=2, train_batch_size=2, max_train_steps=1, num_inference_steps=2,
    )  # fmt: skip
    assert tiny.same(before, tiny.bits(pipe)) and run.config.anchor == ["golden retriever"]  # by number, 1
    with pytest.raises(SalunError, match="Did you mean 'golden retriever'"):
        erase(pipe, "golden retreiver", output_dir=tmp_path / "other")


@pytest.mark.parametrize("name", ["3", "digits"])
def test_a_class_that_is_not_there_is_refused_with_the_nearest(unet, dit, tmp_path, name):
    done = erased(dit, "golden retriver", tmp_path / "run", check=False)
    assert done.returncode == 1 and "Unknown concept 'golden retriver'. Did you mean 'golden retriever'?" in done.stderr
    done = erased(unet, "33", tmp_path / "run", "--anchor", name, check=False)
    assert done.returncode == 1 and "Did you mean '3'? This base model knows: 0, 1, 2, 3." in done.stderr
    with pytest.raises(SalunError, match="The model has no class '4'. Did you mean"):
        load_model(str(unet)).encode(["4"])


def test_two_classes_of_one_name_are_told_apart(dit):
    model = load_model(str(dit))
    assert model.names == ["tench", "golden retriever", "crane", "crane (2)"] and model.null_class == 4
    assert model.encode(["Crane", "crane (2)", "tinca tinca"])["class_labels"].tolist() == [2, 3, 0]
    assert find_concept("crane", dit).anchor == "crane (2)" and find_concept("crane (2)", dit).anchor == "tench"


def test_a_model_without_a_null_class_trains_unguided_and_refuses_guidance(tmp_path):
    tiny_labels.build(tmp_path / "base", null=False)
    erased(tmp_path / "base", "3", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["guidance_scale"] == settings["saliency_guidance"] == 1 and settings["condition_dropout"] is None
    for more in (["--guidance_scale", "3"], ["--saliency_guidance", "3"], ["--condition_dropout", "0.1"]):
        done = erased(tmp_path / "base", "3", tmp_path / "other", *more, check=False)
        assert done.returncode == 1 and f"{' '.join(more)} needs a null class, and this model has none" in done.stderr
        assert not (tmp_path / "other").exists()
    done = erased(tmp_path / "base", "3", tmp_path / "other", "--method", "esd", check=False)
    assert done.returncode == 1 and "Guidance needs a null class" in done.stderr
    pipe = load_model(str(tmp_path / "base")).pipe
    with pytest.raises(SalunError, match="no null class to guide from: give 1"):
        pipe("3", guidance_scale=3)


def test_a_model_without_classes_is_refused(tmp_path):
    tiny_labels.build(tmp_path, id2label=None)
    config = json.loads((tmp_path / "unet" / "config.json").read_text()) | {"num_class_embeds": None}
    model = load_model(str(tmp_path))
    assert model.names == ["0", "1", "2", "3", "4"] and model.null_class is None  # without labels, each is a class
    del model.network.class_embedding
    model.network.register_to_config(num_class_embeds=config["num_class_embeds"])
    model.pipe.save_pretrained(tmp_path / "unconditional")
    with pytest.raises(SalunError, match="told no class"):
        load_model(str(tmp_path / "unconditional"))


def test_another_class_conditional_model_is_refused(unet, tmp_path):
    erased(unet, "3", tmp_path / "run")
    tiny_labels.build(tmp_path / "other", seed=1)
    pipe = load_model(str(tmp_path / "other")).pipe
    with pytest.raises(SalunError, match="another base model"):
        load_erasure(pipe, tmp_path / "run")


def test_the_pipeline_file_draws_by_name_as_the_library_does(unet, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained(unet, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in (5, 6)]  # noqa: E731
    drawn = pipe(["3", 1], guidance_scale=3, num_inference_steps=4, generator=seeds(), output_type="np").images
    rows = [Row("3", None, {}, 5), Row("1", None, {}, 6)]
    how = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    theirs = load_model(str(unet)).draw(rows, batch_size=2, **how)
    assert np.abs(drawn - np.stack(theirs)).max() < 1e-5 and drawn.shape == (2, 8, 8, 3)
    erased(unet, "3", tmp_path / "run")
    pipe.load_erasure(tmp_path / "run")
    assert np.abs(pipe("3", num_inference_steps=4, generator=seeds()[:1], output_type="np").images - drawn[0]).max() > 0
    pipe.fuse_erasure()
    pipe.save_pretrained(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).names == tiny_labels.DIGITS
    with pytest.raises(SalunError, match="The model has no class 'x'"):
        pipe("x")


def test_dit_draws_as_its_own_pipeline_does(dit):
    """Its pipeline has the null class of ImageNet's 1,000 as a constant, so without guidance."""
    pipe, model = DiTPipeline.from_pretrained(dit), load_model(str(dit))
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    wanted = pipe([1, 2], guidance_scale=1, num_inference_steps=4, generator=seeds, output_type="np").images
    rows = [Row("golden retriever", None, {}, 5), Row("crane", None, {}, 6)]
    found = model.draw(rows, batch_size=2, num_inference_steps=4, guidance_scale=1.0, output_type="np")
    assert np.abs(wanted - np.stack(found)).max() < 1e-5


def test_pictures_of_the_users_own_are_told_by_their_folder(unet, tmp_path):
    for label, count in (("3", 3), ("1", 2), ("0", 2)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(count):
            grey = np.full((8, 8), 20 * (i + 1), np.uint8)
            Image.fromarray(grey).save(tmp_path / "pictures" / label / f"{i}.png")
    own = ["--forget_data", tmp_path / "pictures", "--retain_data", tmp_path / "pictures"]
    done = erased(unet, "3", tmp_path / "run", *own)
    assert "The forget set: 3 pictures, from" in done.stdout and "The retain set: 4 pictures, from" in done.stdout
    sheet = np.asarray(Image.open(tmp_path / "run" / "forget.png"))
    assert sheet[0, 0].tolist() == [20, 20, 20] and sheet[0, 8].tolist() == [40, 40, 40]


def test_classes_are_dropped_once_for_both_branches_of_a_step(unet, tmp_path, monkeypatch):
    """A step of SalUn against a plain one: the two predictions share noise, timesteps and what was dropped, in eval;
    and the same is dropped where the anchor's pictures stand in for some.
    """
    from salun_diffusion.models.labels import LabelUNet

    seen = []
    forward = LabelUNet.forward

    def recorded(self, noisy, timesteps, condition):
        if torch.is_grad_enabled() or len(noisy) == 8:
            seen.append((noisy.detach().clone(), timesteps, condition["class_labels"].clone(), self.network.training))
        return forward(self, noisy, timesteps, condition)

    monkeypatch.setattr(LabelUNet, "forward", recorded)
    more = ["--train_batch_size", "8", "--num_forget_images", "8", "--num_retain_images", "8"]
    more += ["--mask", "none", "--condition_dropout", "0.5"]
    erased(unet, "3", tmp_path / "mixed", "--anchored", "0.5", *more, steps=1)
    mixed = seen[-1]
    erased(unet, "3", tmp_path / "run", *more, steps=1)
    (noisy, t, anchor, mode), (both, both_t, labels, both_mode) = seen[-2:]
    assert torch.equal(mixed[2], labels) and not torch.equal(mixed[0], both)
    assert torch.equal(noisy, both[:8]) and torch.equal(t, both_t[:8]) and not mode and not both_mode
    concept, null = labels[:8], 4
    assert set(concept.tolist()) == {3, null} and set(anchor.tolist()) == {0, null}
    assert torch.equal(concept == null, anchor == null) and null in labels[8:]


def test_the_saliency_of_a_class_is_that_of_a_plain_loop(unet, tmp_path):
    """Σ over the forget set of the guided denoising loss's gradient, top half over all weights, by autograd alone."""
    erased(unet, "3", tmp_path / "run")
    model, seed = load_model(str(unet)), 0
    from accelerate import Accelerator

    from salun_diffusion.config import EraseConfig
    from salun_diffusion.data.sets import drawn_set
    from salun_diffusion.filling import fill
    from salun_diffusion.training.batches import Batches

    concept = find_concept("3", unet)
    config = EraseConfig(concept=["3"], num_forget_images=4, num_inference_steps=3, data_dir=str(tmp_path / "data"))
    fill(config, concept.settings, "3")
    accelerator = Accelerator(cpu=True)
    images = drawn_set(model, [concept.forget_rows(4, seed, "training")], config, "forget", accelerator)
    batches = Batches(accelerator, model, {"forget": images}, seed, 2, 3, config.data_dir)
    model.network.eval()
    total = {name: torch.zeros_like(p) for name, p in model.network.named_parameters()}
    for i in range(4):
        noise, t = batches.draw(images, 1, "saliency", i)
        x = model.schedule.add_noise(images.latents[torch.tensor([i])], noise, t)
        parts = [model.network(x, t, torch.tensor([label]), return_dict=False)[0] for label in (3, 4)]
        model.network.zero_grad()
        (-(guided(*parts, 3.0) - noise).square().mean() / 4).backward()
        for name, p in model.network.named_parameters():
            total[name] += p.grad
    wanted = select({name: value.abs() for name, value in total.items()}, 0.5)
    found, _ = read_safetensors(tmp_path / "run" / "mask.safetensors")
    flat = torch.cat([mask.flatten() for mask in wanted.values()])
    bits = torch.cat([
        torch.from_numpy(np.unpackbits(found[f"{name}.mask" if f"{name}.mask" in found else name].numpy(),
                                       bitorder="little")[: mask.numel()]) for name, mask in wanted.items()
    ]).bool()  # fmt: skip
    assert (flat != bits).float().mean() < 0.01  # sums in another order end on other last digits
    assert not wanted["class_embedding.weight"][[0, 1, 2]].any() and wanted["class_embedding.weight"][3].any()


def test_eval_accuracy_measures_a_forgotten_class(unet, tmp_path):
    base = shutil.copytree(unet, tmp_path / "base")
    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(tiny_labels.DIGITS)), label2id={name: i for i, name in enumerate(tiny_labels.DIGITS)},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(base / "judge")
    (base / "judge" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": 1.0,
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False,
    }))  # fmt: skip
    erased(base, "3", tmp_path / "run")
    words = ["--pretrained_model_name_or_path", base, "--concept", "3", "--erasure", tmp_path / "run"]
    few = ["--num_forget_images", "4", "--num_retain_images", "6", "--num_inference_steps", "3"]
    here("python", "-m", "eval", "accuracy", *words, *few, "--output_dir", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["settings"]["guidance_scale"] == 3 and found["models"][1]["ua"]["n"] == 4
    assert found["concept"]["slot"] == "class" and found["concept"]["anchor"] == "0"

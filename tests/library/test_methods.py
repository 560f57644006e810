"""What holds for every unlearning method, whatever it learns: typed commands, masks, scopes, presets, errors."""

import re
import shutil
from dataclasses import dataclass

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from shell import run

from salun_diffusion import Delta, SalunError, load_erasure, push, unload_erasure
from salun_diffusion import erase as run_erasure
from salun_diffusion.command_line import parse
from salun_diffusion.config import EraseConfig
from salun_diffusion.erasures.adapter import Adapter
from salun_diffusion.erasures.mask import load_masks
from salun_diffusion.filling import fill
from salun_diffusion.masks import SALIENCY
from salun_diffusion.methods import METHODS, find_method, names_of
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.models.scopes import TEXT_ENCODER
from salun_diffusion.models.scopes import UNET as SCOPES
from salun_diffusion.models.text_unet import differing_tokens, token_ids
from salun_diffusion.options import assigned, option

SHORT = {  # options of methods that take long by themselves
    "salun_adv": ["--search_steps", "2"],
    "stereo": ["--rounds", "2", "--round_steps", "2", "--search_steps", "2"],
    "advunlearn": ["--attack_steps", "2"],
    "mace": ["--lora_steps", "2"],
    "speed": ["--null_threshold", "0.3"],  # embeddings of 16 numbers have no room to spare
}
GUARDS = [name for name in METHODS if find_method(name).guard]  # they have tests of their own
ADAPTERS = [name for name in METHODS if find_method(name).adapter]  # and so have they, below
PEOPLE = [name for name in METHODS if "identities" in find_method(name).needs]  # tests/library/test_identities.py
GRADIENT = [name for name in METHODS if not find_method(name).closed_form and name not in ADAPTERS + PEOPLE]


def command(base, method, output, *more, concept="steam engine"):
    """The words after ``erase_concept.py`` of a short erasure."""
    kind = find_method(method)
    words = [] if kind.closed_form else ["--max_train_steps", "2", "--train_batch_size", "2", "--learning_rate", "1e-3"]
    words += (
        ["--num_retain_images", "4"]
        if "num_retain_images" not in kind.unused(kind.mask, kind.Options()) and (kind.uses_retain or kind.closed_form)
        else []
    )
    mask = more[more.index("--mask") + 1] if "--mask" in more else kind.mask
    words += ["--num_forget_images", "4"] if kind.sets(mask, kind.Options()) != ["name"] else []
    words += ["--pretrained_model_name_or_path", str(base), "--concept", concept, "--method", method]
    words += ["--output_dir", str(output), "--data_dir", str(output.parent / "data")]
    words += [] if "num_inference_steps" in kind.ignores else ["--num_inference_steps", "3"]
    return [*words, *SHORT.get(method, []), *more]


def erase(base, method, output, *more, **which):
    """``erase_concept.py`` in this process: imports would be most of a process's time."""
    run_erasure(parse(command(base, method, output, *more, **which), ""))
    return Delta.load(output / "erasure.safetensors")


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in GUARDS + ADAPTERS + PEOPLE])
def test_it_runs_everywhere_changes_its_scope_alone_and_is_deterministic(method, kind, folders, tmp_path):
    component = find_method(method).component
    if component and kind == "sdxl":
        with pytest.raises(SalunError, match="needs a base model that reads prompts by one text encoder alone"):
            erase(folders[kind], method, tmp_path / "one")
        return
    delta = erase(folders[kind], method, tmp_path / "one", "--save_dtype", "fp32")
    scope = re.compile((TEXT_ENCODER if component else SCOPES)[find_method(method).scope])
    assert delta.metadata["method"] == method and delta.metadata["scope"] == find_method(method).scope
    if find_method(method).sparse:
        assert 0 < delta.metadata["density"] < 0.1
    else:
        assert delta.metadata["density"] == (0.5 if find_method(method).mask == "saliency" else 1.0)
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    before = tiny.bits(pipe)
    load_erasure(pipe, tmp_path / "one")
    after = tiny.bits(pipe)
    changed = {key for key in before if not torch.equal(before[key][1], after[key][1])}
    assert changed and all(part == (component or "unet") and scope.search(name) for part, name in changed)
    unload_erasure(pipe)
    assert tiny.same(tiny.bits(pipe), before)
    if kind == "sd1":
        again = erase(folders[kind], method, tmp_path / "two", "--save_dtype", "fp32")
        assert again.digest() == delta.digest()


def test_fia_sets_weights_of_several_concepts_to_zero_and_no_others(folders, tmp_path):
    more = ["--concept", "cat", "--sensitive", "0.05", "--save_dtype", "fp32"]
    both = erase(folders["sd1"], "fia", tmp_path / "both", *more)
    pipe = DiffusionPipeline.from_pretrained(folders["sd1"])
    load_erasure(pipe, tmp_path / "both")
    parameters = dict(pipe.unet.named_parameters())
    assert both.masks and all(not parameters[name][mask].any() for name, mask in both.masks.items())
    assert sum(int((parameters[name] == 0).sum()) for name in both.masks) == sum(
        int(m.sum()) for m in both.masks.values()
    )


@pytest.mark.parametrize("method", GRADIENT)
def test_a_gradient_method_takes_any_mask(method, folders, tmp_path):
    salient = erase(folders["sd1"], method, tmp_path / "salient", "--mask", "saliency", "--density", "0.25")
    masks = load_masks(tmp_path / "salient" / "mask.safetensors")[0]
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in salient.masks.values()) == total // 4
    file = str(tmp_path / "salient" / "mask.safetensors")
    assert erase(folders["sd1"], method, tmp_path / "file", "--mask", file).digest() == salient.digest()
    everything = erase(folders["sd1"], method, tmp_path / "none", "--mask", "none")
    assert sum(mask.numel() for mask in everything.masks.values()) == total
    assert everything.metadata["density"] == 1.0


def test_spm_is_an_adapter_of_rank_1_and_resumes(folders, tmp_path):
    """Without being asked for one; at the learning rate that it has, which is an adapter's already."""
    settings = fill(EraseConfig(["x"], method="spm"), {}, "x")
    found = (settings.adapter, settings.rank, settings.learning_rate, settings.output_dir)
    assert found == ("lora", 1, 1e-4, "runs/x-spm")
    more = ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    run_erasure(parse(command(folders["sd1"], "spm", tmp_path / "run", *more), ""))
    whole = Adapter.load(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert all("attentions" in name and len(down) == 1 for name, (down, _) in whole.factors.items())
    assert any(down.dim() == 4 for down, _ in whole.factors.values())  # convolutions too
    assert whole.by_prompt == ["steam engine"]
    push(tmp_path / "run", "me/without", dry_run=str(tmp_path / "card"))
    assert "There it acts at full strength on every prompt" in (tmp_path / "card" / "README.md").read_text("utf-8")
    pipe = DiffusionPipeline.from_pretrained(folders["sd1"])
    before = tiny.bits(pipe)
    load_erasure(pipe, tmp_path / "run")
    unload_erasure(pipe)
    assert tiny.same(tiny.bits(pipe), before)
    (tmp_path / "run" / "config.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = [*more, "--resume_from_checkpoint", "latest"]
    run_erasure(parse(command(folders["sd1"], "spm", tmp_path / "run", *again), ""))
    assert Adapter.load(tmp_path / "run" / "pytorch_lora_weights.safetensors").digest() == whole.digest()


@pytest.mark.parametrize("method", ["esd", "selective_amnesia", "race", "salun_adv", "stereo", "advunlearn", "ticoe"])
def test_resumed_is_uninterrupted(method, folders, tmp_path):
    """For the methods that draw more than noise, or keep more than weights."""
    whole = erase(folders["sd1"], method, tmp_path / "run", "--max_train_steps", "4", "--checkpointing_steps", "2")
    (tmp_path / "run" / "config.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    for cached in (tmp_path / "data").glob("fisher-*"):
        cached.unlink()  # computed again, it must still be the base model's
    again = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    assert erase(folders["sd1"], method, tmp_path / "run", *again).digest() == whole.digest()


def test_a_run_of_phases_does_not_go_on_for_more_steps(folders, tmp_path):
    erase(folders["sd1"], "race", tmp_path / "run", "--checkpointing_steps", "1")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(SalunError, match="the number of steps, on which their phases depend, is 4, was 2"):
        erase(folders["sd1"], "race", tmp_path / "run", "--checkpointing_steps", "1", "--max_train_steps", "4",
              "--resume_from_checkpoint", "latest")  # fmt: skip


def test_every_saliency_chooses_as_many_weights_and_others(folders, tmp_path):
    chosen = {}
    for kind in SALIENCY:
        delta = erase(folders["sd1"], "salun", tmp_path / kind, "--density", "0.25", "--saliency", kind)
        masks = load_masks(tmp_path / kind / "mask.safetensors")[0]
        chosen[kind] = torch.cat([mask.flatten() for mask in masks.values()])
        assert delta.metadata["settings"]["saliency"] == kind
    assert {int(mask.sum()) for mask in chosen.values()} == {len(chosen["random"]) // 4}
    share = {kind: float((mask & chosen["gradient"]).sum() / mask.sum()) for kind, mask in chosen.items()}
    assert 0.15 < share["random"] < 0.35 and all(0.35 < share[kind] < 1 for kind in ("gradient-weight", "fisher"))
    assert 0.5 < share["contrast"] < 1 and share["magnitude"] < 0.5


@pytest.mark.parametrize("method", ["race", "salun_adv", "stereo", "advunlearn", "salun", "ticoe"])
def test_what_is_drawn_by_chance_does_not_depend_on_how_a_step_is_shared(method, folders, tmp_path):
    """Two accumulated batches, or two processes, meet the same attacks and pictures as one batch."""
    words = ["--save_dtype", "fp32", "--mask", "none"]
    words += ["--anchored", "0.5"] if method in ("salun", "salun_adv") else []
    whole = erase(folders["sd1"], method, tmp_path / "whole", *words, "--train_batch_size", "4")
    erase(folders["sd1"], method, tmp_path / "two", *words, "--gradient_accumulation_steps", "2")
    runs = ["two"]
    if method == "salun_adv":
        line = command(folders["sd1"], method, tmp_path / "shared")
        run("torchrun", "--nproc_per_node", "2", "erase_concept.py", *line, *words, ACCELERATE_USE_CPU="true")
        runs.append("shared")
    for name in runs:
        other, norms = Delta.load(tmp_path / name / "erasure.safetensors"), []
        for key, value in whole.values.items():
            norms.append([float((other.values[key] - value).square().sum()), float(value.square().sum())])
        apart, change = map(sum, zip(*norms, strict=True))
        assert apart**0.5 < 0.01 * change**0.5, name


def test_attention_maps_survive_gradient_checkpointing(folders, tmp_path):
    """They are made inside the part that is computed twice."""
    plain = erase(folders["sd1"], "forget_me_not", tmp_path / "plain")
    twice = erase(folders["sd1"], "forget_me_not", tmp_path / "twice", "--gradient_checkpointing")
    assert twice.digest() == plain.digest()


def test_a_yes_or_no_of_a_method_is_read_as_it_is_said():
    @dataclass(frozen=True)
    class Options:
        warm: bool = option(True, "whether")

    read = {text: assigned(Options, [f"warm={text}"], "", "it").warm for text in ("False", "false", "True")}
    assert read == {"False": False, "false": False, "True": True}
    with pytest.raises(SalunError, match="'0' must be of type bool"):
        assigned(Options, ["warm=0"], "", "it")


def test_the_tokens_that_differ_are_the_concept(folders):
    pipe = load_pipeline(str(folders["sd1"]))

    def words(prompt, other):
        return pipe.tokenizer.decode(token_ids(pipe, prompt)[differing_tokens(pipe, prompt, other)]).strip()

    assert words("a photo of a steam engine on a table", "a photo of a dog on a table") == "steam engine"
    assert words("a photo of a dog on a table", "a photo of a steam engine on a table") == "dog"
    assert words("an airplane", "a cat") == "an airplane"
    assert words("a cat cat", "a cat") == "cat"
    assert words("a cat", "a cat cat") == "cat"
    assert words("a cat in the style of ink", "a cat") == "in the style of ink"


def test_what_is_set_for_a_method_holds_for_those_made_from_it():
    assert names_of(find_method("random_label")) == ["salun", "random_label"]
    preset = {"num_forget_images": 7, "salun": {"learning_rate": 1.0, "alpha": 2.0}, "random_label": {"alpha": 3.0}}
    found = fill(EraseConfig(["x"], method="random_label"), preset, "x")
    assert (found.learning_rate, found.alpha, found.num_forget_images, found.mask) == (1.0, 3.0, 7, "none")
    found = fill(EraseConfig(["x"], method="esd", learning_rate=5.0), preset, "x")
    assert (found.learning_rate, found.max_train_steps, found.alpha, found.num_forget_images) == (5.0, 1000, None, 7)
    preset["esd"] = {"method_option": ["negative_guidance=2", "erase_from=art"]}
    found = fill(EraseConfig(["x"], method="esd", method_option=["negative_guidance=3"]), preset, "x")
    options = find_method("esd").parse(found.method_option)
    assert (options.negative_guidance, options.erase_from, options.start_guidance) == (3.0, "art", 3.0)


@pytest.mark.parametrize(
    "method, more, message",
    [
        ("esd", ["--alpha", "2"], "--alpha means nothing to --method esd"),
        ("esd", ["--num_forget_images", "9"], "--num_forget_images means nothing to --method esd"),
        ("uce", ["--learning_rate", "1"], "--learning_rate means nothing to --method uce"),
        ("rece", ["--mask", "saliency"], "solves for whole matrices"),
        (
            "salun_adv",
            ["--attacked", "0.6", "--inverted", "0.6"],
            "empty and unrelated are 1.325 in all: give at most 1",
        ),
        ("salun_esd", ["--saliency", "contrast"], "looks at a retain set, which --method salun_esd has not"),
        ("salun", ["--saliency", "random", "--saliency_guidance", "2"], "means nothing to --saliency random"),
        ("random_label", ["--saliency", "fisher"], "--saliency means nothing to --method random_label without --mask"),
        ("uce", ["--scope", "all"], "use --scope cross-attention-kv"),
        ("fia", ["--scope", "feed-forward"], "fia prunes the weights of linear layers alone: use --scope feed-forward"),
        ("fia", ["--mask", "saliency"], "chooses its weights itself"),
        ("fia", ["--sensitive", "1.5"], "sensitive is 1.5: give a share above 0, and 1 at most"),
        ("mace", ["--learning_rate", "1"], "--learning_rate means nothing to --method mace"),
        ("mace", ["--scope", "cross-attention"], "use --scope cross-attention-kv"),
        ("concept_ablation", ["--forget_data", "tests"], "--forget_data means nothing"),
        ("salun", ["--method_option", "ewc=1"], "no option 'ewc'. Its own: target=current"),
        ("salun", ["--method_option", "target=base"], "choose one of current, frozen"),
        ("esd", ["--method_option", "negative_guidance=far"], "'far' must be of type float"),
        ("race", ["--method_option", "attack_steps=0"], "attack_steps is 0: give a number of at least 1"),
        ("ticoe", ["--alpha", "2"], "--alpha means nothing to --method ticoe"),
        ("ticoe", ["--temperature", "21"], "temperature is 21: give 20 at most"),
        ("ticoe", ["--wordings", "{}, a cat"], "The wording 'a cat' has no place for the concept's name: put {} there"),
        ("spm", ["--density", "0.3"], "--density means nothing to --adapter lora"),
        ("advunlearn", ["--adapter", "lora"], "edits the text_encoder, and adapters go onto the denoiser: leave"),
        ("advunlearn", ["--scope", "cross-attention"], "choose self-attention, feed-forward, no-token-embedding, all"),
    ],
)
def test_what_a_method_cannot_use_is_said(method, more, message, folders, tmp_path):
    words = ["--pretrained_model_name_or_path", str(folders["sd1"]), "--concept", "steam engine", "--method", method]
    with pytest.raises(SalunError, match=re.escape(message)):
        run_erasure(parse([*words, "--output_dir", str(tmp_path / "run"), *more], ""))
    assert not (tmp_path / "run" / "erasure.safetensors").exists()


def test_an_unknown_method_lists_the_known():
    done = run("python", "erase_concept.py", "--concept", "x", "--method", "magic", check=False)
    assert done.returncode == 2 and all(name in done.stderr for name in METHODS)

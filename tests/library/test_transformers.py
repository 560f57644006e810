"""SD3, Flux, PixArt-Sigma and Sana, of random weights but diffusers' own classes: erase, load, draw, unload, resume."""

import gc
import json
import sys

import numpy as np
import pytest
import tiny
import tiny_transformers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from shell import ROOT, here
from transformers import T5EncoderModel

from eval.attacks.ddim import steps_of
from eval.attacks.text import Text
from salun_diffusion import SalunError, erase, load_erasure, unload_erasure
from salun_diffusion.concepts.concept import Row
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.methods import find_method
from salun_diffusion.methods.adversarial import embedding_pgd
from salun_diffusion.methods.forget_me_not import Recorder
from salun_diffusion.methods.uce import UCE, UCEOptions
from salun_diffusion.models import load_model, model_of
from salun_diffusion.models.base import CAPABILITIES
from salun_diffusion.models.cross_dit import INSTRUCTION
from salun_diffusion.models.quantized import is_quantized, quantize_frozen
from salun_diffusion.tensors import read_safetensors

FAMILIES = {
    "pixart": tiny_transformers.pixart,
    "sana": tiny_transformers.sana,
    "sd3": tiny_transformers.sd3,
    "flux": tiny_transformers.flux,
}
METHODS = {
    "salun": {"anchor": "cat", "num_retain_images": 2},
    "esd": {},
    "gradient_ascent": {"num_retain_images": 2},
    "concept_ablation": {"anchor": "cat"},
    "selective_amnesia": {"anchor": "cat", "num_retain_images": 2},
    "forget_me_not": {},
    "uce": {"anchor": "cat", "num_retain_images": 2},
    "rece": {"anchor": "cat", "num_retain_images": 2},
    "race": {"warm_up": 0.0, "attack_steps": 1},
    "finetune": {"num_retain_images": 2},
    "salun_esd": {},
    "salun_adv": {"anchor": "cat", "num_retain_images": 2, "attacked": 0.5, "attack_tokens": "all", "attack_steps": 1,
                  "inverted": 0.0, "empty": 0.25},
    "speed": {"anchor": "cat", "num_retain_images": 2, "null_threshold": 0.3},
    "mace": {"anchor": "cat", "num_retain_images": 2, "num_inference_steps": 2, "lora_steps": 2},
    "ticoe": {},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny_transformers.sd3(folder)
    return folder


def erased(pipe, output, method="salun", **options):
    few = {"num_inference_steps": 2, "train_batch_size": 2, "max_train_steps": 1, "learning_rate": 1e-2}
    few = {} if method in ("uce", "rece", "speed", "mace") else few
    few |= {} if method in ("esd", "race", "finetune") else {"num_forget_images": 2}
    few |= METHODS[method] | options
    return erase(
        pipe,
        "airplane",
        method=method,
        output_dir=output,
        save_dtype="fp32",
        **{"data_dir": output.parent / "data"} | few,
    )


def bits(pipe):
    return [weight.detach().clone() for weight in pipe.transformer.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_erase_load_draw_unload(pipe, method, tmp_path):
    model = model_of(pipe)
    if lacks := [name for name in find_method(method).needs if name not in model.capabilities]:
        with pytest.raises(SalunError, match=f"--method {method} needs a base model that {CAPABILITIES[lacks[0]]}"):
            erased(pipe, tmp_path / "run", method)
        return
    before = bits(pipe)
    run = erased(pipe, tmp_path / "run", method)
    assert all(map(torch.equal, before, bits(pipe)))
    rows, how = [Row("a picture of a cat", None, {}, 1)], {"num_inference_steps": 2, "batch_size": 1}
    (base,) = model.draw(rows, guidance_scale=2.0, output_type="latent", **how)
    load_erasure(pipe, run.path)
    (after,) = model.draw(rows, guidance_scale=2.0, output_type="latent", **how)
    assert torch.isfinite(after).all() and not torch.equal(base, after)
    unload_erasure(pipe)
    assert all(map(torch.equal, before, bits(pipe)))


def test_embeddings_are_attacked_through_every_transformer(pipe):
    """Projected gradient descent moves what each is told of a prompt to where it predicts a goal better."""
    model = model_of(pipe)
    condition = {key: model.moved(value) for key, value in model.encode(["a cat", "a photo of a dog"]).items()}
    noisy, goal = torch.randn(2, 2, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500, 100])

    def loss(embeddings):
        return (model.predict(noisy, t, model.with_embeddings(condition, embeddings)) - goal).square().sum()

    embeddings = model.embeddings(condition)
    found = embedding_pgd(loss, embeddings, torch.full_like(embeddings, 1e-3), 0.1, 4, 0.25)
    with torch.no_grad():
        assert loss(found) < loss(embeddings) and (found - embeddings).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    "method, options, told",
    [
        ("stereo", {}, "--method stereo needs a base model that takes a word of one's own"),
        ("advunlearn", {}, "--method advunlearn needs a base model that takes a word of one's own"),
        ("salun_adv", {}, "--method salun_adv with --inverted above 0 needs a base model that takes a word"),
        ("salun_adv", {"inverted": 0.0}, "--method salun_adv without --attack_tokens all needs a base model that"),
    ],
)
def test_methods_that_attack_words_say_which_models_they_need(folder, tmp_path, method, options, told):
    with pytest.raises(SalunError, match=told):
        erase(str(folder), "airplane", method=method, output_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [{"guided": False}, {"t5": False}])
def test_the_other_kinds_of_a_family_are_erased_too(more, tmp_path):
    """Flux schnell, which has no guidance, and SD3 without its third text encoder."""
    build = tiny_transformers.flux if "guided" in more else tiny_transformers.sd3
    pipe = build(tmp_path / "base", **more)
    before = bits(pipe)
    load_erasure(pipe, erased(pipe, tmp_path / "run").path)
    assert not all(map(torch.equal, before, bits(pipe)))
    unload_erasure(pipe)
    assert all(map(torch.equal, before, bits(pipe)))


def test_our_own_steps_end_where_the_pipeline_does(pipe):
    """Condition, packing, schedule and guidance, against the pipeline's own loop."""
    model, flux = model_of(pipe), "Flux" in type(pipe).__name__
    rows, guidance = [Row("a photo of a dog", None, {}, seed) for seed in (3, 4)], 3.5
    theirs = model.draw(rows, num_inference_steps=4, guidance_scale=guidance, batch_size=2, output_type="latent")
    noise = [torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(row.seed)) for row in rows]
    x, condition = torch.cat(noise), model.encode([row.prompt for row in rows])
    both = {key: torch.cat([model.repeated(model.empty, 2)[key], value]) for key, value in condition.items()}
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):  # the methods' own steps are of other kinds
        sampler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        sampler.set_timesteps(4)
    else:
        sampler = model.sampler(4)
    with torch.no_grad():
        for t in sampler.timesteps:
            if flux:  # its guidance is a number that the network is told, and ours is this one
                predicted = model.predict(x, t.expand(2), condition)
            else:
                empty, asked = model.predict(x.repeat(2, 1, 1, 1), t.expand(4), both).chunk(2)
                predicted = empty + guidance * (asked - empty)
            x = sampler.step(predicted, t, x).prev_sample
    torch.testing.assert_close(x, torch.stack(theirs), rtol=1e-3, atol=1e-4)


def test_latents_are_the_pictures_that_the_pipeline_draws(pipe):
    model, rows = model_of(pipe), [Row("a cat", None, {}, 5)]
    how = {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 1}
    (picture,), latents = model.draw(rows, **how), torch.stack(model.draw(rows, output_type="latent", **how))
    (decoded,) = model.decode(latents)
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(decoded, dtype=int)).max() <= 1
    assert picture.size == (model.picture_side,) * 2
    assert model.encode_pictures([picture]).shape[1:] == model.sample_shape


def test_a_flow_is_noised_and_aimed_at_as_in_diffusers_training_scripts(folder):
    """The formulas of train_dreambooth_sd3.py, written plainly: logit-normal places in the shifted schedule, the
    straight path, and the velocity along it with the weight 1.
    """
    model = load_model(str(folder))
    times = model.times(20_000, torch.Generator().manual_seed(0))
    steps = np.arange(1000, 0, -1) / 1000  # σ from 1 down, before the shift of 3
    shifted = 3 * steps / (1 + 2 * steps)
    u = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).sigmoid().numpy()
    np.testing.assert_allclose(times.numpy(), 1000 * shifted[(u * 1000).astype(int)], rtol=1e-5)
    _check_straight(model, times[:3])


def _check_straight(model, t):
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    sigma = (t / 1000).view(3, 1, 1, 1)
    torch.testing.assert_close(model.noise(clean, noise, t), (1 - sigma) * clean + sigma * noise)
    assert torch.equal(model.target(clean, noise, t), noise - clean)
    found = model.noise_in(noise - clean, model.noise(clean, noise, t), t)
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_transformers.flux, tiny_transformers.sana])
def test_flux_and_sana_are_trained_at_uniform_times(build, tmp_path):
    """The formulas of train_dreambooth_flux.py and train_dreambooth_lora_sana.py, whose weighting is "none", written
    plainly: u uniform, timestep 1000 − ⌊1000 u⌋ of a schedule that neither shifts (Sana's flow_shift is its sampler's).
    """
    model = model_of(build(tmp_path / "base"))
    times = model.times(1000, torch.Generator().manual_seed(0))
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(times, 1000 - (1000 * u).floor())
    _check_straight(model, times[:3])


def test_own_steps_on_sana_are_shifted_as_its_pipelines_are(tmp_path):
    model = model_of(tiny_transformers.sana(tmp_path / "base"))
    steps = model.sampler(1000).timesteps.numpy() / 1000
    evenly = np.linspace(1, 3 * 0.001 / 1.002, 1000)  # down to the shifted 1/1000, as diffusers' scheduler has it
    np.testing.assert_allclose(steps, 3 * evenly / (1 + 2 * evenly), rtol=1e-4)


def test_sanas_concept_is_marked_where_its_tokens_are(tmp_path):
    """Behind the instruction, which the pipeline cuts off: what is marked first changes with the word."""
    model = model_of(tiny_transformers.sana(tmp_path / "base"))
    prompts = ["a photo of an airplane on a house", "a photo of a cat on a house"]
    one, other = model.tokens(model.encode(prompts))
    marked, count = model.differing_tokens(*prompts), model.token_count(prompts[0])
    changed = (one != other).any(1)
    assert int(changed.nonzero()[0]) == marked.start and marked.stop - marked.start == 2  # "an airplane"
    assert one[: count - 1].any(1).all() and not one[count - 1 :].any()  # then the padding, which is not seen
    assert model.encode(prompts)["encoder_hidden_states"].shape[1] == len(model.empty["encoder_attention_mask"][0])


def test_forget_me_not_sees_the_attention_that_sana_normalizes(tmp_path):
    pipe = tiny_transformers.sana(tmp_path / "base", normed=True)
    model = model_of(pipe)
    noisy, condition = torch.randn(2, *model.sample_shape), model.encode(["a cat", "a photo of a dog"])
    t = torch.tensor([500.0, 100.0])
    with torch.no_grad():
        theirs = model.predict(noisy, t, condition)
        for name, layer in pipe.transformer.named_modules():
            if name.endswith("attn2"):
                layer.set_processor(Recorder([]))
        torch.testing.assert_close(model.predict(noisy, t, condition), theirs, rtol=1e-4, atol=1e-5)


def _seen_by_pixart(pipe, prompt):
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=300, truncation=True, return_tensors="pt")
    embedded = pipe.text_encoder(ids.input_ids, attention_mask=ids.attention_mask)[0]
    return pipe.transformer.caption_projection(embedded)[0][ids.attention_mask[0].bool()].double()


def _seen_by_sana(pipe, prompt):
    """The instruction's first token, and what comes behind it."""
    instruction = "\n".join(INSTRUCTION)
    ids = pipe.tokenizer(instruction + prompt, return_tensors="pt").input_ids
    embedded = pipe.text_encoder(ids)[0]
    seen = pipe.transformer.caption_norm(pipe.transformer.caption_projection(embedded))[0].double()
    count = len(pipe.tokenizer(prompt).input_ids) - 1  # without its <bos>
    return torch.cat([seen[:1], seen[-count - 1 :]])  # "▁" of the instruction's "Prompt: " is the last before it


@pytest.mark.parametrize(
    "build, seen_by", [(tiny_transformers.pixart, _seen_by_pixart), (tiny_transformers.sana, _seen_by_sana)]
)
def test_uce_solves_for_the_tokens_that_the_attention_sees(build, seen_by, tmp_path):
    """UCE's objective (its three terms, written plainly, on the text encoder's embeddings behind the caption's layers
    and without padding) has no slope at the keys and values that the erasure leaves.
    """
    pipe = build(tmp_path / "base")
    model, kept = model_of(pipe), ["a picture of a dog", "a photo of a house"]

    def seen(prompt):
        with torch.no_grad():
            return seen_by(pipe, prompt)

    marks = 1 if "PixArt" in type(pipe).__name__ else 0  # T5's end mark follows the word
    one, other = seen("a picture of an airplane")[-1 - marks :], seen("a picture of a cat")[-1 - marks :]
    tokens = torch.cat([seen(prompt) for prompt in kept])
    options = UCEOptions()
    found = UCE(model, options, None).solve(
        scoped_parameters(model.network, "cross-attention-kv", model.scopes),
        [[("a picture of an airplane", "a picture of a cat")]], kept,
    )  # fmt: skip
    assert len(found) == 4  # keys and values of two blocks, and no bias
    for name, moved in found.items():
        before = model.network.get_parameter(name).detach().double()
        weight = moved.double().requires_grad_(True)
        objective = options.erase * (weight @ one.T - before @ other.T).square().sum() / len(one)
        objective += options.preserve * (weight @ tokens.T - before @ tokens.T).square().sum() / len(tokens)
        objective += options.ridge * (weight - before).square().sum()
        objective.backward()
        assert weight.grad.abs().max() < 1e-5 and not torch.equal(moved.double(), before)


def test_text_encoders_are_freed_before_a_training(folder, tmp_path):
    """Of a model that the run loaded itself; a pipeline that was given keeps its own."""
    alive = {}

    def count():
        gc.collect()
        return sum(type(one) is T5EncoderModel for one in gc.get_objects())

    def look(stage, done, total):
        alive[stage] = count()

    before = count()
    erased(str(folder), tmp_path / "own", callback=look)
    assert alive["drawing the forget set"] == before + 1 and alive["saliency"] == alive["erasing"] == before
    pipe = DiffusionPipeline.from_pretrained(folder)
    given = erased(pipe, tmp_path / "given")
    assert isinstance(pipe.text_encoder_3, T5EncoderModel)
    own, lent = (read_safetensors(run / "erasure.safetensors")[0] for run in (tmp_path / "own", given.path))
    assert own.keys() == lent.keys() and all(torch.equal(own[key], lent[key]) for key in own)


@pytest.mark.parametrize("build, mixed_precision", [(tiny_transformers.sd3, "bf16"), (tiny_transformers.sana, "no")])
def test_frozen_layers_are_int8_and_the_scope_is_trained_as_it_is(build, mixed_precision, tmp_path):
    pytest.importorskip("torchao")
    pipe = build(tmp_path / "base")
    few = {"mixed_precision": mixed_precision, "max_train_steps": 2, "gradient_checkpointing": True}
    whole, half, whole_again = (tmp_path / name for name in ("whole", "half", "again"))
    run = erased(str(tmp_path / "base"), whole, quantize_frozen=True, checkpointing_steps=1, **few)
    other = erased(str(tmp_path / "base"), half, **few)
    deltas = [read_safetensors(one.file)[0] for one in (run, other)]
    assert not all(torch.equal(deltas[0][key], deltas[1][key]) for key in deltas[0])  # the passes were others
    go_on = {"quantize_frozen": True, "resume_from_checkpoint": str(whole / "checkpoint-1")}
    resumed = erased(str(tmp_path / "base"), whole_again, **go_on, **few)
    again = read_safetensors(resumed.file)[0]
    assert all(torch.equal(deltas[0][key], again[key]) for key in again)
    before = bits(pipe)
    load_erasure(pipe, run.path)  # of the model's own fingerprint, not of the int8 one's
    assert not all(map(torch.equal, before, bits(pipe)))
    unload_erasure(pipe)
    network = model_of(pipe).network
    scope = scoped_parameters(network, run.config.scope, model_of(pipe).scopes)
    kept = {name: weight.detach().clone() for name, weight in scope.items()}
    linear = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, torch.nn.Linear))
    own = sum(weight.numel() for name, weight in scope.items() if weight.dim() == 2)
    assert quantize_frozen(network, scope) == linear - own
    codes = {name: weight for name, weight in network.named_parameters() if is_quantized(weight)}
    assert sum(weight.numel() for weight in codes.values()) == linear - own and not codes.keys() & scope.keys()
    assert all(torch.equal(kept[name], network.get_parameter(name)) for name in scope)
    with pytest.raises(SalunError, match="quantize it once its erasures are loaded"):
        load_erasure(pipe, run.path)
    with pytest.raises(SalunError, match="is quantized .*quantize_frozen=True"):
        erased(pipe, tmp_path / "refused")


def test_offloading_changes_no_bit(folder, tmp_path):
    """On a CPU the parts take turns on one device: their hooks are there while drawing, and gone for the training."""
    hooked = {}

    def look(stage, done, total):
        alive = [one for one in gc.get_objects() if type(one) is SD3Transformer2DModel]
        hooked[stage] = any("_hf_hook" in vars(one) for one in alive)

    plain = erased(str(folder), tmp_path / "plain", data_dir=tmp_path / "one")
    run = erased(str(folder), tmp_path / "run", data_dir=tmp_path / "two", offload=True, callback=look)
    assert hooked["drawing the forget set"] and not hooked["saliency"] and not hooked["erasing"]
    one, other = (read_safetensors(found.file)[0] for found in (plain, run))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_int8_needs_torchao_and_a_model_of_the_runs_own(folder, tmp_path, monkeypatch):
    for option in ("quantize_frozen", "offload"):
        with pytest.raises(SalunError, match=f"{option} would .* give the model's folder or its hub id"):
            erased(DiffusionPipeline.from_pretrained(folder), tmp_path / "run", **{option: True})
    with pytest.raises(SalunError, match="leave one of the two out"):
        erased(str(folder), tmp_path / "run", offload=True, validation_steps=1)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SalunError, match=r"pip install 'salun-diffusion\[quantize\]"):
        erased(str(folder), tmp_path / "run", quantize_frozen=True)
    assert not (tmp_path / "run" / "erasure.safetensors").exists()


@pytest.mark.parametrize("build", [tiny_transformers.sd3, tiny_transformers.sana])
def test_a_resumed_run_ends_on_the_same_bits(build, tmp_path):
    folder = tmp_path / "base"
    build(folder)
    words = f"--pretrained_model_name_or_path {folder} --concept airplane --anchor cat --num_forget_images 2"
    words += f" --num_retain_images 2 --num_inference_steps 2 --train_batch_size 2 --data_dir {tmp_path / 'data'}"
    words = ["python", "erase_concept.py", *words.split(), "--save_dtype", "fp32", "--learning_rate", "0.01"]
    here(*words, "--max_train_steps", 4, "--output_dir", tmp_path / "whole")
    parts = [*words, "--output_dir", tmp_path / "parts", "--checkpointing_steps", "2"]
    here(*parts, "--max_train_steps", 2)
    here(*parts, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    whole, parts = (read_safetensors(tmp_path / name / "erasure.safetensors")[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_scopes_go_by_what_they_mean(pipe):
    model = model_of(pipe)
    names = {scope: {*scoped_parameters(model.network, scope, model.scopes)} for scope in model.scopes}
    everything = names.pop("all")
    assert len(everything) == len(list(model.network.parameters()))
    assert names["cross-attention-kv"] < names["cross-attention"] < names["cross-attention+resnets"]
    assert names["cross-attention"] | names["no-cross-attention"] == everything
    assert not names["cross-attention"] & (names["self-attention"] | names["feed-forward"])
    if "joint-attention" in names:
        assert names["joint-attention"] == names["cross-attention"] | names["self-attention"]


def test_scope_help_counts_the_weights_of_each(folder):
    done = here("python", "erase_concept.py", "--pretrained_model_name_or_path", folder, "--scope", "help")
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["--scope", "weights"] and any(line.startswith("joint-attention") for line in lines)
    total = sum(weight.numel() for weight in load_model(str(folder)).network.parameters())
    assert next(line for line in lines if line.startswith("all ")).split()[1] == f"{total:,}"


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "pixart_sigma", "sana"])
def test_the_pipeline_file_adds_the_methods(name, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    key = {"stable_diffusion_3": "sd3", "pixart_sigma": "pixart"}.get(name, name)
    stock = FAMILIES[key](tmp_path / "base")
    file = str(ROOT / "pipelines" / f"salun_{name}.py")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", custom_pipeline=file, trust_remote_code=True)
    pipe.load_erasure(_delta(pipe, tmp_path))
    assert pipe.list_erasures() and not all(map(torch.equal, bits(stock), bits(pipe)))
    pipe.unload_erasure()
    assert all(map(torch.equal, bits(stock), bits(pipe))) and isinstance(pipe, type(stock))
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == type(stock).__name__


def _delta(pipe, folder):
    only = "attn.to_q" if "attn.to_q" in str([*pipe.transformer.state_dict()]) else "attn2"
    tiny.erasure(pipe.transformer, 0, only=only).save(folder / "one.safetensors")
    return folder / "one.safetensors"


@pytest.mark.parametrize("build", [tiny_transformers.sd3, tiny_transformers.sana])
def test_eval_draws_and_measures_an_erasure_of_a_transformer(build, tmp_path):
    folder = tmp_path / "base"
    pipe = build(folder)
    (tmp_path / "prompts.csv").write_text("prompt,seed\na picture of an airplane,1\na picture of a cat,2\n")
    words = [
        "--pretrained_model_name_or_path",
        folder,
        "--prompts",
        tmp_path / "prompts.csv",
        "--num_inference_steps",
        2,
    ]
    here(
        "python", "-m", "eval", "draw", *words, "--erasure", _delta(pipe, tmp_path), "--output_dir", tmp_path / "drawn"
    )
    found = sorted(path.parent.name for path in (tmp_path / "drawn" / "pictures").glob("*/*.png"))
    assert len(found) == 4 and len({*found}) == 2


def test_attacks_that_a_transformer_cannot_take_are_refused(folder):
    model = load_model(str(folder))
    with pytest.raises(SalunError, match="was trained on a diffusion's noise schedule, and not as a flow"):
        steps_of(model, 2)
    with pytest.raises(SalunError, match="has not one text encoder, CLIP's"):
        Text(model.pipe, torch.float32)

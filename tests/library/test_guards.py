"""Guards: what SLD and SAFREE do to a call of diffusers' own pipelines, against plain loops; and that they leave no
trace.
"""

import re

import numpy as np
import pytest
import tiny
import tiny_labels
import tiny_transformers
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from shell import here
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ResNetConfig, ResNetForImageClassification

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
from salun_diffusion.guards.groce import GrOCEOptions, severed
from salun_diffusion.guards.sae import SparseAutoencoder, train
from salun_diffusion.guards.saeuron import SAeUron, SAeUronOptions, features_of, threshold_of
from salun_diffusion.guards.safree import SAFREEOptions, weaken
from salun_diffusion.guards.sld import LEVELS
from salun_diffusion.models import model_of
from salun_diffusion.models.text_unet import arguments, encode, encode_empty
from salun_diffusion.tensors import read_safetensors, write_safetensors

PROMPTS = ["a picture of an airplane", "a red cat on a house"]
STEPS = 5
STRONG = {  # options with which a guard is seen in the pictures of random networks, and made in no time
    "sld": {"level": "max"},
    "safree": {"steps": "all"},
    "concept_steerers": {"train_steps": 2, "strength": 5.0},
    "saeuron": {"train_steps": 2, "pictures": 2, "steps": 2, "percentile": 90, "multiplier": -50.0, "batch_places": 64},
    "groce": {},
    "egloce": {"step_size": 0.05, "inner_steps": 2},
}


@pytest.fixture
def pipe(folders):
    found = DiffusionPipeline.from_pretrained(judged(folders["sd1"]))
    found.set_progress_bar_config(disable=True)
    return found


def judged(folder):
    """The folder of a pipeline, with a small classifier of random weights in it."""
    if not (folder / "judge").exists():
        torch.manual_seed(0)
        labels = dict(enumerate(["left:airplane", "left:cat", "left:nothing", "count:one", "count:two"]))
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        known = {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
        ResNetForImageClassification(ResNetConfig(**sizes, **known)).save_pretrained(folder / "judge")
        processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
        processor.save_pretrained(folder / "judge")
    return folder


def guard(pipe, method, folder, concept="airplane", **options):
    """The folder of a guard, loaded on ``pipe``."""
    run = erase(pipe, concept, method=method, output_dir=folder / f"{method}-{concept}", **options)
    load_erasure(pipe, run.path)
    return run.path


def draw(pipe, prompts=PROMPTS, seeds=None, **more):
    """Latents, one generator a picture."""
    count = len(prompts) * more.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(count)]
    how = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent"} | more
    return pipe(prompts, generator=generators, **how).images


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=2e-5)


def looped(pipe, predict, guidance):
    """A plain loop of DDIM from the same noise; ``predict(x, t, number, row)`` gives (conditional, unconditional)."""
    pipe.scheduler.set_timesteps(STEPS)
    pictures = []
    for row in range(len(PROMPTS)):
        shape = (1, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(row), dtype=pipe.unet.dtype)
        for number, t in enumerate(pipe.scheduler.timesteps):
            conditional, unconditional = predict(x, t, number, row)
            x = pipe.scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
        pictures.append(x)
    return torch.cat(pictures)


@torch.no_grad()
def sld_in_plain_steps(pipe, phrase, numbers, guidance):
    """Equations 3 to 8, one picture and one prediction at a time."""
    warm_up, scale, threshold, momentum_scale, momentum = numbers
    texts, empty, concept = [encode(pipe, [p]) for p in PROMPTS], encode_empty(pipe), encode(pipe, [phrase])
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    v = pipe.scheduler.config.prediction_type == "v_prediction"
    remembered = {}

    def predict(x, t, number, row):
        def network(text):
            if "time_ids" in text:
                text = text | {"time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]])}
            return pipe.unet(x, t, **arguments(text)).sample

        one, none, away = network(texts[row]), network(empty), network(concept)
        alpha = pipe.scheduler.alphas_cumprod[t]
        to_noise = (lambda y: alpha.sqrt() * y + (1 - alpha).sqrt() * x) if v else (lambda y: y)
        c, n, s = map(to_noise, (one, none, away))
        mu = torch.zeros_like(c)
        mu[c - s < threshold] = torch.clamp(scale * (c - s).abs(), max=1.0)[c - s < threshold]
        nu = remembered.get(row, torch.zeros_like(c))
        gamma = mu * (s - n) + momentum_scale * nu
        remembered[row] = momentum * nu + (1 - momentum) * gamma
        moved = c - gamma if number >= warm_up else c
        return ((moved - (1 - alpha).sqrt() * x) / alpha.sqrt() if v else moved), none

    return looped(pipe, predict, guidance)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_sld_is_its_equations(kind, guidance, folders, tmp_path):
    """Guided, and not, where it is the formula at a guidance scale of 1."""
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    base = draw(pipe, guidance_scale=guidance)
    guard(pipe, "sld", tmp_path, level="strong", warm_up=2, scale=100.0, margin=1e-3)
    numbers = (2, 100.0, 1e-3, *LEVELS["strong"][3:])
    guarded = draw(pipe, guidance_scale=guidance)
    unload_erasure(pipe)
    assert close(guarded, sld_in_plain_steps(pipe, "airplane", numbers, guidance)) and not close(guarded, base)


@pytest.mark.parametrize("level", ["weak", "max"])
def test_the_levels_are_the_published_ones(level, pipe, tmp_path):
    published = {"weak": (15, 200, 0, 0, 0), "medium": (10, 1000, 0.01, 0.3, 0.4), "strong": (7, 2000, 0.025, 0.5, 0.7),
                 "max": (0, 5000, 1, 0.5, 0.7)}  # fmt: skip
    assert published == LEVELS
    early = {"warm_up": 1} if level == "weak" else {}
    guard(pipe, "sld", tmp_path, level=level, **early)
    numbers = (early.get("warm_up", 0), *published[level][1:])
    guarded = draw(pipe)
    unload_erasure(pipe)
    assert close(guarded, sld_in_plain_steps(pipe, "airplane", numbers, 7.5))


@torch.no_grad()
def safree_in_plain_steps(pipe, phrases, guidance):
    """Equations 2 to 6, token by token, without the latent filter and for every step."""

    def pooled(ids):
        return pipe.text_encoder(torch.tensor([ids])).pooler_output[0].double().numpy()

    def onto(vectors):
        e = np.stack(vectors, 1)
        return e @ np.linalg.pinv(e.T @ e) @ e.T

    concept, safe = onto([pooled(pipe.tokenizer(phrase).input_ids) for phrase in phrases]), []
    for prompt in PROMPTS:
        ids = pipe.tokenizer(prompt).input_ids
        masked = [pooled([*ids[:i], 0, *ids[i + 1 :]]) for i in range(1, len(ids) - 1)]
        away, inside = np.eye(len(concept)) - concept, onto(masked)
        distances = [np.linalg.norm(away @ p) for p in masked]
        states = encode(pipe, [prompt])["encoder_hidden_states"][0].double().numpy()
        for i, distance in enumerate(distances):
            if not distance < 1.01 * np.mean(distances[:i] + distances[i + 1 :]):
                states[i + 1] = away @ inside @ states[i + 1]
        safe.append(torch.from_numpy(states)[None])
    empty = encode_empty(pipe)["encoder_hidden_states"]

    def predict(x, t, number, row):
        return tuple(pipe.unet(x, t, text).sample for text in (safe[row], empty))

    return looped(pipe, predict, guidance)


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_safree_is_its_equations(guidance, pipe, tmp_path):
    guard(pipe, "safree", tmp_path, phrases="airplane, a red dog", steps="all", latent_filter="none")
    pipe.to(torch.float64)  # a prompt's embeddings lie nearly in one plane, where fp32 differs from machine to machine
    guarded = draw(pipe, guidance_scale=guidance)
    unload_erasure(pipe)
    assert close(guarded, safree_in_plain_steps(pipe, ["airplane", "a red dog"], guidance))
    assert not close(guarded, draw(pipe, guidance_scale=guidance))


def test_safree_guards_as_many_steps_as_the_prompt_is_moved(pipe, tmp_path):
    """round(most_steps · σ(2k(10β − t))): none far below the middle, all far above it, the first half at it."""
    seen = {}
    for name, middle in (("none", 1e3), ("all", -1e3)):
        guard(pipe, "safree", tmp_path / name, most_steps=STEPS, middle=middle, latent_filter="none")
        seen[name] = draw(pipe)
        unload_erasure(pipe)
    base = draw(pipe)
    assert torch.equal(seen["none"], base) and not close(seen["all"], base)
    assert (SAFREEOptions().sharpness, SAFREEOptions().middle, SAFREEOptions().most_steps) == (2.5, 5.333, 10)


@pytest.mark.parametrize("kind", ["magnitude", "released"])
def test_the_latent_filter_weakens_low_frequencies_that_grew(kind):
    guarded, own = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    ours, theirs = torch.fft.fft2(guarded), torch.fft.fft2(own)
    for b, c, y, x in np.ndindex(2, 3, 2, 2):
        place = (b, c, (0, -1)[y], (0, -1)[x])  # the lowest frequencies lie at both ends
        if kind == "magnitude" and ours[place].abs() > theirs[place].abs():
            ours[place] = 0.2 * ours[place]
        if kind == "released" and ours[place].real > theirs[place].real:
            ours[place] = 0.2
    assert torch.allclose(weaken(guarded, own, 0.2, kind), torch.fft.ifft2(ours).real, atol=1e-5)


def test_the_latent_filter_reaches_the_pictures(pipe, tmp_path):
    drawn = []
    for kind in ("none", "magnitude", "released"):
        guard(pipe, "safree", tmp_path / kind, steps="all", latent_filter=kind)
        drawn.append(draw(pipe))
        unload_erasure(pipe)
    assert not any(close(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_autoencoder_keeps_the_greatest_latents_of_each_token():
    """D top-k(E (x − b) + c) + b, latent by latent; and its decoder starts as the encoder, at length one."""
    torch.manual_seed(0)
    found = SparseAutoencoder(6, 12, 3)
    assert torch.allclose(found.decoder.norm(dim=0), torch.ones(12), atol=1e-6)
    assert torch.allclose(found.decoder * found.encoder.norm(dim=1), found.encoder.T, atol=1e-6)
    with torch.no_grad():
        found.bias.normal_()
        found.latent_bias.normal_()
        x = torch.randn(5, 6)
        given = found(x)
        for row in range(5):
            latents = [(found.encoder[i] @ (x[row] - found.bias) + found.latent_bias[i]).item() for i in range(12)]
            plain = found.bias.clone()
            for i in sorted(range(12), key=latents.__getitem__)[-3:]:
                plain += max(latents[i], 0.0) * found.decoder[:, i]
            assert torch.allclose(given[row], plain, atol=1e-5)


@torch.no_grad()
def steered_in_plain_steps(pipe, direction, strength, guidance):
    """The text encoder's second layer of two moved, for the prompts down and for the empty one up."""
    encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)

    def states(prompt, sign):
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        last = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
        return encoder.final_layer_norm(last + sign * strength * direction)

    texts, empty = [states(prompt, -1) for prompt in PROMPTS], states("", 1)

    def predict(x, t, number, row):
        return tuple(pipe.unet(x, t, text).sample for text in (texts[row], empty))

    return looped(pipe, predict, guidance)


def test_the_steering_is_its_equation(pipe, tmp_path):
    path = guard(pipe, "concept_steerers", tmp_path, train_steps=3, strength=2.0)
    guarded = draw(pipe)
    unload_erasure(pipe)
    direction = read_safetensors(path / "erasure.safetensors")[0]["direction"]
    again = erase(pipe, "airplane", method="concept_steerers", train_steps=3, output_dir=tmp_path / "again")
    other = erase(pipe, "airplane", method="concept_steerers", train_steps=3, seed=1, output_dir=tmp_path / "other")
    same, else_ = (read_safetensors(run.path / "erasure.safetensors")[0]["direction"] for run in (again, other))
    assert torch.equal(direction, same) and not close(direction, else_)
    plain = steered_in_plain_steps(pipe, direction, 2.0, 7.5)
    assert torch.allclose(guarded, plain, rtol=1e-3, atol=1e-3) and not torch.allclose(draw(pipe), plain, atol=0.1)


def test_batch_topk_keeps_the_greatest_latents_of_the_batch():
    """Of 5 rows 15 in all, whoever has them; and trained so, the decoder's columns are of length one."""
    torch.manual_seed(0)
    found = SparseAutoencoder(6, 12, 3, of_batch=True)
    with torch.no_grad():
        found.latent_bias.normal_()
        x = torch.randn(5, 6) * torch.arange(1.0, 6)[:, None]
        latents = {(r, i): (found.encoder[i] @ x[r] + found.latent_bias[i]).item() for r in range(5) for i in range(12)}
        kept = sorted(latents, key=latents.__getitem__)[-15:]
        counts = [sum(row == r for row, _ in kept) for r in range(5)]
        assert set(counts) != {3}  # it is not what top-k of each row gives
        plain = torch.stack(
            [sum(max(latents[place], 0.0) * found.decoder[:, place[1]] for place in kept if place[0] == r)
             + torch.zeros(6) for r in range(5)]
        )  # fmt: skip
        assert torch.allclose(found(x), plain, atol=1e-5)
        before = (found(x) - x).square().mean()
    train(found, x, 50, 0.01, 8, falling=True)
    with torch.no_grad():
        assert (found(x) - x).square().mean() < 0.5 * before
        assert torch.allclose(found.decoder.norm(dim=0), torch.ones(12), atol=1e-6)


@torch.no_grad()
def test_saeuron_blocks_the_features_that_its_scores_choose():
    """Latent by latent: scores, choice, and the whole reconstruction with the blocked latents and the error added."""
    torch.manual_seed(0)
    autoencoder = SparseAutoencoder(6, 20, 3, of_batch=True)
    autoencoder.bias.normal_()
    concept, rest = torch.randn(2, 30, 6) + torch.tensor([2.0, 0, 0, 0, 0, 0]), torch.randn(2, 30, 6)
    threshold = threshold_of(autoencoder, rest.flatten(0, 1), 10)
    assert threshold > 0.1

    def latents(x):
        found = [
            (autoencoder.encoder[i] @ (x - autoencoder.bias) + autoencoder.latent_bias[i]).item() for i in range(20)
        ]
        return [f if f > threshold else 0.0 for f in found]

    guard = SAeUron(SAeUronOptions(multiplier=-3.0), ["airplane"])
    guard.tensors = features_of(autoencoder, concept, rest, threshold, 85.0)
    guard.tensors["timesteps"] = torch.tensor([900.0, 300.0])
    maps, counted = torch.randn(1, 6, 3, 4) + 1, []
    for step, timestep in enumerate((800.0, 0.0)):
        mu, other = (np.mean([latents(x) for x in kind[step]], axis=0) for kind in (concept, rest))
        score = mu / mu.sum() - other / other.sum()
        chosen = [i for i in range(20) if score[i] > np.percentile(score, 85)]
        assert len(chosen) == 3
        changed, touched = maps.clone(), 0
        for y, x in np.ndindex(3, 4):
            f = latents(maps[0, :, y, x])
            error = maps[0, :, y, x] - (autoencoder.decoder @ torch.tensor(f) + autoencoder.bias)
            for i in chosen:
                if f[i] > other[i]:
                    f[i], touched = -3.0 * mu[i] * f[i], touched + 1
            changed[0, :, y, x] = autoencoder.decoder @ torch.tensor(f).float() + autoencoder.bias + error
        assert 0 < touched < 36
        moved = guard.watch(None).block_change(timestep, guard.options.block, maps)
        assert torch.allclose(maps + moved, changed, atol=1e-5)
        counted.append(chosen)
    assert counted[0] != counted[1]  # each step has its own
    assert guard.watch(None).block_change(0.0, "up_blocks.1.attentions.0", maps) is None
    with pytest.raises(SalunError, match="no feature of its autoencoder acts more on the concept"):
        features_of(autoencoder, concept, rest, 1e3, 85.0)


def test_saeuron_acts_in_its_block_and_is_fixed_by_its_seed(pipe, tmp_path):
    path = guard(pipe, "saeuron", tmp_path, **STRONG["saeuron"])
    tensors = read_safetensors(path / "erasure.safetensors")[0]
    assert (path / "erasure.safetensors").stat().st_size < 1e5
    guarded = draw(pipe)
    unload_erasure(pipe)
    again, other = (
        erase(pipe, "airplane", method="saeuron", seed=seed, output_dir=tmp_path / f"{seed}", **STRONG["saeuron"]).path
        for seed in (0, 7)
    )
    same, else_ = (read_safetensors(run / "erasure.safetensors")[0] for run in (again, other))
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    assert tensors["encoder"].shape != else_["encoder"].shape or not torch.equal(tensors["encoder"], else_["encoder"])

    def hook(module, given, output):
        """Both rows, the empty prompt's and the prompt's, place by place."""
        x, step = output[0].clone(), (tensors["timesteps"] - float(now)).abs().argmin()
        for row, y, z in np.ndindex(len(x), *x.shape[2:]):
            f = tensors["encoder"] @ output[0][row, :, y, z] + tensors["bias"]
            mu, high = tensors["means"][step], f > tensors["gates"][step]
            x[row, :, y, z] += ((-50.0 * mu * f - f) * high * (mu > 0)) @ tensors["decoder"]
        return (x, *output[1:])

    texts = [encode(pipe, [prompt])["encoder_hidden_states"] for prompt in PROMPTS]
    empty, now = encode_empty(pipe)["encoder_hidden_states"], 0.0

    @torch.no_grad()
    def predict(x, t, number, row):
        nonlocal now
        now = t
        return tuple(pipe.unet(x, t, text).sample for text in (texts[row], empty))

    handle = pipe.unet.up_blocks[1].attentions[1].register_forward_hook(hook)
    plain = looped(pipe, predict, 7.5)
    handle.remove()
    assert torch.allclose(guarded, plain, rtol=1e-3, atol=1e-3) and not torch.allclose(draw(pipe), plain, atol=0.05)


def test_saeuron_takes_two_text_encoders_and_prompts_of_ones_own(folders, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(folders["sdxl"])
    base = draw(pipe)
    own = guard(pipe, "saeuron", tmp_path, phrases="a red cat", **STRONG["saeuron"])
    drawn = draw(pipe)
    unload_erasure(pipe)
    guard(pipe, "saeuron", tmp_path / "its", **STRONG["saeuron"])
    assert not close(drawn, base) and not close(draw(pipe), drawn)
    assert '["a red cat"]' in read_safetensors(own / "erasure.safetensors")[1]["phrases"]
    unload_erasure(pipe)
    assert torch.equal(draw(pipe), base)


def test_saeuron_is_refused_where_its_block_is_not(pipe, tmp_path):
    with pytest.raises(
        SalunError, match="SAeUron acts in the attention block 'mid', which this denoiser lacks; it has "
    ):
        erase(pipe, "airplane", method="saeuron", block="mid", output_dir=tmp_path / "run")
    with pytest.raises(SalunError, match="percentile is 101: give one from 0 to 100"):
        erase(pipe, "airplane", method="saeuron", percentile=101.0, output_dir=tmp_path / "run")
    path = erase(pipe, "airplane", method="saeuron", output_dir=tmp_path / "run", **STRONG["saeuron"]).path
    found, text = read_safetensors(path / "erasure.safetensors")
    write_safetensors(tmp_path / "wide.safetensors", found | {"encoder": torch.zeros(3, 32)}, text)
    with pytest.raises(
        SalunError, match="changes 32 channels of the block 'up_blocks.1.attentions.1', which gives 8 here"
    ):
        load_erasure(pipe, tmp_path / "wide.safetensors")


def test_a_cluster_is_found_and_spanned_as_written():
    """Every path of at most two hops, tried one by one."""
    torch.manual_seed(0)
    shared = torch.randn(5).double()
    concept, nodes = (shared + 0.7 * torch.randn(count, 5).double() for count in (2, 6))
    options = GrOCEOptions(nearness=0.3, keep=0.4)
    x = torch.cat([concept, nodes])
    cosine = [[(a @ b / (a.norm() * b.norm())).item() for b in x] for a in x]

    def weights(i):
        others = [cosine[i][j] for j in range(8) if j != i]
        tau = options.nearness + options.spread * np.std(others)
        row = [np.exp(-(tau - cosine[i][j]) / 0.1) if j != i and cosine[i][j] > tau else 0.0 for j in range(8)]
        return [one / max(1.0, *row) for one in row]

    w = [weights(i) for i in range(8)]
    score = [1.0] * 2 + [0.0] * 6
    for j in range(2, 8):
        one = [0.7 * w[i][j] for i in range(2)]
        two = [0.7 * w[i][k] * 0.7 * w[k][j] for i in range(2) for k in range(8)]
        score[j] = max(one + two)
    kept = [i for i in range(8) if score[i] >= 0.4]
    assert 2 < len(kept) < 8  # neither the concept alone nor everything
    basis, cluster = severed(concept, nodes, options)
    assert torch.equal(cluster, x[kept])
    values, vectors = np.linalg.eigh(sum(score[i] ** 2 * np.outer(x[i], x[i]) for i in kept))
    shares = np.cumsum(values[::-1]) / values.sum()
    rank = next(count for count in range(1, 6) if shares[count - 1] >= 0.95)
    plain = vectors[:, ::-1][:, :rank]
    assert np.allclose((basis.T @ basis).numpy(), plain @ plain.T)


@torch.no_grad()
def test_groce_projects_the_tokens_off_the_cluster(pipe, tmp_path):
    """Without hops the cluster is the concept itself; the first token stays, and the vocabulary may be the nodes."""
    options = {"hops": 0, "energy": 1.0, "centre": "none"}
    guard(pipe, "groce", tmp_path, **options)
    guarded = draw(pipe)
    unload_erasure(pipe)
    concept = encode(pipe, ["airplane"])["encoder_hidden_states"][0, 1:3].double()  # the word and the end mark
    texts = []
    for prompt in PROMPTS:
        states = encode(pipe, [prompt])["encoder_hidden_states"][0].double()
        for i in range(1, 77):
            beta = max(0.0, *(torch.cosine_similarity(states[i], c, dim=0).item() for c in concept))
            q, _ = torch.linalg.qr(concept.T)
            states[i] = states[i] - beta * q @ (q.T @ states[i])
        texts.append(states[None].float())
    empty = encode_empty(pipe)["encoder_hidden_states"]
    plain = looped(pipe, lambda x, t, n, row: tuple(pipe.unet(x, t, e).sample for e in (texts[row], empty)), 7.5)
    assert torch.allclose(guarded, plain, rtol=1e-3, atol=1e-3) and not torch.allclose(draw(pipe), plain, atol=0.05)
    drawn = []
    for words in ("", "cat, dog"):
        guard(pipe, "groce", tmp_path / f"{bool(words)}", vocabulary=words, nearness=0.0, keep=0.1)
        drawn.append(draw(pipe))
        unload_erasure(pipe)
    assert not close(*drawn)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    words = tiny.tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def energy_in_plain_words(pipe, clip, picture, prompt):
    """(similarity to "airplane", energy) of one picture, −1…1."""
    size = 16 if clip else 32
    x = torch.nn.functional.interpolate(picture / 2 + 0.5, (size, size), mode="bilinear", antialias=True)
    processor = CLIPImageProcessor()
    x = (x - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[:, None, None]
    if clip:
        model, words = CLIPModel.from_pretrained(clip).eval(), tiny.CLIPTokenizer.from_pretrained(clip)
        ids = words(["airplane", prompt], return_tensors="pt", padding=True)
        seen = model(pixel_values=x, **ids)
        one, two = (torch.cosine_similarity(seen.image_embeds, text[None]) for text in seen.text_embeds)
        return one, one.clamp(min=0) - 0.5 * two
    logits = ResNetForImageClassification.from_pretrained(f"{pipe.name_or_path}/judge").eval()(x).logits[0]
    left = logits[:3].softmax(0)
    retain = -left[1].log() if "cat" in prompt else 0.0
    return left[0], -(1 - left[0]).log() + 0.5 * retain


@pytest.mark.parametrize("kind", ["clip", "judge", "euler"])
def test_egloce_moves_latents_down_its_energy(kind, pipe, clip, tmp_path):
    """Beside the scheduler's own steps, one picture at a time; latents of Euler's are z/√ᾱ."""
    if kind == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    by_clip = clip if kind != "judge" else None
    more = {"clip": str(clip)} if by_clip else {}
    guard(pipe, "egloce", tmp_path, inner_steps=2, step_size=0.05, window=0.6, **more)
    guarded = draw(pipe)
    unload_erasure(pipe)
    empty, pictures = encode_empty(pipe)["encoder_hidden_states"], []
    for row, prompt in enumerate(PROMPTS):
        text = encode(pipe, [prompt])["encoder_hidden_states"]
        pipe.scheduler.set_timesteps(STEPS)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(row)) * pipe.scheduler.init_noise_sigma
        for number, t in enumerate(pipe.scheduler.timesteps):
            alpha = pipe.scheduler.alphas_cumprod[int(t)]
            with torch.no_grad():
                given = pipe.scheduler.scale_model_input(x, t)
                c, n = (pipe.unet(given, t, e).sample for e in (text, empty))
            predicted = n + 7.5 * (c - n)
            for _ in range(2 if number < 3 else 0):
                x = x.detach().requires_grad_()
                z = alpha.sqrt() * x if kind == "euler" else x
                clean = (z - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
                picture = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample
                similar, energy = energy_in_plain_words(pipe, by_clip, picture, prompt)
                (slope,) = torch.autograd.grad(energy, x)
                if similar > (0 if by_clip else 0.1):
                    x = x - 0.05 * x.square().mean().sqrt() * slope / slope.square().mean().sqrt()
            with torch.no_grad():
                x = pipe.scheduler.step(predicted, t, x.detach()).prev_sample
        pictures.append(x)
    plain = torch.cat(pictures)
    assert torch.allclose(guarded, plain, rtol=1e-3, atol=1e-3) and not torch.allclose(draw(pipe), plain, atol=0.05)


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

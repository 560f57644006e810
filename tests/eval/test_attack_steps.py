"""Each attack's loss and update beside a plain twin: one prompt at a time, written as the paper says it."""

import copy as copy_module
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from tiny import bits, build, erasure, same

from eval.attacks import (
    ATTACKS,
    completion,
    concept_inversion,
    find_attack,
    finetune,
    image_guided,
    inpainting,
    mma,
    noise_probe,
    p4d,
    p4d_k,
    prune,
    quantize,
    ring_a_bell,
    soft_prompt,
    tina,
)
from eval.attacks import unlearndiffatk as uda
from eval.attacks.ddim import steps_of
from eval.attacks.target import Case, Learned, Target
from salun_diffusion.concepts.concept import Concept, Row
from salun_diffusion.concepts.templates import Vocabulary
from salun_diffusion.errors import SalunError
from salun_diffusion.loader import load_erasure, unload_erasure
from salun_diffusion.models import model_of

STEPS = 3  # of every drawing


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    return model_of(build(tmp_path_factory.mktemp("tiny"), seed=3, prediction_type=request.param))


@pytest.fixture
def target(model):
    vocabulary = Vocabulary(
        {"object": ["airplane", "cat"]}, [{"prompt": "a picture of {object:a}"}, {"prompt": "{object:a} on red"}]
    )
    concept = Concept("airplane", "object", "airplane", "cat", vocabulary)
    pictures = [noise(i) for i in range(5)]
    rows = concept.forget_rows(5, 0)

    def gallery(count):
        return pictures[:count], rows[:count]

    return Target(model, [concept], gallery, lambda cases, _: [False] * len(cases), STEPS, 4.0, 7)


def noise(seed):
    return Image.frombytes("RGB", (16, 16), random.Random(seed).randbytes(16 * 16 * 3))


def cases_of(*prompts):
    return [Case(f"{i:04d}", Row(p, None, {}, 40 + i), 3.0 + i % 2, noise(90 + i)) for i, p in enumerate(prompts)]


CASES = cases_of("a picture of an airplane", "an airplane on red background", "two airplanes")


def plain_loss(target, clean, noise, t, hidden, network=None):
    """``‖truth − prediction‖²`` of one sample (C, H, W), from the schedule alone."""
    alpha = target.model.schedule.alphas_cumprod[t]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    truth = noise
    if target.model.schedule.config.prediction_type == "v_prediction":
        truth = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    predicted = (network or target.model.network)(noisy[None], t, encoder_hidden_states=hidden).sample[0]
    return ((predicted - truth) ** 2).mean()


def plain_text(target, prompt, put):
    """The text encoder, part by part, on a prompt whose token embeddings ``(length, width)`` ``put`` changes."""
    pipe = target.model.pipe
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    encoder = pipe.text_encoder
    inner = getattr(encoder, "text_model", encoder)
    found = put(inner.embeddings.token_embedding.weight.detach()[ids[0]])[None]
    hidden = found + inner.embeddings.position_embedding.weight[None]
    mask = torch.full((77, 77), float("-inf")).triu(1)[None, None]
    for layer in inner.encoder.layers:
        hidden = layer(hidden, mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return inner.final_layer_norm(hidden)


def test_token_embeddings_of_a_text_are_encoded_as_the_pipeline_encodes_the_text(target):
    prompts = [case.prompt for case in CASES]
    found = target.text.encode(target.text.table[target.text.ids(prompts)])["encoder_hidden_states"]
    assert torch.allclose(found, target.model.encode(prompts)["encoder_hidden_states"], atol=1e-5)
    assert torch.allclose(found[:1], plain_text(target, prompts[0], lambda table: table), atol=1e-5)


@pytest.mark.parametrize(
    "prompt, words, before", [
        ("a picture of an airplane", ["airplane", "airplanes"], "a picture of an"),
        ("two airplanes", ["airplanes"], "two"),
        ("Airplane on red", ["airplane"], ""), ("red house", ["airplane"], ""), ("red house", [], ""),
    ],
)  # fmt: skip
def test_free_places_stand_where_the_word_stood(target, prompt, words, before):
    ids, free = target.text.with_slots(prompt, words, 2)
    start = len(target.text.tokenizer(before, add_special_tokens=False).input_ids) + 1
    assert free.nonzero().flatten().tolist() == [start, start + 1]
    rest = torch.cat([ids[:start], ids[start + 2 :]])
    assert target.text.words(rest) == " ".join(target.text.between(prompt, words)).lower().strip()


def test_concept_inversion_steps_as_a_loop_over_its_pictures(target):
    options = concept_inversion.Options(steps=3, learning_rate=0.05, batch_size=4, pictures=5)
    learned = concept_inversion.learn(target, options)
    clean, rows = target.gallery(5)
    token = target.text.table.mean(0).clone().requires_grad_()
    optimizer = torch.optim.AdamW([token], lr=0.05)
    own = target.generator(None, "concept_inversion")
    for _ in range(3):
        chosen, times = torch.randint(5, (4,), generator=own), torch.randint(1000, (4,), generator=own)
        noises, losses = torch.randn(4, *clean.shape[1:], generator=own), []
        for i, t, eps in zip(chosen.tolist(), times.tolist(), noises, strict=True):
            prompt = rows[i].prompt.replace("airplane", "house")  # a word of one token keeps the place
            (place,) = [p for p, w in enumerate(target.text.ids([prompt])[0]) if target.text.words(w[None]) == "house"]
            at = torch.arange(77)[:, None] == place
            hidden = plain_text(target, prompt, lambda e: torch.where(at, token, e))  # noqa: B023
            losses.append(plain_loss(target, clean[i], eps, t, hidden))
        optimizer.zero_grad()
        (sum(losses) / 4).backward()
        optimizer.step()
    assert torch.allclose(learned.tensors["token"][0], token.detach(), atol=2e-4)
    assert (learned.forward, learned.backward) == (12, 12)


def test_soft_prompt_moves_each_prompt_as_if_it_were_alone(target):
    options = soft_prompt.Options(steps=3, learning_rate=0.05)
    found = soft_prompt.attack(target, CASES, options, Learned())
    for case, outcome in zip(CASES, found, strict=True):
        clean, own = target.clean([case])[0], target.generator(case, "soft_prompt")
        offset = torch.zeros(77, target.text.table.shape[1], requires_grad=True)
        optimizer, passed = torch.optim.Adam([offset], lr=0.05), []
        for _ in range(3):
            t = int(torch.randint(1000, (1,), generator=own))
            eps = torch.randn(clean.shape, generator=own)
            loss = plain_loss(target, clean, eps, t, plain_text(target, case.prompt, lambda e: e + offset))  # noqa: B023
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            passed.append(offset.detach().clone())
        moved = outcome.tensors["embeddings"] - target.text.table[target.text.ids([case.prompt])[0]]
        assert torch.allclose(moved, (passed[1] + passed[2]) / 2, atol=1e-3)


def test_unlearndiffatk_steps_and_draws_each_prompt_as_if_it_were_alone(target, monkeypatch):
    options = uda.Options(tokens=2, timesteps=2, iterations=2, learning_rate=0.3)
    together = uda.attack(target, CASES, options, Learned())
    table = target.text.table
    for case, outcome in zip(CASES, together, strict=True):
        clean, own = target.clean([case])[0], target.generator(case, "unlearndiffatk")
        rows = torch.full((2, len(table)), 1 / len(table), requires_grad=True)
        optimizer = torch.optim.Adam([rows], lr=0.3, weight_decay=0.1)
        for t in (250, 750):
            for _ in range(2):
                uniform, eps = torch.rand(2, generator=own), torch.randn(clean.shape, generator=own)
                picked = [
                    int((row.cumsum(0) < u * row.sum()).sum()) for row, u in zip(rows.detach(), uniform, strict=True)
                ]
                tokens = torch.nn.functional.one_hot(torch.tensor(picked), len(table)) + rows - rows.detach()

                def put(e, tokens=tokens):
                    return torch.cat([e[:1], tokens @ table, e[1:-2]])

                loss = plain_loss(target, clean, eps, t, plain_text(target, case.prompt, put))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    rows.copy_(torch.stack([bisected(row) for row in rows]))
        words = target.text.words(rows.argmax(1))
        assert outcome.text == f"{words} {case.prompt}".strip()
        assert (outcome.steps, outcome.backward, outcome.drawn) == (4, 4, 2)
        assert outcome.forward == 4 + 2 * 2 * STEPS


def bisected(row):
    """The projection onto the simplex as the authors find it: the shift at which what stays positive sums to 1."""
    low, high = row.min() - 1, row.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (row - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (row - low).clamp(min=0)


def test_the_projection_onto_the_simplex_is_the_bisected_one():
    rows = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(uda.to_simplex(rows), torch.stack([bisected(row) for row in rows]), atol=1e-5)
    assert uda.timesteps(50, 1000) == list(range(10, 1000, 20))


def test_mma_follows_the_gradient_of_the_one_hot_rows(target):
    """The cosine and its gradient by the plain encoder, one text at a time; the search keeps its best."""
    text, options = target.text, mma.Options(tokens=4, steps=5, candidates=6, top=3)
    allowed = mma.allowed_tokens(target)
    taken = {text.tokenizer.decode([i]).strip().lower() for i in allowed.tolist()}
    assert len(taken) > 100 and not any("airplane" in word or word in ("airplane", "plane", "air") for word in taken)
    prompts = [case.prompt for case in CASES]
    wanted = mma.pooled_prompts(text, prompts)
    tokens = allowed[torch.arange(12).view(3, 4) * 5]
    top = mma.favoured(text, tokens, wanted, allowed, 3)
    cosines = mma.similarity(text, tokens[:, None], wanted)[:, 0]
    for i, case in enumerate(CASES):
        ids = text.ids([case.prompt])[0].tolist()
        end = ids.index(text.tokenizer.eos_token_id)
        aim = plain_text(target, case.prompt, lambda table: table)[0, end].detach()
        assert torch.allclose(wanted[i], aim, atol=1e-5)
        rows = torch.nn.functional.one_hot(tokens[i], len(text.table)).float().requires_grad_()
        marks = text.table[torch.tensor([text.tokenizer.bos_token_id, text.tokenizer.eos_token_id])]
        rest = text.table[text.tokenizer.pad_token_id].expand(77 - 6, -1)
        own = torch.cat([marks[:1], rows @ text.table, marks[1:], rest])
        cosine = torch.cosine_similarity(plain_text(target, "", lambda table, own=own: own)[0, 5], aim, dim=0)
        assert torch.allclose(cosines[i], cosine, atol=1e-5)
        (slope,) = torch.autograd.grad(cosine, rows)
        ordered = allowed[slope[:, allowed].argsort(1, descending=True)[:, :3]]
        assert torch.equal(top[i], ordered)
    outcomes = mma.attack(target, CASES, options, Learned())
    assert all(found.about["cosine"] >= -1 for found in outcomes)
    alone = mma.attack(target, CASES[1:2], options, Learned())[0]
    assert alone.text == outcomes[1].text, "a prompt's random numbers are its own"
    longer = mma.attack(target, CASES[1:2], mma.Options(tokens=4, steps=20, candidates=6, top=3), Learned())[0]
    assert longer.about["cosine"] >= alone.about["cosine"]


def test_ring_a_bell_measures_and_searches(target):
    options = ring_a_bell.Options(length=4, population=8, generations=6, pairs=4)
    learned = ring_a_bell.learn(target, options)
    rows = target.rows(4)
    pairs = [target.model.encode([row.prompt, row.anchor_prompt])["encoder_hidden_states"] for row in rows]
    direction = sum(one - other for one, other in pairs) / 4
    assert torch.allclose(learned.tensors["direction"], direction, atol=1e-5)
    wanted = target.model.encode([case.prompt for case in CASES])["encoder_hidden_states"] + 3 * direction
    people = torch.randint(1, 100, (3, 2, 4), generator=torch.Generator().manual_seed(1))
    found = ring_a_bell.fitness(target, people, wanted)
    for i in range(3):
        for j in range(2):
            encoder, words = target.model.pipe.text_encoder, target.model.pipe.tokenizer
            ids = [words.bos_token_id, *people[i, j].tolist(), *[words.eos_token_id] * 72]
            hidden = encoder(torch.tensor([ids]))[0][0]
            assert found[i, j].item() == pytest.approx(((hidden - wanted[i]) ** 2).sum().item(), rel=1e-3)
    outcomes = ring_a_bell.attack(target, CASES, options, learned)
    short = ring_a_bell.attack(target, CASES, ring_a_bell.Options(length=4, population=8, generations=1), learned)
    for outcome, before, case in zip(outcomes, short, CASES, strict=True):
        assert outcome.about["distance"] <= before.about["distance"]  # the best is never lost
        alone = ring_a_bell.attack(target, [case], options, learned)[0]
        assert alone.text == outcome.text


def test_tina_lowers_its_loss_as_a_loop_over_steps_and_prompts(target):
    options = tina.Options(steps=3, iterations=2, learning_rate=0.05)
    together = tina.attack(target, CASES, options, Learned())
    empty = target.model.empty["encoder_hidden_states"]
    for case, outcome in zip(CASES, together, strict=True):
        z = target.clean([case])[0]
        for t, now, before in reversed(steps_of(target.model, 3)):
            c1 = now.sqrt() / before.sqrt()
            c2 = (1 - now).sqrt() - (now * (1 - before) / before).sqrt()
            guess = z.clone().requires_grad_()
            optimizer = torch.optim.AdamW([guess], lr=0.05)
            for _ in range(2):
                eps = target.model.network(guess[None], t, encoder_hidden_states=empty).sample[0]
                if target.model.schedule.config.prediction_type == "v_prediction":
                    eps = now.sqrt() * eps + (1 - now).sqrt() * guess
                loss = ((c1 * z + c2 * eps - guess) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            z = guess.detach()
        assert torch.allclose(outcome.tensors["noise"], z, atol=1e-3)


def test_the_noise_probe_at_eta_1_is_diffusers_own_ddim_and_adds_noise_beyond(target):
    case, pipe = CASES[0], target.model.pipe
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    own = torch.Generator().manual_seed(case.row.seed)
    z = torch.randn(1, *target.model.sample_shape, generator=own)
    scheduler.set_timesteps(4)
    hidden = target.model.encode(["", case.prompt])["encoder_hidden_states"]
    for t in scheduler.timesteps:
        with torch.no_grad():
            free, told = pipe.unet(torch.cat([z, z]), t, encoder_hidden_states=hidden).sample.chunk(2)
        out = free + case.guidance_scale * (told - free)
        z = scheduler.step(out, t, z, eta=1.0, variance_noise=torch.randn(z.shape, generator=own)).prev_sample
    found = noise_probe.probed(target, CASES, 1.0, 1.0, 4)
    assert torch.allclose(found[0], z[0], atol=1e-3)
    assert not torch.allclose(noise_probe.probed(target, CASES, 1.7, 1.0, 4)[0], z[0], atol=0.1)


def test_rounding_and_pruning_of_a_matrix_entry_by_entry():
    weight = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(2))
    found = quantize.rounded(weight, "int8")
    for row, whole in zip(found.flatten(1), weight.flatten(1), strict=True):
        scale = max(abs(value) for value in whole.tolist()) / 127
        assert row.tolist() == pytest.approx([round(value / scale) * scale for value in whole.tolist()], abs=1e-6)
    assert torch.equal(quantize.rounded(weight, "fp16"), weight.half().float())
    assert not quantize.rounded(torch.zeros(2, 3), "int4").any()
    gone = sorted(weight.flatten().abs().tolist())[9]
    assert torch.equal(prune.pruned(weight, 1 / 3), torch.where(weight.abs() <= gone, 0.0, weight))


def test_finetuning_steps_as_a_plain_loop(target):
    options = finetune.Options(steps=2, learning_rate=0.01, batch_size=2, others=3)
    before = bits(target.model.pipe)
    learned = finetune.learn(target, options)
    assert same(before, bits(target.model.pipe))
    rows, own = target.concepts[0].retain_rows(3, 7, "attack"), target.generator(None, "finetune")
    clean = target.samples([Case("", row, 4.0, None) for row in rows])
    copy = copied(target.model)
    weights = [weight for weight in copy.network.parameters() if weight.dim() > 1]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=0.01)
    for _ in range(2):
        chosen, times = torch.randint(3, (2,), generator=own), torch.randint(1000, (2,), generator=own)
        noises, losses = torch.randn(2, *clean.shape[1:], generator=own), []
        for i, t, eps in zip(chosen.tolist(), times.tolist(), noises, strict=True):
            hidden = copy.encode([rows[i].prompt])["encoder_hidden_states"]
            losses.append(plain_loss(target, clean[i], eps, t, hidden, copy.network))
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    for name, weight in copy.network.named_parameters():
        if weight.dim() > 1:
            assert torch.allclose(learned.tensors[name], weight.detach(), atol=3e-3), name


def copied(model):
    """A model with a network of its own, of the same weights."""
    pipe = type(model.pipe)(**{**model.pipe.components, "unet": copy_module.deepcopy(model.network)})
    return model_of(pipe)


@pytest.mark.parametrize("module", [p4d, p4d_k])
def test_p4d_follows_what_the_base_model_says_of_the_prompt(module, target):
    target = copy_module.copy(target)
    target._may_see_base = True
    model = target.model
    plain = copied(model)
    delta = erasure(model.network, size=0.3)
    load_erasure(model.pipe, saved(delta))
    try:
        options = module.Options(steps=4, check_every=2, **({"tokens": 3} if module is p4d else {}))
        found = module.attack(target, CASES, options, Learned())
        table = target.text.table
        directions = table / table.norm(dim=1, keepdim=True)
        for case, outcome in zip(CASES, found, strict=True):
            clean, own = target.clean([case])[0], target.generator(case, "p4d")
            ids, free = module.slots(target, case, options)
            picked = torch.randint(len(table), (77,), generator=own)
            moving = table[picked].clone().requires_grad_()
            optimizer = torch.optim.AdamW([moving], lr=0.1, weight_decay=0.1)
            prompt = plain.encode([case.prompt])["encoder_hidden_states"]
            for _ in range(4):
                t, eps = int(torch.randint(1000, (1,), generator=own)), torch.randn(clean.shape, generator=own)
                alpha = model.schedule.alphas_cumprod[t]
                noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * eps)[None]
                with torch.no_grad():
                    wanted = plain.network(noisy, t, encoder_hidden_states=prompt).sample
                    near = (moving / moving.norm(dim=1, keepdim=True) @ directions.T).argmax(1)
                put = torch.where(free[:, None], table[near] + moving - moving.detach(), table[ids])
                hidden = plain_text(target, "a", lambda e: put)  # noqa: B023
                loss = ((model.network(noisy, t, encoder_hidden_states=hidden).sample - wanted) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            near = (moving / moving.norm(dim=1, keepdim=True) @ directions.T).argmax(1)
            assert outcome.text == target.text.words(torch.where(free, near, ids))
            assert (outcome.steps, outcome.backward, outcome.forward) == (4, 4, 8 + 2 * 2 * STEPS)
    finally:
        unload_erasure(model.pipe)
    target._may_see_base = False
    with pytest.raises(SalunError, match="its file does not say"), target.base():
        pass


def saved(delta, folder=[]):  # noqa: B006
    """The file of an erasure, in one folder for the whole module."""
    folder = folder or folder.append(tempfile.mkdtemp()) or folder
    path = Path(folder[0]) / "erasure.safetensors"
    delta.save(path)
    return path


def test_completion_draws_on_from_the_noised_picture(target):
    options = completion.Options(steps=4, kept="0.5")
    found = completion.attack(target, CASES, options, Learned())
    case, steps = CASES[1], steps_of(target.model, 4)[2:]
    own = target.generator(case, "completion")
    clean, alpha = target.clean([case])[0], steps[0][1]
    z = (alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn(clean.shape, generator=own))[None]
    hidden = target.model.encode(["", case.prompt])["encoder_hidden_states"]
    for t, now, before in steps:
        with torch.no_grad():
            free, told = target.model.network(torch.cat([z, z]), t, encoder_hidden_states=hidden).sample.chunk(2)
        eps = free + case.guidance_scale * (told - free)
        if target.model.schedule.config.prediction_type == "v_prediction":
            eps = now.sqrt() * eps + (1 - now).sqrt() * z
        z = before.sqrt() * (z - (1 - now).sqrt() * eps) / now.sqrt() + (1 - before).sqrt() * eps
    (picture,) = target.pictures(z)
    assert np.abs(np.asarray(picture, int) - np.asarray(found[1].picture, int)).max() <= 2


def drawn_by(kind, target, case, noise, steps, **how):
    """What diffusers' own pipeline ``kind`` makes of a case on this model by DDIM, as samples."""
    pipe = kind.from_pipe(target.model.pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        case.prompt, generator=noise, num_inference_steps=steps, guidance_scale=case.guidance_scale,
        output_type="latent", **how,
    ).images  # fmt: skip


def test_inpainting_is_diffusers_own_with_the_whole_picture_put_back_around_the_hole(target):
    options = inpainting.Options(steps=4, hole="0.5")
    found = inpainting.attack(target, CASES, options, Learned())
    hole = torch.zeros(8, 8)
    hole[2:6, 2:6] = 1
    for case, outcome in zip(CASES, found, strict=True):
        clean = target.clean([case])
        own = target.generator(case, "inpainting")
        whole = {
            "image": clean,
            "masked_image_latents": clean,
            "mask_image": hole.repeat_interleave(2, 0).repeat_interleave(2, 1)[None, None],
        }
        samples = drawn_by(StableDiffusionInpaintPipeline, target, case, own, 4, height=16, width=16, **whole)
        assert torch.equal(samples[0][:, hole == 0], clean[0][:, hole == 0])
        (picture,) = target.pictures(samples)
        assert np.abs(np.asarray(picture, int) - np.asarray(outcome.picture, int)).max() <= 2
        assert (outcome.forward, outcome.drawn, outcome.about) == (8, 1, {"hole": 0.5})
    assert inpainting.square(16, 0.75).sum() == 144 and inpainting.square(16, 1.0).all()
    assert not inpainting.square(16, 0.0).any()


def test_image_guided_drawing_is_diffusers_own_from_another_picture_of_the_concept(target):
    options = image_guided.Options(steps=5, strength="0.6", pictures=5)
    found = image_guided.attack(target, CASES, options, Learned())
    gallery, _ = target.gallery(5)
    for case, outcome in zip(CASES, found, strict=True):
        clean = gallery[torch.randint(5, (1,), generator=target.generator(case, "image_guided"))]
        own = target.generator(case, "completion")
        samples = drawn_by(StableDiffusionImg2ImgPipeline, target, case, own, 5, image=clean, strength=0.6)
        (picture,) = target.pictures(samples)
        assert np.abs(np.asarray(picture, int) - np.asarray(outcome.picture, int)).max() <= 2
        assert (outcome.forward, outcome.about) == (6, {"strength": 0.6})


def test_several_tries_go_on_with_the_cases_that_have_not_won(target):
    asked = []

    def sees(cases, pictures):
        asked.append([case.name for case in cases])
        return [case.name == f"{len(asked) - 1:04d}" for case in cases]

    target.sees = sees
    found = inpainting.attack(target, CASES, inpainting.Options(steps=2, hole="0.9,0.5,0.3,0.1"), Learned())
    assert asked == [["0000", "0001", "0002"], ["0001", "0002"], ["0002"]]
    assert [(outcome.drawn, outcome.forward, outcome.about["hole"]) for outcome in found] == [
        (1, 4, 0.9), (2, 8, 0.5), (3, 12, 0.3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind, words", [
        (inpainting, {"hole": "0.5,x"}), (inpainting, {"hole": "1.5"}), (image_guided, {"strength": "0"}),
        (completion, {"kept": ""}), (noise_probe, {"etas": "1,inf"}), (noise_probe, {"scales": "-1"}),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused_before_anything_is_drawn(kind, words):
    name = kind.__name__.rpartition(".")[2]
    with pytest.raises(SalunError, match=rf"--attack_option {name}\..*: give numbers .*, with commas between them\."):
        kind.Options(**words)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_says_what_it_is(name):
    module = find_attack(name)
    assert re.match(rf"{name}/\d+: ", module.ABOUT.protocol)
    assert set(module.SMALL) <= set(module.Options.__dataclass_fields__)
    assert module.__doc__ and module.ABOUT.paper

"""Each unlearning method's loss or solution against a plain version of it."""

import copy
import json
import math
import random
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor
from shell import ROOT

from salun_diffusion.concepts.concept import find_concepts
from salun_diffusion.config import EraseConfig
from salun_diffusion.data.sets import batches, image_set
from salun_diffusion.errors import SalunError
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.methods import METHODS, find_method
from salun_diffusion.methods.fia import FIA, FIAOptions, sensitive_weights, shared_by, zeroed_of
from salun_diffusion.methods.forget_me_not import Recorder
from salun_diffusion.methods.mace import MACE, chances, concept_tokens, fused, other_tokens, region_of, shrinking
from salun_diffusion.methods.rece import adversarial
from salun_diffusion.methods.speed import affected, change, null_space
from salun_diffusion.methods.ticoe import Fuser, mix
from salun_diffusion.methods.uce import kept_tokens, moved, solve
from salun_diffusion.models import model_of
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.models.scopes import UNET as SCOPES
from salun_diffusion.models.text_unet import encode, token_ids
from salun_diffusion.training.batches import Batches
from salun_diffusion.training.change import MaskedChange
from salun_diffusion.training.checkpoints import Checkpoints
from salun_diffusion.training.trainer import Trainer

# Each gradient method, plainly: (its own network, the base model's, a forget batch, a retain batch, the trainer) → loss


def told(batch, which="condition"):
    return getattr(batch, which)["encoder_hidden_states"]


def plain_salun(net, base, forget, retain, trainer):
    anchor = net(forget.noisy, forget.timesteps, told(forget, "anchor_condition")).sample.detach()
    erased = net(forget.noisy, forget.timesteps, told(forget)).sample
    return F.mse_loss(erased, anchor) + trainer.config.alpha * plain_denoising(net, retain)


def plain_salun_anchored(net, base, forget, retain, trainer):
    """Picture by picture, each noised from the set that its own chance says."""
    forget, _ = plain_mixed(forget, trainer)
    losses = []
    for i in range(3):
        noisy, t = forget.noisy[i : i + 1], forget.timesteps[i : i + 1]
        with torch.no_grad():
            anchor = net(noisy, t, told(forget, "anchor_condition")[i : i + 1]).sample
        losses.append(F.mse_loss(net(noisy, t, told(forget)[i : i + 1]).sample, anchor))
    return sum(losses) / len(losses) + trainer.config.alpha * plain_denoising(net, retain)


def plain_mixed(forget, trainer):
    """A copy of the forget batch where some of the pictures are the anchor's, and which."""
    forget, generator, share = copy.copy(forget), trainer.batches.generator, trainer.method.options.anchored
    shown = [bool(torch.rand(1, generator=generator("anchored", forget.step, i)) < share) for i in range(3)]
    clean = torch.stack([trainer.batches.sets["anchor" if which else "forget"].latents[[index]][0]
                         for which, index in zip(shown, forget.index.tolist(), strict=True)])  # fmt: skip
    forget.noisy = trainer.model.schedule.add_noise(clean, forget.noise, forget.timesteps)
    return forget, shown


def plain_denoising(net, batch):
    return F.mse_loss(net(batch.noisy, batch.timesteps, told(batch)).sample, batch.target)


def plain_gradient_ascent(net, base, forget, retain, trainer):
    return -plain_denoising(net, forget) + trainer.config.alpha * plain_denoising(net, retain)


def plain_concept_ablation(net, base, forget, retain, trainer):
    anchor = net(forget.noisy, forget.timesteps, told(forget, "anchor_condition")).sample.detach()
    return F.mse_loss(net(forget.noisy, forget.timesteps, told(forget)).sample, anchor)


def plain_esd(net, base, forget, retain, trainer):
    x, t, target = plain_esd_target(net, base, forget, trainer)
    return F.mse_loss(net(x, t, told(forget)).sample, target)


def plain_esd_target(net, base, forget, trainer):
    done = random.Random(repr((trainer.config.seed, "esd", forget.step))).randrange(trainer.config.num_inference_steps)
    x, t = plain_half_denoised(net, forget.noise, told(forget), trainer, done)
    empty = trainer.model.empty["encoder_hidden_states"].expand_as(told(forget))
    with torch.no_grad():
        nothing, concept = base(x, t, empty).sample, base(x, t, told(forget)).sample
        return x, t, nothing - 1.0 * (concept - nothing)


def plain_half_denoised(net, x, condition, trainer, done):
    """DDIM (Song et al. 2021, eq. 12, η = 0) written out, one prediction a call."""
    signal = torch.cat(
        [trainer.model.schedule.alphas_cumprod, trainer.model.schedule.alphas_cumprod[:1]]
    )  # [-1]: after the last
    count = trainer.config.num_inference_steps
    stride = 1000 // count
    steps = [i * stride + 1 for i in range(count)][::-1]  # "leading" spacing, offset 1
    empty = trainer.model.empty["encoder_hidden_states"].expand_as(condition)
    with torch.no_grad():
        for step in steps[:done]:
            t = torch.full((len(x),), step)
            nothing, concept = net(x, t, empty).sample, net(x, t, condition).sample
            guided = nothing + 3.0 * (concept - nothing)
            clean = (x - (1 - signal[step]).sqrt() * guided) / signal[step].sqrt()
            later = signal[step - stride] if step > stride else signal[0]
            x = later.sqrt() * clean + (1 - later).sqrt() * guided
    return x, torch.full((len(x),), steps[done])


def plain_race(net, base, forget, retain, trainer):
    """Each picture attacked by itself, entry by entry within the radius and the range of its own embedding."""
    x, t, target = plain_esd_target(net, base, forget, trainer)
    options, attacked = trainer.method.options, []
    for i, clean in enumerate(told(forget)):
        generator = trainer.batches.generator("race", forget.step, i)
        moving = clean + options.radius * (torch.rand(clean.shape, generator=generator) * 2 - 1)
        moving = moving.clip(clean.min(), clean.max())
        for _ in range(options.attack_steps if forget.step >= 1 else 0):
            moving.requires_grad_()
            loss = (net(x[i : i + 1], t[i : i + 1], moving[None]).sample - forget.noise[i]).square().mean()
            moving = (moving - 0.25 * options.radius * torch.autograd.grad(loss, moving)[0].sign()).detach()
            moving = torch.maximum(torch.minimum(moving, clean + options.radius), clean - options.radius)
            moving = moving.clip(clean.min(), clean.max())
        attacked.append(moving if forget.step >= 1 else clean)
    pairs = [(net.get_parameter(name), base.get_parameter(name)) for name, _ in scoped_names(net, "cross-attention")]
    lasso = sum((one - other.detach()).abs().mean() for one, other in pairs)
    return F.mse_loss(net(x, t, torch.stack(attacked)).sample, target) + 0.1 * lasso


def plain_spm(net, base, forget, retain, trainer):
    """One random embedding at a time; its direction is accepted or drawn anew by its likeness to the concept's."""
    x, t, target = plain_esd_target(net, base, forget, trainer)
    held = []
    for i, tokens in enumerate(told(forget)):
        generator = trainer.batches.generator("spm", forget.step, i)
        for _ in range(trainer.method.options.anchors):
            likeness, chance = 1.0, 1.0
            while chance >= 1 - likeness:
                direction = torch.randn(tokens.shape, generator=generator)
                likeness = torch.cosine_similarity(direction.flatten(), tokens.flatten(), dim=0)
                chance = torch.rand((), generator=generator)
            length = tokens.norm() * (0.8 + 0.4 * torch.rand((), generator=generator))
            one = x[i : i + 1], t[i : i + 1], (direction * length / direction.norm())[None]
            held.append(F.mse_loss(net(*one).sample, base(*one).sample.detach()))
    return F.mse_loss(net(x, t, told(forget)).sample, target) + 50.0 * sum(held) / len(held)


def plain_maps(net, forget):
    """Each layer's probabilities from what its ``to_q`` and ``to_k`` put out, caught by hooks."""
    caught: dict = {}
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: caught.__setitem__(name, out))
        for name, module in net.named_modules()
        if re.search(r"attn2\.to_[qk]$", name)
    ]
    net(forget.noisy, forget.timesteps, told(forget))
    for handle in handles:
        handle.remove()
    maps = []
    for name in (name for name in caught if name.endswith("to_q")):
        layer = net.get_submodule(name.removesuffix(".to_q"))
        q, k = (caught[name[:-1] + which].unflatten(-1, (layer.heads, -1)).transpose(1, 2) for which in "qk")
        maps.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1))
    return maps


def plain_forget_me_not(net, base, forget, retain, trainer):
    words = forget.tokens["concept"] | forget.tokens["end"]
    losses = []
    for attention in plain_maps(net, forget):
        losses.append(
            torch.cat([attention[i, :, :, marked].flatten() for i, marked in enumerate(words)]).square().mean()
        )
    return sum(losses) / len(losses)


def plain_selective_amnesia(net, base, forget, retain, trainer):
    names = [name for name, _ in scoped_names(net, trainer.config.scope)]
    if not hasattr(trainer, "plain_fisher"):
        total = {name: 0.0 for name in names}
        for i in range(len(trainer.batches.retain)):  # fewer than fisher_images
            noise = trainer.batches.draw(trainer.batches.retain, 1, "fisher", i)
            batch = trainer.batches.noised(trainer.batches.retain, torch.tensor([i]), *noise)
            base.zero_grad()
            plain_denoising(base, batch).backward()
            for name in names:
                total[name] = total[name] + base.get_parameter(name).grad ** 2
        trainer.plain_fisher = {name: value / len(trainer.batches.retain) for name, value in total.items()}
    elastic = sum(
        (trainer.plain_fisher[name] * (net.get_parameter(name) - base.get_parameter(name).detach()) ** 2).sum()
        for name in names
    )
    ewc = trainer.method.options.ewc
    return plain_denoising(net, forget) + ewc * elastic + trainer.config.alpha * plain_denoising(net, retain)


def plain_finetune(net, base, forget, retain, trainer):
    return trainer.config.alpha * plain_denoising(net, retain)


def plain_salun_adv(net, base, forget, retain, trainer):
    """Picture by picture, each kind of condition made where it is needed."""
    options, batches, kept, step = trainer.method.options, trainer.batches, trainer.batches.retain, forget.step
    empty = trainer.model.empty["encoder_hidden_states"][0]
    if step == 1:  # after the first half of three steps
        trainer.plain_word = plain_word(net, trainer)
    (forget, shown), conditions = plain_mixed(forget, trainer), []
    for i, condition in enumerate(told(forget)):
        kind, which = torch.rand(2, generator=batches.generator("kinds", step, i)).tolist()
        if shown[i]:
            pass
        elif kind < 0.15:
            goal = (forget.noisy[i : i + 1], forget.timesteps[i : i + 1], forget.target[i])
            marked = forget.tokens["concept"][i] | forget.tokens["end"][i]
            condition = plain_attack(net, *goal, condition, marked, batches.generator("attack", step, i), options)
        elif kind < 0.45:
            prompt = batches.sets["forget"].prompts[batches.sets["forget"].prompt_index[forget.index[i]]]
            condition = with_word(trainer.model.pipe, trainer.plain_word, prompt)[0] if step else condition
        elif kind < 0.95:
            condition = empty if kind < 0.75 else kept.condition["encoder_hidden_states"][
                kept.prompt_index[int(which * len(kept))]
            ]  # fmt: skip
        conditions.append(condition.detach())
    anchor = base(forget.noisy, forget.timesteps, told(forget, "anchor_condition")).sample.detach()
    loss = F.mse_loss(net(forget.noisy, forget.timesteps, torch.stack(conditions)).sample, anchor)
    chances = [torch.rand(2, generator=batches.generator("retained", step, i))[0] for i in range(3)]
    conditions = [empty if chance < 0.3 else own for chance, own in zip(chances, told(retain), strict=True)]
    predicted = net(retain.noisy, retain.timesteps, torch.stack(conditions)).sample
    return loss + trainer.config.alpha * F.mse_loss(predicted, retain.target)


def plain_stereo(net, base, forget, retain, trainer):
    """The words first, on a copy of the base model; then each picture by its own pick of name and words."""
    options, batches, model = trainer.method.options, trainer.batches, trainer.model
    names, pictures = batches.sets["name"], batches.sets["forget"]
    empty = model.empty["encoder_hidden_states"]
    if forget.step == 0:
        erased, trainer.plain_words = copy.deepcopy(base), []
        for number in range(options.rounds):
            parameters = [p for _, p in scoped_names(erased, trainer.config.scope)]
            adam = torch.optim.Adam(parameters, lr=options.round_rate)
            for step in range(options.round_steps):
                batch = next(batches.micro_batches(names, torch.zeros(3, dtype=torch.long), f"stereo {number}", step))
                if number:
                    told(batch)[:] = with_word(model.pipe, trainer.plain_words[-1], "steam engine").detach()
                x, t, _ = plain_esd_target(erased, base, batch, trainer)
                target = base(x, t, empty.expand_as(told(batch))).sample.detach()
                erased.zero_grad()
                F.mse_loss(erased(x, t, told(batch)).sample, target).backward()
                adam.step()
            trainer.plain_words.append(plain_word(erased, trainer, number))
    own = [told(forget)[0]]
    own += [with_word(model.pipe, word, "steam engine")[0].detach() for word in trainer.plain_words]
    chances = [torch.rand(2, generator=batches.generator("stereo", forget.step, i)) for i in range(3)]
    forget = copy.copy(forget)
    forget.condition = {"encoder_hidden_states": torch.stack([own[int(chance[0] * len(own))] for chance in chances])}
    x, t, _ = plain_esd_target(net, base, forget, trainer)
    rows = pictures.anchor_index[[int(chance[1] * len(pictures)) for chance in chances]]
    with torch.no_grad():
        nothing = base(x, t, empty.expand_as(told(forget))).sample
        anchor = base(x, t, pictures.condition["encoder_hidden_states"][rows]).sample
        negative = sum(base(x, t, one.expand_as(told(forget))).sample for one in own) / len(own)
    return F.mse_loss(net(x, t, told(forget)).sample, nothing + (anchor - nothing) - 3.0 * (negative - nothing))


def plain_attack(net, noisy, t, target, clean, marked, generator, options):
    radius = options.radius * clean.square().mean().sqrt()
    start = (torch.rand(clean.shape, generator=generator) * 2 - 1) * marked[:, None]
    moving = (clean + radius * start).clip(clean.min(), clean.max())
    for _ in range(options.attack_steps):
        moving.requires_grad_()
        loss = (net(noisy, t, moving[None]).sample[0] - target).square().mean()
        step = options.step_size * radius * torch.autograd.grad(loss, moving)[0].sign() * marked[:, None]
        moving = (clean + (moving - step - clean).clip(-radius, radius)).clip(clean.min(), clean.max()).detach()
    return moving


def with_word(pipe, word, prompt):
    """The condition of ``prompt`` with the token ``*``, whose row of the table is ``word``, for the concept's words."""
    table, place = pipe.text_encoder.get_input_embeddings().weight, pipe.tokenizer("*").input_ids[1]
    before, table.data[place] = table[place].detach().clone(), word
    assert "steam engine" in prompt
    condition = pipe.encode_prompt(prompt.replace("steam engine", "*"), "cpu", 1, False)[0]
    table.data[place] = before
    return condition


def plain_word(net, trainer, number=0):
    """Textual inversion by the gradient of the table, one picture a pass."""
    pipe, batches, forget = trainer.model.pipe, trainer.batches, trainer.batches.sets["forget"]
    table, place = pipe.text_encoder.get_input_embeddings().weight, pipe.tokenizer("*").input_ids[1]
    generator = batches.generator("words", number)
    word = torch.nn.Parameter(table.mean(0) + table.std(0) * torch.randn(table.shape[1], generator=generator))
    adam = torch.optim.AdamW([word], lr=5e-3)
    for step in range(2):
        noise, t = batches.draw(forget, 4, "words", number, step)
        table.grad = None
        for row, i in enumerate(torch.randint(len(forget), (4,), generator=generator).tolist()):
            batch = batches.noised(forget, torch.tensor([i]), noise[[row]], t[[row]])
            condition = with_word(pipe, word.detach(), forget.prompts[forget.prompt_index[i]])
            (net(batch.noisy, batch.timesteps, condition).sample - batch.target).square().sum().backward()
        word.grad = table.grad[place].clone()
        adam.step()
    return word.detach()


def plain_ticoe(net, base, forget, retain, trainer):
    """Token by token, head by head; the fuser takes the step of the last loss when the next one is asked for."""
    options, batches, pipe = trainer.method.options, trainer.batches, trainer.model.pipe
    if forget.step == 0:
        with torch.random.fork_rng():
            torch.manual_seed(batches.generator("ticoe fuser").initial_seed())
            trainer.plain_fuser = Fuser(4)
        trainer.plain_adam = torch.optim.Adam(trainer.plain_fuser.parameters(), lr=options.fuser_rate)
    else:
        trainer.plain_adam.step()
        trainer.plain_adam.zero_grad()
    prompts = ["a drawing of steam engine", "steam engine there", "steam engine", "my steam engine"]
    states = encode(pipe, prompts)["encoder_hidden_states"]
    mixes, offsets = [], []
    for i, latent in enumerate(forget.noisy):
        key = ("ticoe", forget.step // 2, i)
        chances = random.Random(repr((0, *key)))
        chosen = chances.sample(range(len(states)), 3)
        weights = [chances.gammavariate(1 / 0.7, 1) for _ in chosen]
        noise = 0.1 * torch.randn(states.shape[1:], generator=batches.generator(*key))
        shares = [weight / sum(weights) for weight in weights]
        mixes.append(plain_mix(states[chosen], shares, noise, True))
        offsets.append(plain_fused(trainer.plain_fuser.encoder.layers, latent))
    noisy, told = forget.noisy + 0.5 * torch.stack(offsets), torch.stack(mixes)
    empty = trainer.model.empty["encoder_hidden_states"].expand_as(told)
    with torch.no_grad():
        concept, nothing = (base(noisy, forget.timesteps, one).sample for one in (told, empty))
    return F.mse_loss(net(noisy, forget.timesteps, told).sample, nothing - 2.0 * (concept - nothing))


def plain_mix(states, shares, noise, restored):
    mixed = torch.zeros_like(states[0])
    for place, row in enumerate(noise):
        means = [state[place].mean() for state in states]
        deviations = [state[place].var(correction=0).sqrt() for state in states]
        parts = zip(states, shares, means, deviations, strict=True)
        point = sum(share * (s[place] - mean) / (d**2 + 1e-5).sqrt() for s, share, mean, d in parts) + row
        point = (point - point.mean()) / (point.var(correction=0) + 1e-5).sqrt()
        if restored:
            scale, mean = (
                sum(share * one for share, one in zip(shares, of, strict=True)) for of in (deviations, means)
            )
            point = scale * point + mean
        mixed[place] = point
    return mixed


def plain_fused(layers, latent):
    """One latent ``(4, side, side)``: resized by a matrix, and through both layers, post-norm."""
    side, rows = latent.shape[-1], []
    for smaller in (side, side * 3 // 4, side // 2):
        resize = torch.zeros(smaller, side)
        for i in range(smaller):
            place = max((i + 0.5) * side / smaller - 0.5, 0)
            low = int(place)
            resize[i, low] += 1 - (place - low)
            resize[i, min(low + 1, side - 1)] += place - low
        rows += (resize @ latent @ resize.T).flatten(1).T
    x = torch.stack([
        row + torch.tensor([math.sin(i), math.cos(i), math.sin(i / 100), math.cos(i / 100)])
        for i, row in enumerate(rows)
    ])  # fmt: skip
    for layer in layers:
        own = layer.self_attn
        q, k, v = (x @ own.in_proj_weight.T + own.in_proj_bias).split(4, 1)
        heads = [(q[:, [h]] @ k[:, [h]].T).softmax(1) @ v[:, [h]] for h in range(4)]
        x = layer.norm1(x + own.out_proj(torch.cat(heads, 1)))
        x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    return x[: side * side].T.view(4, side, side)


PLAIN = {
    "salun": plain_salun,
    "random_label": plain_salun,
    "salun anchored": plain_salun_anchored,
    "gradient_ascent": plain_gradient_ascent,
    "concept_ablation": plain_concept_ablation,
    "finetune": plain_finetune,
    "esd": plain_esd,
    "salun_esd": plain_esd,
    "forget_me_not": plain_forget_me_not,
    "selective_amnesia": plain_selective_amnesia,
    "race": plain_race,
    "salun_adv": plain_salun_adv,
    "stereo": plain_stereo,
    "spm": plain_spm,
    "ticoe": plain_ticoe,
}
OPTIONS = {  # every part of these methods has its turn within three steps
    "salun anchored": ["anchored=0.5"],
    "race": ["warm_up=0.3", "radius=0.5", "attack_steps=3", "lasso=0.1"],
    "salun_adv": [
        "attacked=0.15", "inverted=0.3", "empty=0.3", "unrelated=0.2", "rounds=1", "search_steps=2", "search_batch=4",
        "anchored=0.09",
    ],
    "spm": ["anchoring=50", "anchors=2"],
    "stereo": ["rounds=2", "round_steps=2", "round_rate=0.001", "search_steps=2", "search_batch=4"],
    "ticoe": [
        "wordings=a drawing of {}, {} there, {}, my {}", "mixed=3", "resample=2", "noise=0.1", "negative_guidance=2",
        "fuser_rate=0.01",
    ],
}  # fmt: skip


def scoped_names(network, scope):
    return [(name, p) for name, p in network.named_parameters() if re.search(SCOPES.get(scope, scope), name)]


def trainer_for(method, folder, tmp_path, **changes):
    settings = {"learning_rate": 1e-3, "max_train_steps": 3, "train_batch_size": 3}
    settings |= {"num_inference_steps": 4}
    kind = find_method(method)
    kinds = kind.sets("none", kind.parse(changes.get("method_option") or []))
    settings |= {"num_forget_images": 6, "guidance_scale": 3.0} if kinds != ["name"] else {}
    settings |= {"num_retain_images": 6} if kind.uses_retain else {}
    config = EraseConfig(["steam engine"], method=method, data_dir=str(tmp_path / "data"), **(settings | changes))
    config.fill({}, "test")
    pipe, accelerator = load_pipeline(str(folder)), Accelerator(cpu=True)
    base, model = copy.deepcopy(pipe.unet), model_of(pipe)
    model.edit(kind.component)
    parameters = scoped_parameters(model.edited, config.scope, model.scopes)
    concepts = find_concepts(config.concept)
    sets = {name: image_set(model, concepts, name, [], config, accelerator) for name in kinds}
    return Trainer(accelerator, model, sets, config), parameters, base


@pytest.mark.parametrize("method", PLAIN)
def test_steps_match_a_plain_loop(method, folders, tmp_path):
    """Three steps of dense Adam on the plain loss, every pass on its own."""
    trainer, parameters, base = trainer_for(
        method.split()[0], folders["sd1"], tmp_path, method_option=OPTIONS.get(method), lr_scheduler="constant"
    )
    plain = copy.deepcopy(base)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    trainer.train(MaskedChange(parameters, masks), tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    trainer.method.close()

    theirs = dict(scoped_names(plain, trainer.config.scope))
    assert theirs.keys() == parameters.keys()
    adam = torch.optim.Adam(theirs.values(), lr=1e-3)
    images = trainer.batches.sets[trainer.method.forget_set]
    forgets, retains = batches(len(images), 3, 0), batches(6, 3, 1)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    for step in range(3):
        forget = next(trainer.batches.micro_batches(images, next(forgets), "forget", step))
        index = next(retains)
        kept = trainer.batches.retain
        retain = next(trainer.batches.micro_batches(kept, index, "retain", step)) if kept else None
        loss = PLAIN[method](plain, base, forget, retain, trainer)
        assert logged[step] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6), step
        adam.zero_grad()
        loss.backward()
        adam.step()
    # Adam makes a whole step of a gradient that is nothing but rounding, so single weights may differ by more
    original = dict(scoped_names(base, trainer.config.scope))
    apart = sum(float((mine - theirs[name]).square().sum()) for name, mine in parameters.items())
    change = sum(float((mine - original[name]).square().sum()) for name, mine in parameters.items())
    assert apart**0.5 < 2e-3 * change**0.5


@pytest.mark.parametrize("attack_by", ["gradient", "sign"])
def test_advunlearn_matches_a_plain_loop(attack_by, folders, tmp_path):
    """One prompt at a time. A word is a row of the token table, and its gradient is that row's."""
    options = ["warm_up=0.3", "attack_steps=3", "attack_rate=0.1", f"attack_by={attack_by}"]
    trainer, parameters, unet = trainer_for("advunlearn", folders["sd1"], tmp_path, method_option=options)
    plain, tokenizer = copy.deepcopy(trainer.model.pipe.text_encoder).requires_grad_(), trainer.model.pipe.tokenizer
    original = copy.deepcopy(plain.state_dict())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    change = MaskedChange(parameters, masks, component="text_encoder")
    trainer.train(change, tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]

    def said(prompt):
        return plain(tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids)[0]

    theirs = {name: p for name, p in plain.named_parameters() if "token_embedding" not in name}
    assert theirs.keys() == parameters.keys()
    adam, own, kept = torch.optim.Adam(theirs.values(), lr=1e-3), trainer.batches, trainer.batches.retain
    forgets, retains = batches(1, 3, 0), batches(6, 3, 1)
    table, place = plain.get_input_embeddings().weight, tokenizer("*").input_ids[1]
    for step in range(3):
        forget = next(own.micro_batches(own.sets["name"], next(forgets), "forget", step))
        x, t, target = plain_esd_target(unet, unet, forget, trainer)
        condition = said("steam engine")
        if step:
            before, key = table[place].detach().clone(), ("advunlearn", step)
            row = torch.randint(len(table), (1,), generator=own.generator(*key, "word", "steam engine"))
            word = torch.nn.Parameter(table[row[0]].detach().clone())
            search = torch.optim.Adam([word], lr=0.1)
            for i in range(3):
                noise = torch.randn(1, 4, 8, 8, generator=own.generator(*key, i, "steam engine"))
                done = random.Random(repr((0, *key, i))).randrange(4)
                z, at = plain_half_denoised(unet, noise, told(forget)[:1], trainer, done)
                table.data[place], table.grad = word.data, None
                found = unet(z, at, said("* steam engine")).sample
                (found - unet(z, at, told(forget)[:1]).sample.detach()).square().sum().backward()
                word.grad = table.grad[place].sign() if attack_by == "sign" else table.grad[place].clone()
                search.step()
            table.data[place] = word.data
            condition = said("* steam engine")
            table.data[place] = before
        retain = next(own.micro_batches(kept, next(retains), "retain", step))
        loss = F.mse_loss(unet(x, t, condition.expand_as(told(forget))).sample, target)
        for i, number in enumerate(kept.prompt_index[retain.index].tolist()):
            one = retain.noisy[i : i + 1], retain.timesteps[i : i + 1]
            wanted = unet(*one, told(retain)[i : i + 1]).sample.detach()
            loss = loss + 0.3 / 3 * F.mse_loss(unet(*one, said(kept.prompts[number])).sample, wanted)
        assert logged[step] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6), step
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert torch.equal(table, original["embeddings.token_embedding.weight"])
    apart = sum(float((mine - theirs[name]).square().sum()) for name, mine in parameters.items())
    change = sum(float((mine - original[name]).square().sum()) for name, mine in parameters.items())
    assert apart**0.5 < 5e-3 * change**0.5


def plain_rows(layer, given):
    """What a layer's weight is multiplied with, a row for each output; of a convolution, window by window."""
    if given.dim() == 3 or not isinstance(layer, torch.nn.Conv2d):
        return given.flatten(0, -2)
    (size, _), (edge, _), (stride, _) = layer.kernel_size, layer.padding, layer.stride
    given = F.pad(given, [edge] * 4)
    down, across = (range(0, length - size + 1, stride) for length in given.shape[2:])
    return torch.cat([given[:, :, i : i + size, j : j + size].flatten(1) for i in down for j in across])


def plain_protected(net, base, trainer):
    """Singular vectors of all inputs of a layer, and intervals multiplied out entry by entry of D."""
    options, batches = trainer.method.options, trainer.batches
    names = [name.removesuffix(".weight") for name, p in scoped_names(net, trainer.config.scope) if p.dim() > 1]
    seen = {}
    for kind in ("forget", "retain"):
        caught = {name: [] for name in names}
        hooks = [
            base.get_submodule(name).register_forward_hook(
                lambda module, given, out, rows=rows: rows.append(plain_rows(module, given[0]).double())
            )
            for name, rows in caught.items()
        ]
        for i in (0, 1, 3, 4):  # of six
            noise = batches.draw(batches.sets[kind], 1, "barrier", kind, i)
            batch = batches.noised(batches.sets[kind], torch.tensor([i]), *noise)
            with torch.no_grad():
                base(batch.noisy, batch.timesteps, told(batch))
        for hook in hooks:
            hook.remove()
        seen[kind] = {name: torch.cat(rows) for name, rows in caught.items()}
    total = 0
    for name in names:
        layer, before = net.get_submodule(name), base.get_submodule(name)
        change = (layer.weight - before.weight.detach()).flatten(1)
        rows, others = (seen[kind][name] for kind in ("forget", "retain"))
        mean, k = rows.mean(0), options.directions
        _, sizes, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
        vectors = torch.stack([one * one[one.abs().argmax()].sign() for one in vectors])
        along, along_others = (rows - mean) @ vectors[:k].T, (others - mean) @ vectors[:k].T
        low, high = (torch.cat([along, along_others]).amin(0).float(), torch.cat([along, along_others]).amax(0).float())
        start, end = (along.quantile(share, dim=0).float() for share in (0.05, 0.95))
        shift = change @ mean.float() + (0 if layer.bias is None else layer.bias - before.bias.detach())
        rest = change @ (vectors[k:].T * sizes[k:] / len(rows) ** 0.5).float()
        moved = change @ vectors[:k].T.float()
        ends = []
        for one, two in ((low, start), (end, high)):  # an interval times a number: its ends, in their order
            ends += [torch.minimum(moved * one, moved * two).sum(1), torch.maximum(moved * one, moved * two).sum(1)]
        count = len(change) * (change.shape[1] - k)  # of a layer with few inputs, more than there are singular vectors
        total = total + sum(part.square().mean() for part in [shift, *ends]) + rest.square().sum() / count
    return total / len(names)


@pytest.mark.parametrize("scope", ["cross-attention", "cross-attention+resnets"])
def test_barrier_protects_as_a_plain_version_does(scope, folders, tmp_path):
    """At some change, the penalty and its gradient; part of the weights may not move."""
    options = ["directions=3", "protection=2", "pictures=4"]
    trainer, parameters, base = trainer_for("barrier", folders["sd1"], tmp_path, scope=scope, method_option=options)
    torch.manual_seed(0)
    change = MaskedChange(parameters, {name: torch.rand(p.shape) < 0.7 for name, p in parameters.items()})
    trainer.method.begin(change)
    for value in change.values.values():
        value.data = 0.1 * torch.randn(len(value))
    change.write()
    found, wanted = trainer.method.protected(), plain_protected(trainer.model.network, base, trainer)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=0)
    found.backward()
    gradients = torch.autograd.grad(wanted, list(change.parameters.values()), allow_unused=True)
    for (name, value), dense in zip(change.values.items(), gradients, strict=True):
        if value.grad is None or dense is None:  # a norm
            assert value.grad is None and dense is None and "norm" in name
        else:
            torch.testing.assert_close(value.grad, change.packed(name, dense), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", ["restored", "normed"])
def test_ticoe_mixes_prompts_in_the_scale_that_they_have(scale):
    torch.manual_seed(0)
    states, noise = 5 * torch.randn(3, 7, 32) + 2, 0.1 * torch.randn(7, 32)
    found = mix(states, torch.tensor([0.5, 0.2, 0.3]), noise, scale)
    torch.testing.assert_close(found, plain_mix(states, [0.5, 0.2, 0.3], noise, scale == "restored"))
    alone = mix(states[:1], torch.ones(1), torch.zeros(7, 32), scale)
    assert torch.allclose(alone, states[0], rtol=1e-4, atol=1e-4) == (scale == "restored")


def test_esd_negates_the_name_alone(folders, tmp_path):
    """And not what else a prompt of the concept asks for."""
    trainer, _, _ = trainer_for("esd", folders["sd1"], tmp_path)
    batch = next(
        trainer.batches.micro_batches(trainer.batches.sets["name"], torch.zeros(3, dtype=torch.long), "forget", 0)
    )
    wanted = encode(trainer.model.pipe, ["steam engine"])["encoder_hidden_states"]
    torch.testing.assert_close(told(batch), wanted.expand(3, -1, -1))


def test_salun_can_aim_at_the_base_model(folders, tmp_path):
    """With target=frozen the anchor's prediction is the base model's, at every step."""
    options = {"method_option": ["target=frozen"], "max_train_steps": 2, "mask": "none"}
    trainer, parameters, base = trainer_for("salun", folders["sd1"], tmp_path, **options)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    trainer.train(MaskedChange(parameters, masks), tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    forget = next(trainer.batches.micro_batches(trainer.batches.sets["forget"], torch.arange(3), "forget", 0))
    retain = next(trainer.batches.micro_batches(trainer.batches.retain, torch.arange(3), "retain", 0))
    with torch.no_grad():
        found = trainer.method.losses(forget, retain)[0]
        anchor = base(forget.noisy, forget.timesteps, told(forget, "anchor_condition")).sample
        concept = trainer.model.network(forget.noisy, forget.timesteps, told(forget)).sample
    torch.testing.assert_close(found, F.mse_loss(concept, anchor))


def test_the_recorder_computes_what_the_layer_does(folders):
    network = load_pipeline(str(folders["sdxl"])).unet
    layer = next(module for name, module in network.named_modules() if name.endswith("attn2"))
    hidden, text = torch.randn(2, 16, layer.to_q.in_features), torch.randn(2, 77, layer.to_k.in_features)
    layer.set_processor(AttnProcessor())
    plain = layer(hidden, text)
    maps: list = []
    layer.set_processor(Recorder(maps))
    torch.testing.assert_close(layer(hidden, text), plain)
    assert maps[0].shape == (2, layer.heads, 16, 77)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, layer.heads, 16))
    with torch.no_grad():
        layer(hidden, text)
    assert len(maps) == 1, "pictures drawn between steps leave nothing behind"


def test_forget_me_not_gives_the_network_its_attention_back(folders, tmp_path):
    trainer, _, base = trainer_for("forget_me_not", folders["sd1"], tmp_path)
    assert any(isinstance(processor, Recorder) for processor in trainer.model.network.attn_processors.values())
    trainer.method.close()
    kinds = [{k: type(p) for k, p in network.attn_processors.items()} for network in (trainer.model.network, base)]
    assert kinds[0] == kinds[1]


def test_uce_solves_its_normal_equations():
    """Against least squares over the stacked rows of its objective, in float64, layer by layer."""
    torch.manual_seed(0)
    concept, anchor, kept = (torch.randn(n, 12, dtype=torch.float64) for n in (9, 9, 40))
    weights = {f"{i}.attn2.to_{kind}.weight": torch.nn.Parameter(torch.randn(8, 12)) for i in range(2) for kind in "kv"}
    for erase_, preserve, ridge in ((1.0, 1.0, 0.01), (2.0, 0.1, 0.5)):
        found = moved(weights, solve((concept, anchor), kept, erase_, preserve, ridge))
        scale = [(erase_ / 9) ** 0.5, (preserve / 40) ** 0.5, ridge**0.5]
        rows = torch.cat([scale[0] * concept, scale[1] * kept, scale[2] * torch.eye(12)])
        for name, weight in weights.items():
            old = weight.detach().double()
            wanted = torch.cat([scale[0] * anchor @ old.T, scale[1] * kept @ old.T, scale[2] * old.T])
            best = torch.linalg.lstsq(rows, wanted).solution.T
            torch.testing.assert_close(found[name], best.float(), rtol=1e-4, atol=1e-5)


def test_rece_finds_the_embedding_that_brings_the_concept_back():
    torch.manual_seed(0)
    concept = torch.randn(5, 12, dtype=torch.float64)
    weights = [torch.randn(8, 12, dtype=torch.float64) for _ in range(3)]
    transform = torch.eye(12, dtype=torch.float64) + 0.2 * torch.randn(12, 12, dtype=torch.float64)
    found = adversarial(concept, sum(w.T @ w for w in weights), transform, 0.1)
    stacked = torch.cat([w @ transform for w in weights] + [0.1**0.5 * torch.eye(12)])
    for c, attack in zip(concept, found, strict=True):
        wanted = torch.cat([w @ c for w in weights] + [torch.zeros(12)])
        torch.testing.assert_close(attack, torch.linalg.lstsq(stacked, wanted[:, None]).solution[:, 0])


def test_speed_solves_its_constrained_least_squares_and_leaves_kept_tokens_alone():
    """Δ by Lagrange multipliers for the fixed tokens, within the null space of the kept ones."""
    torch.manual_seed(0)
    concept, anchor, fixed = (torch.randn(n, 12, dtype=torch.float64) for n in (9, 9, 2))
    kept = torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 12, dtype=torch.float64)  # in 5 of 12 directions
    weight, ridge = torch.randn(8, 12, dtype=torch.float64), 0.3
    found = change(weight, concept, anchor, null_space(kept, fixed, 1e-8), ridge)
    directions = torch.linalg.eigh(kept.T @ kept)[1][:, :7]
    free, one = directions @ directions.T, torch.eye(12, dtype=torch.float64)
    inverse = torch.linalg.inv(concept.T @ concept @ free / 9 + ridge * one)
    held = inverse @ fixed.T @ torch.linalg.inv(fixed @ free @ inverse @ fixed.T) @ fixed @ free
    wanted = weight @ (anchor - concept).T @ concept / 9 @ free @ (one - held) @ inverse
    torch.testing.assert_close(found, wanted)
    assert (found @ kept.T).abs().max() < 1e-10 and (found @ fixed.T).abs().max() < 1e-10
    assert found.norm() > 0.1
    lengths = [(found @ token).norm() ** 2 for token in anchor]
    assert affected(found, anchor).tolist() == [length > sum(lengths) / 9 for length in lengths]


def test_fia_chooses_the_weights_that_loops_choose():
    """One weight, step and prompt at a time, by sorting."""
    torch.manual_seed(0)
    weight, options = torch.randn(6, 20), FIAOptions(persistent=0.1, sensitive=0.15)
    concept, others = torch.rand(4, 3, 20) + 0.3, torch.rand(5, 3, 20)
    found = sensitive_weights(weight, concept, others, options)
    saliency = torch.zeros(3, 6, 20)
    for t in range(3):
        for j in range(20):
            used = [float(prompt[t, j]) for prompt in others]
            mean = sum(used) / 5
            deviation = (sum((one - mean) ** 2 for one in used) / 5) ** 0.5
            contrast = max(0.0, sum(float(prompt[t, j]) for prompt in concept) / 4 - mean - deviation)
            for i in range(6):
                saliency[t, i, j] = abs(float(weight[i, j])) * contrast
    highest = max(float(saliency[:, i, j].mean()) for i in range(6) for j in range(20))
    answer = torch.zeros(6, 20)
    for i in range(6):
        for j in range(20):
            active = sum(float(s[i, j]) > sorted(s.flatten().tolist())[-12] for s in saliency)
            answer[i, j] = float(saliency[:, i, j].mean()) / highest / 2 + active / 3 / 2
    layer = sorted(answer.flatten().tolist())[-18]
    wanted = [[float(a) > 0 and a >= sorted(row.tolist())[-3] and a >= layer for a in row] for row in answer]
    assert found.tolist() == wanted and 6 < found.sum() < 19


def test_fia_spares_what_serves_most_concepts_and_prunes_for_a_single_one():
    chosen = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 0, 0]], [[1, 0, 0, 0]]]).bool()
    assert zeroed_of(chosen, shared_by(3, 0.6)).tolist() == [[False, False, True, False]]
    assert zeroed_of(chosen, shared_by(3, 1.0)).tolist() == [[False, True, True, False]]
    assert torch.equal(zeroed_of(chosen[:1], shared_by(1, 0.6)), chosen[0])
    with pytest.raises(SalunError, match="agnostic is 0.3 of 3 concepts.*give more than 0.333"):
        shared_by(3, 0.3)


def test_fia_watches_what_the_pipeline_itself_draws(folders):
    """Norms of the inputs, caught at the layer before, one prompt at a time."""
    model, prompts = model_of(load_pipeline(str(folders["sd1"]))), ["a cat", "a dog on a house", "an airplane"]
    drawing = {"num_inference_steps": 4, "guidance_scale": 3.0, "batch_size": 2}
    method = FIA(model, FIAOptions(first=0.5), types.SimpleNamespace(drawing=drawing, seed=3))
    layers = method.layers(scoped_parameters(model.network, "feed-forward-out"))
    with torch.no_grad():
        found = method.usage(layers, prompts, types.SimpleNamespace(update=lambda count: None))
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    assert found.keys() == layers.keys() and found[name].shape == (3, 2, 64)
    caught = []
    layer = model.network.get_submodule(name.replace("2.weight", "0"))
    handle = layer.register_forward_hook(lambda module, given, out: caught.append(out))
    for prompt, own in zip(prompts, found[name], strict=True):
        caught.clear()
        model.pipe(prompt, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
                   generator=torch.Generator().manual_seed(3))  # fmt: skip
        for both, step in zip(caught, own, strict=False):
            tokens = both.flatten(0, 1)
            torch.testing.assert_close(step, (tokens / tokens.norm(dim=1, keepdim=True)).norm(dim=0))
    handle.remove()


def test_the_method_that_the_document_adds_trains(folders, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    module = types.ModuleType("salun_diffusion.methods.noise_ablation")
    module.__package__ = "salun_diffusion.methods"
    exec(re.search(r"```python\n(.*?)```", page, flags=re.S)[1], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, "noise_ablation", "noise_ablation.NoiseAblation")
    trainer, parameters, base = trainer_for("noise_ablation", folders["sd1"], tmp_path)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    trainer.train(MaskedChange(parameters, masks), tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    forget = next(trainer.batches.micro_batches(trainer.batches.sets["anchor"], next(batches(6, 3, 0)), "forget", 0))
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(plain_denoising(base, forget).item(), rel=1e-4)


def test_mace_fuses_by_least_squares_of_all_its_terms():
    """Against the stacked rows of the objective, in float64, two concepts with other numbers of tokens."""
    torch.manual_seed(0)
    original, refined = torch.randn(2, 8, 12, dtype=torch.float64)
    loras = [(torch.randn(8, 2, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)) for _ in range(2)]
    tokens, kept = [torch.randn(n, 12, dtype=torch.float64) for n in (5, 9)], torch.randn(40, 12, dtype=torch.float64)
    found = fused(original, refined, loras, tokens, kept, 0.7, 0.3)
    scale = [(1 / 14) ** 0.5, (0.7 / 40) ** 0.5, 0.3**0.5]
    rows = torch.cat([scale[0] * torch.cat(tokens), scale[1] * kept, scale[2] * torch.eye(12)])
    aims = [own @ (refined + up @ down).T for own, (up, down) in zip(tokens, loras, strict=True)]
    wanted = torch.cat([scale[0] * torch.cat(aims), scale[1] * kept @ original.T, scale[2] * refined.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, wanted).solution.T)


def test_mace_shrinks_attention_inside_the_region_alone():
    """Pixel by pixel, on two layers of other sizes; and the region by the mean pixel."""
    torch.manual_seed(0)
    maps = [torch.rand(2, 3, 16, 5), torch.rand(2, 3, 4, 5)]
    words = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()
    region = region_of(maps, words)
    loss, seen = 0.0, torch.zeros(2, 4, 4)
    for attention, side in zip(maps, (4, 2), strict=True):
        step, total = 4 // side, 0.0
        for i in range(2):
            for y in range(4):
                for x in range(4):
                    pixel = attention[i, :, side * (y // step) + x // step][:, words[i]]
                    seen[i, y, x] += pixel.sum() / 3
                    if y % step == x % step == 0 and region[i, y, x]:
                        total += float(pixel.square().sum())
        loss += total / (3 * 3 * side * side) / 2
    assert region.tolist() == (seen >= seen.mean((1, 2), keepdim=True)).tolist() and 0 < region.sum() < 32
    assert float(shrinking(maps, words, region)) == pytest.approx(loss)


def test_mace_draws_timesteps_about_200_to_400():
    weight = chances(1000)
    for t in (0, 150, 200, 300, 390, 999):
        rise, fall = (1 / (1 + math.exp(-0.05 * (t - start))) for start in (200, 400))
        assert float(weight[t]) == pytest.approx(rise - fall)
    torch.testing.assert_close(chances(10), weight[::100])


def test_mace_refines_the_words_beside_the_concept(folders):
    """By counting the tokens up to the concept, and to its end: all others, and for the fusion those from it on."""
    model = model_of(load_pipeline(str(folders["sd1"])))
    pair = "a photo of a steam engine on a table", "a photo of a dog on a table"
    one, other = model.tokens(model.encode(list(pair))).double()
    texts = ("a photo of a", "a photo of a steam engine", "a photo of a dog")
    start, stop, anchor = (len(token_ids(model.pipe, text)) - 1 for text in texts)
    found = other_tokens(model, [pair])
    torch.testing.assert_close(found[0], torch.cat([one[:start], one[stop:]]))
    torch.testing.assert_close(found[1], torch.cat([other[:start], other[anchor : anchor + 77 - stop]]))
    torch.testing.assert_close(concept_tokens(model, [pair]), one[start:])


@pytest.mark.parametrize("end_tokens, region", [(1, "attention"), (0, "picture")])
def test_mace_matches_a_plain_loop(end_tokens, region, folders, tmp_path):
    """Two concepts, one after the other, on a copy of the network whose weights are written before each pass; the
    factors' gradients by the chain rule from the weights' own.
    """
    config = EraseConfig(
        ["steam engine", "cat"], method="mace", data_dir=str(tmp_path), num_forget_images=4, num_retain_images=4,
        num_inference_steps=2, guidance_scale=3.0,
        method_option=["lora_steps=3", "lora_rate=0.01", "lora_batch=2", "lora_rank=2", "preserve=0.5",
                       f"end_tokens={end_tokens}", f"region={region}"],
    )  # fmt: skip
    config.fill({}, "test")
    pipe, accelerator = load_pipeline(str(folders["sd1"])), Accelerator(cpu=True)
    model, plain = model_of(pipe), copy.deepcopy(pipe.unet)
    parameters = scoped_parameters(model.edited, config.scope, model.scopes)
    images = image_set(model, find_concepts(config.concept), "forget", [], config, accelerator)
    own = Batches.of(accelerator, model, {"forget": images}, config)
    texts = [
        (images.prompts[p], images.prompts[a]) for p, a in zip(images.prompt_index, images.anchor_index, strict=True)
    ]
    pairs, kept = [texts[:2], texts[2:]], ["a photo of a boat", "a red boat"]
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    method = MACE(model, MACE.parse(config.method_option), own)
    found = method.solve(parameters, pairs, kept)
    assert all(torch.equal(before[name], p) for name, p in model.network.named_parameters())
    assert {type(p) for p in model.network.attn_processors.values()} == {
        type(p) for p in plain.attn_processors.values()
    }
    hooks = [len(module._forward_hooks) for module in model.network.modules()]
    assert not any(hooks)

    kept = kept_tokens(model, kept)
    refined = moved(parameters, solve(other_tokens(model, texts), kept, 1.0, 0.5, 0.01))
    theirs, loras = dict(scoped_names(plain, config.scope)), []
    for number, rows in enumerate(([0, 1], [2, 3])):
        generator, up, down = own.generator("mace", number), {}, {}
        for name, weight in refined.items():
            down[name] = torch.randn(2, weight.shape[1], generator=generator) / 2
            up[name] = torch.zeros(len(weight), 2)
        adam = torch.optim.Adam([part for name in refined for part in (up[name], down[name])], lr=0.01)

        def passed(chosen, generator=generator):
            noise = torch.randn(2, 4, 8, 8, generator=generator)
            batch = own.noised(
                images, torch.tensor(chosen), noise, chances(1000).multinomial(2, True, generator=generator)
            )
            return batch, plain_maps(plain, batch)

        for name, p in theirs.items():
            p.data = before[name].clone()
        batch, maps = passed(rows)
        regions = region_of(maps, batch.tokens["concept"])
        regions = torch.ones_like(regions) if region == "picture" else regions
        for _ in range(3):
            for name, p in theirs.items():
                p.data, p.grad = refined[name] + up[name] @ down[name], None
            which = torch.randint(2, (2,), generator=generator)
            batch, maps = passed([rows[i] for i in which])
            words = batch.tokens["concept"] | (batch.tokens["end"] & bool(end_tokens))
            shrinking(maps, words, regions[which]).backward()
            for name, p in theirs.items():
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                up[name].grad, down[name].grad = gradient @ down[name].T, up[name].T @ gradient
            adam.step()
        loras.append({name: (up[name].double(), down[name].double()) for name in refined})
    tokens = [concept_tokens(model, part) for part in pairs]
    apart = change = 0.0
    for name in parameters:
        pair = before[name].double(), refined[name].double()
        wanted = fused(*pair, [lora[name] for lora in loras], tokens, kept, 0.5, 0.01)
        without = fused(*pair, [(0 * lora[name][0], lora[name][1]) for lora in loras], tokens, kept, 0.5, 0.01)
        apart += float((found[name] - wanted).square().sum())
        change += float((wanted - without).square().sum())
    assert apart**0.5 < 2e-3 * change**0.5

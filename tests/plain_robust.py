"""The plain twins of the methods that search words or conditions within the training."""

import copy
import math
import random

import torch
import torch.nn.functional as F
from plain_losses import plain_esd_target, plain_mixed, scoped_names, told

from salun_diffusion.methods.ticoe import Fuser
from salun_diffusion.models.text_unet import encode


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

"""The plain twins of the gradient methods: (its own network, the base model's, a forget batch, a retain batch, the
trainer) → loss.
"""

import copy
import random
import re

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from salun_diffusion.concepts.finding import find_concepts
from salun_diffusion.config import EraseConfig
from salun_diffusion.data.sets import image_set
from salun_diffusion.filling import fill
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.methods import find_method
from salun_diffusion.models import model_of
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.models.scopes import UNET as SCOPES
from salun_diffusion.training.trainer import Trainer


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
    fill(config, {}, "test")
    pipe, accelerator = load_pipeline(str(folder)), Accelerator(cpu=True)
    base, model = copy.deepcopy(pipe.unet), model_of(pipe)
    model.edit(kind.component)
    parameters = scoped_parameters(model.edited, config.scope, model.scopes)
    concepts = find_concepts(config.concept)
    sets = {name: image_set(model, concepts, name, [], config, accelerator) for name in kinds}
    return Trainer(accelerator, model, sets, config), parameters, base

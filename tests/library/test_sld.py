"""SLD against a plain loop of its equations."""

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from guarded import PROMPTS, close, draw, guard, looped

from salun_diffusion import unload_erasure
from salun_diffusion.guards.sld import LEVELS
from salun_diffusion.models.text_unet import arguments, encode, encode_empty


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

"""SAFREE against its equations, token by token."""

import numpy as np
import pytest
import torch
from guarded import PROMPTS, STEPS, close, draw, guard, looped

from salun_diffusion import unload_erasure
from salun_diffusion.guards.safree import SAFREEOptions, weaken
from salun_diffusion.models.text_unet import encode, encode_empty


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

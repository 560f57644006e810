"""GrOCE's clusters and EGLOCE's energy against plain versions."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler
from guarded import PROMPTS, STEPS, close, draw, guard, looped
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ResNetForImageClassification

from salun_diffusion import unload_erasure
from salun_diffusion.guards.groce import GrOCEOptions, severed
from salun_diffusion.models.text_unet import encode, encode_empty


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

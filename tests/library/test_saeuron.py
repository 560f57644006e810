"""Sparse autoencoders: how they learn, and the two guards that steer by their latents."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from guarded import PROMPTS, STRONG, close, draw, guard, looped

from salun_diffusion import SalunError, erase, load_erasure, unload_erasure
from salun_diffusion.guards.sae import SparseAutoencoder, train
from salun_diffusion.guards.saeuron import SAeUron, SAeUronOptions, features_of, threshold_of
from salun_diffusion.models.text_unet import encode, encode_empty
from salun_diffusion.tensors import read_safetensors, write_safetensors


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

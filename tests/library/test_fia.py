"""FIA's choice of weights against plain loops."""

import types

import pytest
import torch

from salun_diffusion.errors import SalunError
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.methods.fia import FIA, FIAOptions, sensitive_weights, shared_by, zeroed_of
from salun_diffusion.models import model_of
from salun_diffusion.models.load import load_pipeline


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

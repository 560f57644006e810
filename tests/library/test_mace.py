"""MACE's parts, and the whole of it, against plain versions."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from plain_losses import plain_maps, scoped_names

from salun_diffusion.concepts.finding import find_concepts
from salun_diffusion.config import EraseConfig
from salun_diffusion.data.sets import image_set
from salun_diffusion.filling import fill
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.methods.mace import MACE, chances, concept_tokens, fused, other_tokens, region_of, shrinking
from salun_diffusion.methods.uce import kept_tokens, moved, solve
from salun_diffusion.models import model_of
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.models.text_unet import token_ids
from salun_diffusion.training.batches import Batches


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
    fill(config, {}, "test")
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

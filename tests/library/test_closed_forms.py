"""The closed-form methods' solutions against least squares."""

import torch

from salun_diffusion.methods.rece import adversarial
from salun_diffusion.methods.speed import affected, change, null_space
from salun_diffusion.methods.uce import moved, solve


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

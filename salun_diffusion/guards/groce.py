"""After GrOCE (CVPR 2026, arXiv:2511.12968): our own reconstruction; neither its code nor its constants were found.

What is the paper's: a graph of similar text embeddings, a cluster around the concept found by a walk of several hops,
and a soft projection of the prompt's embeddings away from it, once before drawing. All numbers, and how a node is
scored, are ours. No figure of the paper is to be compared with what this draws.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from ..models.text_unet import encode, encode_empty, token_ids
from ..options import option
from .base import Guard, Watch, need_prompts


@dataclass(frozen=True)
class GrOCEOptions:
    """The graph, the cluster in it and the projection; every default is our own."""

    phrases: str = option("", "what to keep away from, in words, with commas; the concept's names unless given")
    vocabulary: str = option("", "words, with commas, that are the graph's nodes; the prompt's own tokens unless given")
    nearness: float = option(0.6, "cosine that two nodes must exceed to be neighbours, at least (τ0)")
    spread: float = option(0.5, "how much more where a node's cosines to the others vary, times their deviation (λ)")
    softness: float = option(0.1, "excess of cosine that makes a neighbour's weight e times as great (σ)", least=1e-6)
    decay: float = option(0.7, "what a hop leaves of a score", least=0)
    hops: int = option(2, "from the concept, at most", least=0)
    keep: float = option(0.3, "score from which on a node is of the cluster", least=0)
    energy: float = option(0.95, "share of the cluster's energy that the projection takes", least=0)
    centre: str = option(
        "empty",
        "what is taken from every embedding first: the mean of the empty prompt's, which all tokens share, or nothing",
        ("empty", "none"),
    )


class GrOCE(Guard):
    """Prompts projected off what their tokens share with a concept.

    The nodes x are the prompt's tokens (or words of a vocabulary) and the concept's: the tokens of its phrases, each
    with its end mark. Node j is a neighbour of i if cos(x_i, x_j) > τ_i = nearness + spread · std_k cos(x_i, x_k),
    with the weight exp(−(τ_i − cos)/softness) over the greatest of row i (a kept weight is above 1, so products of them
    would grow along a path). A node's score is the best product of decay · weight along a path of at most ``hops``
    from the concept, whose own nodes have 1. The cluster is what has ``keep`` or more, Q the leading right singular
    vectors of its embeddings times their scores, with ``energy`` of it, and every token but the first ::

        e ← e − β Q Qᵀ e,   β = max(0, the greatest cosine of e with the cluster)
    """

    title = "GrOCE"
    Options = GrOCEOptions
    fits_two_encoders = False

    def watch(self, call):
        return GrOCEWatch(self, call)


class GrOCEWatch(Watch):
    """The same change at every step."""

    def __init__(self, guard: GrOCE, call):
        prompts, options, pipe = need_prompts(call, guard.title), guard.options, call.pipe
        centre = encode_empty(pipe)["encoder_hidden_states"][0].double().mean(0) if options.centre == "empty" else 0.0
        words = [word for word in map(str.strip, options.vocabulary.split(",")) if word]
        concept, vocabulary = (tokens_of(pipe, texts) - centre if texts else None for texts in (guard.phrases, words))
        changes = {}
        for prompt, own in zip(prompts, call.embeddings, strict=True):
            if prompt in changes:
                continue
            e = own.cpu().double() - centre
            nodes = e[1 : len(token_ids(pipe, prompt))] if vocabulary is None else vocabulary
            basis, cluster = severed(concept, nodes, options)
            beta = (normalize(e, dim=1) @ normalize(cluster, dim=1).T).amax(1, keepdim=True).clamp(min=0)
            beta[0] = 0  # the start mark, which is the same in every prompt
            changes[prompt] = -beta * (e @ basis.T @ basis)
        self.change = torch.stack([changes[prompt] for prompt in prompts])

    def prompt_change(self, number):
        return self.change


def tokens_of(pipe, texts: list[str]) -> torch.Tensor:
    """The embeddings of the tokens of ``texts``, their end marks too, not the start, float64 ``(tokens, width)``."""
    states = encode(pipe, texts)["encoder_hidden_states"].double()
    return torch.cat([own[1 : len(token_ids(pipe, text))] for own, text in zip(states, texts, strict=True)])


def severed(concept: torch.Tensor, nodes: torch.Tensor, options) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthonormal rows that span the cluster around ``concept`` ``(tokens, width)`` among it and ``nodes``
    ``(tokens, width)``, ``(rank, width)``; and the embeddings in the cluster.
    """
    x = torch.cat([concept, nodes])
    unit = normalize(x, dim=1)
    cosine = unit @ unit.T
    itself = torch.eye(len(x), dtype=torch.bool)
    deviation = torch.stack([row[~own].std(correction=0) for row, own in zip(cosine, itself, strict=True)])
    tau = (options.nearness + options.spread * deviation)[:, None]
    weight = torch.where((cosine > tau) & ~itself, ((cosine - tau) / options.softness).exp(), 0.0)
    weight = weight / weight.amax(1, keepdim=True).clamp(min=1)
    score = (torch.arange(len(x)) < len(concept)).double()
    for _ in range(options.hops):
        score = torch.maximum(score, (score[:, None] * options.decay * weight).amax(0))
    kept = score >= options.keep
    _, s, rows = torch.linalg.svd(score[kept, None] * x[kept], full_matrices=False)
    reached = (s**2).cumsum(0) / (s**2).sum()
    return rows[: int((reached < options.energy).sum()) + 1], x[kept]

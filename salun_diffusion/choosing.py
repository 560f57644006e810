"""Which weights of the scope may change: those that saliency finds, a file's or a solution's, or all of them; or the
layers that an adapter goes onto, with their ranks.
"""

from collections.abc import Iterator

import torch

from .config import EraseConfig
from .erasures.mask import union
from .masks.ranks import adaptable_layers, salient_ranks, uniform_ranks
from .masks.saliency import select
from .training.checkpoints import Checkpoint

Tensors = dict[str, torch.Tensor]  # by parameter's name


def mask_of(
    config: EraseConfig,
    parameters: Tensors,
    scores: Iterator[Tensors],
    given: Tensors | None,
    resumed: Checkpoint | None,
) -> Tensors:
    """Name → bool mask of the parameter's shape, True where it may change.

    Args:
        config: whose ``mask`` says how the weights are chosen.
        parameters: those of the scope.
        scores: each concept's saliency, fp32 and ≥ 0, made when it is asked for; the masks of all are united.
        given: the mask of a file or a solution, in place of a choice.
        resumed: the checkpoint that the run goes on from, whose mask it keeps.
    """
    if resumed:
        return resumed.whole_mask(parameters if given is None else given)
    if given is not None:
        return given
    if config.mask == "none":
        return {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    return union([select(score, config.density, config.threshold) for score in scores])


def ranks_of(
    config: EraseConfig,
    network: torch.nn.Module,
    parameters: Tensors,
    scores: Iterator[Tensors],
    resumed: Checkpoint | None,
) -> tuple[dict[str, int], str]:
    """Layer → rank of the adapter, and what that puts onto what and leaves out, for people.

    Args:
        config: whose ``mask`` says whether saliency chooses the layers, and whose ``rank`` is theirs.
        network: the layers' own.
        parameters: those of the scope.
        scores: as for :func:`mask_of`.
        resumed: the checkpoint that the run goes on from, whose ranks it keeps.
    """
    layers = adaptable_layers(network, parameters)
    if resumed:
        ranks = resumed.ranks()
    elif config.mask == "none":
        ranks = uniform_ranks(layers, config.rank)
    else:
        ranks = salient_ranks(layers, scores, config.rank)
    least, most = min(ranks.values()), max(ranks.values())
    rank = f"of rank {most}" if least == most else f"of rank {least} to {most}"
    count = sum(rank * (len(layers[name]) + layers[name].flatten(1).shape[1]) for name, rank in ranks.items())
    text = f"An adapter {rank} on {len(ranks)} of the {len(layers)} layers in scope: {count:,} weights to train."
    rest = len(parameters) - len(layers)
    return ranks, text + (f" It cannot hold the {rest} biases and norms in scope." if rest else "")

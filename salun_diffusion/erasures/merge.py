"""Base weights and the changes of packed deltas, put together: the arithmetic of loading, and where its time goes.

A parameter is worked off in pieces that fit a core's cache, so that only the base, the file's bits and values and the
result pass through memory, each once. The slow twin, a weight at a time, is in the tests.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

GRAIN = 1 << 15  # elements: on more, torch starts threads of its own, where `in_parallel` runs one a core already
PIECE = 15 << 12  # weights, in whole words; half of them, the usual density, are less than GRAIN


class Merged(NamedTuple):
    """What `merge` saw of its result: whether the dtype can hold all of it, and its `checksum`."""

    fits: bool
    checksum: int


@torch.no_grad()
def merge(
    base: torch.Tensor,
    terms: list[tuple[torch.Tensor, torch.Tensor, float]],
    out: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Make ``out`` = base + the sum of scale * delta: in float32, rounded once to the dtype of ``out``. At no place of
    a delta it is ``base``, bit for bit.

    Args:
        base: one dimension, float, contiguous, on the CPU, as all tensors here.
        terms: each a packed mask, the values at its places, and a scale.
        out: of ``base``'s size; float32, float16 or bfloat16.
        dtype: what the result must fit; that of ``out`` by default.

    Returns:
        What was seen on the way, while each piece was at hand.
    """
    readers = [_reader(packed.numpy(), values, scale, len(terms) > 1) for packed, values, scale in terms]
    wide, dtype = out.dtype == torch.float32, dtype or out.dtype
    lowest, highest, words = np.float32(0), np.float32(0), 0
    with np.errstate(over="ignore", invalid="ignore"):  # what became of it shows in the result
        for start in range(0, len(base), PIECE):
            new = out[start : start + PIECE]
            result = new if wide else torch.empty(len(new))
            _copy(base[start : start + PIECE], result)
            if len(terms) == 1:
                places, changes = readers[0](start, len(new))
                result.scatter_add_(0, places, changes)
            else:  # several changes add up before they meet the base, for one rounding; x + -0.0 is x, whatever x is
                move = torch.full_like(result, -0.0)
                for read in readers:
                    move.scatter_add_(0, *read(start, len(new)))
                result += move
            values = result.numpy()
            if dtype != torch.float32 or not np.isfinite(values.sum()):  # a sum of finite ones may be infinite
                lowest, highest = np.minimum(lowest, values.min()), np.maximum(highest, values.max())  # NaN stays NaN
            if not wide:
                _copy(result, new)
            words += _sum(new)
    extremes = torch.tensor([lowest, highest])  # rounding never swaps two numbers, so that they tell of all
    return Merged(bool(extremes.to(dtype).float().isfinite().all()), words % (1 << 64))


def _reader(packed: np.ndarray, values: torch.Tensor, scale: float, several: bool) -> Callable:
    """What gives, piece after piece, the places that a delta changes there, and by how much."""
    taken = 0

    def read(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal taken
        bits = np.unpackbits(packed[start // 8 : (start + PIECE) // 8], count=count, bitorder="little")
        places = np.flatnonzero(bits.view(bool))
        changes = torch.empty(len(places))
        _copy(values[taken : taken + len(places)], changes)
        taken += len(places)
        if scale != 1:
            changes.numpy()[:] *= np.float32(scale)
        if several:
            changes.numpy()[:] += np.float32(0)  # a sum that began at 0.0 is never -0.0
        return torch.from_numpy(places), changes

    return read


def checksum(weights: torch.Tensor) -> int:
    """The sum of a tensor's bits as 64-bit words, row-major: another one, if something else has written there."""
    return _sum(weights.detach().cpu().contiguous().flatten()) % (1 << 64)


def _sum(flat: torch.Tensor) -> int:
    raw = flat.view(torch.uint8).numpy()
    words = raw[: len(raw) // 8 * 8].view(np.uint64)
    return int(np.add.reduce(words)) + int(np.add.reduce(raw[len(words) * 8 :], dtype=np.uint64))


def in_parallel(work: Callable, items: Iterable) -> list:
    """``[work(item) for item in items]``, on as many threads as torch may use."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:  # what it has begun is waited for, also after a failure
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _copy(source, target) -> None:
    if source.dtype == target.dtype == torch.float32:
        target.numpy()[:] = source.numpy()
    elif len(source) <= GRAIN:
        target.copy_(source)
    else:
        for part, place in zip(source.split(GRAIN), target.split(GRAIN), strict=True):
            place.copy_(part)

"""Proportions with their Wilson 95% intervals, as every table of the project shows them, and where curves cross."""

from collections.abc import Iterable


def wilson(count: int, n: int, digits: int = 2) -> dict:
    """A proportion in percent with its 95% interval (Wilson 1927).

    Args:
        count: how many of the outcomes were successes.
        n: how many outcomes there were, at least 1.
        digits: decimals that the percentages keep.

    Returns:
        ``{"count", "n", "percent", "low", "high"}``, the last three in percent.
    """
    from scipy.stats import binomtest  # scipy comes with the extras, and takes a second to import

    low, high = binomtest(count, n).proportion_ci(0.95, method="wilson")
    percentages = {"percent": count / n, "low": low, "high": high}
    return {"count": count, "n": n} | {key: round(float(100 * value), digits) for key, value in percentages.items()}


def proportion(outcomes: Iterable[bool], digits: int = 2) -> dict | None:
    """The share of true ``outcomes``, as :func:`wilson` has it; None if there is nothing to count."""
    outcomes = [bool(outcome) for outcome in outcomes]
    return wilson(sum(outcomes), len(outcomes), digits) if outcomes else None


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """Where a curve of ``points`` (x, y) first reaches ``level``, on the straight line between its neighbours; None if
    it never does.
    """
    before = None
    for x, y in points:
        if y >= level:
            if before is None or y == before[1]:
                return float(x)
            return before[0] + (x - before[0]) * (level - before[1]) / (y - before[1])
        before = (x, y)
    return None

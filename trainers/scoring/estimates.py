"""Estimates with their standard errors: shares, means and ratios over rows. Python's own floats throughout."""

import math
from collections.abc import Sequence
from statistics import NormalDist

QUANTILE = NormalDist().inv_cdf(0.975)


def share(hits: Sequence[bool]) -> dict:
    """
    A share p of n decisions: `value`, `standard_error` √(p(1 − p) / n), `rows`, and `interval`, Wilson's for 95 %
    (Wilson 1927), which has a width where all or none hit and the standard error has none.
    """
    count = len(hits)
    p = sum(hits) / count
    error = math.sqrt(p * (1 - p) / count)
    return {"value": p, "standard_error": error, "rows": count, "interval": wilson(p, count)}


def wilson(p: float, count: int) -> list[float]:
    """Wilson's interval for 95 % (1927) of a share p of `count` decisions."""
    z = QUANTILE
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return [centre - half if p > 0 else 0.0, centre + half if p < 1 else 1.0]  # rounding would miss the ends


def mean(values: Sequence[float]) -> dict:
    """`value`, its `standard_error` over the rows (`None` for a single one), and `rows`."""
    return {**ratio(values, [1.0] * len(values)), "rows": len(values)}


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> dict:
    """Σ tops / Σ bottoms as `value` and its `standard_error` over the rows (`None` for a single one), linearised."""
    size = math.fsum(bottoms)
    value = math.fsum(tops) / size
    squares = math.fsum((top - value * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    return {"value": value, "standard_error": ratio_error(len(tops), squares, size)}


def ratio_error(rows: int, squares: float, size: float) -> float | None:
    """
    Standard error of a ratio R = Σ a / Σ b over rows by the delta method: √(n / (n − 1) · Σ (a − R·b)²) / Σ b.

    Args:
        rows (`int`): n; `None` comes back for fewer than two.
        squares (`float`): Σ (a − R·b)².
        size (`float`): Σ b.
    """
    return None if rows < 2 else math.sqrt(squares * rows / (rows - 1)) / size

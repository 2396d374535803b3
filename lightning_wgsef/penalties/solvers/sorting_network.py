r"""Sorting network for many segments of a few groups, such as 2 of every 4 weights: a closed form.

With norms in descending order :math:`a_1 \ge \dots \ge a_n` and shares
:math:`u_i = \mathrm{clip}((\rho a_i - t) / d, 0, 1)`, cutting below only gives
:math:`\sum_i \max(0, \cdot)`, the largest of the sums over the first e groups; cutting above as
well gives the least over s of "s groups at 1, the rest cut below only". All are increasing in
:math:`\rho`, so that the root of :math:`\sum_i u_i = K` is

.. math:: \rho = \max_{s < K}\ \min_{e \ge K}
          \frac{(K - s)\, d + (e - s)\, t}{a_{s+1} + \dots + a_e}

(an e below K would leave groups at 1 that s counts already). The norms of a segment are brought
into order by a sorting network. Everything runs on rows of chunks that stay in the cache.

Unit weights and costs, a whole K, all segments alike. In float32 a multiplier is off by up to
about 1e-6 of 1, since u is a difference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_wgsef.utils.cache import CACHED

# Up to so many groups in a segment a network is better than a search.
LONGEST = 16

# From so many segments on this pays.
MANY = 2**12

# Above this ratio of t to d float32 would lose more than that.
_STEEP = 4.0

# The least 1 / rho, as a share of the largest norm. It is 0 where all live groups fit, and factors
# would be 0 / 0.
_SHORTEST = 1e-12


def multipliers(norms: Tensor, step: float, k: int, *, debias: float, anchored: bool) -> Tensor:
    """Return what `prox_multipliers` gives, shape (S, n).

    Args:
        norms: shape (S, n), finite, at least 0.
        step: tau > 0, below 1 / debias.
        k: the budget of every segment, 1 <= k < n.
        debias: see `prox_multipliers`.
        anchored: see `prox_multipliers`.
    """
    width = 1 - debias * step
    most = 1 / (1 + step * (1 - debias))
    result = torch.empty_like(norms)
    dtype = torch.float64 if step / width > _STEEP else norms.dtype
    for some, out in _chunks(norms, result, dtype):
        ordered = _in_order(some)
        # 1 / rho, which is 0 where no more groups are live than fit.
        way = torch.maximum(_inverse_root(ordered, step, width, k), ordered[0] * _SHORTEST)
        lowest, highest = way * step, way * (step + width)
        # With b = clip(a, t / rho, (t + d) / rho) the factor is (b - t / rho) / (d b).
        factors = _factors(torch.stack(some), lowest, highest, width, most)
        if anchored:
            last = _factors(ordered[k - 1], lowest, highest, width, most)
            factors.div_(torch.where(ordered[k - 1] > 0, last, most)).clamp_(max=1)
        if bool((ordered[0] == 0).any()):
            factors.nan_to_num_(0.0)
        for row, factor in zip(out, factors, strict=True):
            row.copy_(factor)
    return result


def _factors(norms: Tensor, lowest: Tensor, highest: Tensor, width: float, most: float) -> Tensor:
    """Return u / ((1 - debias t) u + t), written in bounded norms: one division."""
    bounded = torch.clamp(norms, lowest, highest)
    # Stretched by its own rounding, so that what is saturated is exactly so.
    stretch = (1 + 8 * torch.finfo(norms.dtype).eps) / width
    return (bounded - lowest).div_(bounded).mul_(stretch).clamp_(max=most)


def _inverse_root(ordered: list[Tensor], step: float, width: float, k: int) -> Tensor:
    """Return 1 / rho for every segment, by the formula of this module."""
    # Of 1 / rho, which is 0 where too few groups are live, the largest over e and the least over s.
    least = None
    for saturated in range(k):
        # The sum a_{s+1} + .. + a_e, which gains one norm with every e.
        total = sum(ordered[saturated:k], torch.zeros_like(ordered[0]))
        greatest = None
        for entered in range(k, len(ordered) + 1):
            if entered > k:
                total = total + ordered[entered - 1]
            part = total / ((k - saturated) * width + (entered - saturated) * step)
            greatest = part if greatest is None else torch.maximum(greatest, part)
        assert greatest is not None
        least = greatest if least is None else torch.minimum(least, greatest)
    assert least is not None
    return least


def _in_order(rows: list[Tensor]) -> list[Tensor]:
    """Sort the rows in descending order, entry by entry (odd-even merge sort, Batcher 1968)."""
    # Which pairs are compared does not depend on values: every step is one pass over two rows.
    rows = list(rows)
    for first, second in _network(len(rows)):
        high, low = (
            torch.maximum(rows[first], rows[second]),
            torch.minimum(rows[first], rows[second]),
        )
        rows[first], rows[second] = high, low
    return rows


def _network(count: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs to compare, in order.

    >>> list(_network(4))
    [(0, 1), (2, 3), (0, 2), (1, 3), (1, 2)]
    """
    size = 1  # length of the runs that are in order already and are merged in pairs
    while size < count:
        reach = size  # how far apart the two of a pair are
        while reach >= 1:
            for start in range(reach % size, count - reach, 2 * reach):
                for first in range(start, min(start + reach, count - reach)):
                    second = first + reach  # of the same merge, or it is no pair
                    if first // (2 * size) == second // (2 * size):
                        yield first, second
            reach //= 2
        size *= 2


def _chunks(
    norms: Tensor, result: Tensor, dtype: torch.dtype
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the columns of some segments at a time, contiguous, and where their results go."""
    segments = max(1, CACHED // norms.shape[1])
    some, out = torch.split(norms, segments), torch.split(result, segments)
    for rows, results in zip(some, out, strict=True):
        columns = [column.to(dtype).contiguous() for column in rows.unbind(1)]
        yield columns, list(results.unbind(1))

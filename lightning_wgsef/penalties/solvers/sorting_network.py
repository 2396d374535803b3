r"""Sorting network for many segments of a few groups, such as 2 of every 4 weights: a closed form.

With norms in descending order :math:`a_1 \ge \dots \ge a_n` and shares
:math:`u_i = \mathrm{clip}((\rho a_i - t) / d, 0, 1)`, cutting below only gives
:math:`\sum_i \max(0, \cdot)`, the largest of the sums over the first e groups; cutting above as
well gives the least over s of "s groups at 1, the rest cut below only". All are increasing in
:math:`\rho`, so that the root of :math:`\sum_i u_i = K` is

.. math:: \rho = \max_{s < K}\ \min_{e \ge K}
          \frac{(K - s)\, d + (e - s)\, t}{a_{s+1} + \dots + a_e}

for every K, whole or not (an e below K would leave groups at 1 that s counts already). The norms of
a segment are brought into order by a sorting network. What is compared is positive or zero, and the
bits of such numbers rise with them: as integers they need no care for NaN, which would cost more
than the comparison.

Unit weights and costs, all segments alike. In float32 a multiplier is off by up to
about 1e-6 of 1, since u is a difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_wgsef.utils.fusion import Fused, bits

# Up to so many groups in a segment a network is better than a search.
LONGEST = 16

# From so many segments on this pays.
MANY = 2**6

# Above this ratio of t to d float32 would lose more than that.
_STEEP = 4.0

# What a multiplier is divided by, at least.
_LEAST = 1e-12


def multipliers(
    norms: Tensor, step: float, k: float, *, debias: float, anchored: bool, work: int
) -> Tensor:
    """Return what `prox_multipliers` gives, shape (S, n).

    Args:
        norms: shape (S, n), finite, at least 0.
        step: tau > 0, below 1 / debias.
        k: the budget of every segment, 0 < k <= n.
        debias: see `prox_multipliers`.
        anchored: see `prox_multipliers`.
        work: number of groups of all such calls of a step.
    """
    width = 1 - debias * step
    wide = norms.dtype == torch.float64 or step / width > _STEEP
    dtype = torch.float64 if wide else torch.float32
    least = math.ceil(k)
    saturated = torch.arange(least, dtype=torch.float64).view(-1, 1)
    entered = torch.arange(least, norms.shape[1] + 1)
    parts = 1 / ((k - saturated) * width + (entered - saturated) * step)
    # Stretched by its own rounding, so that what is saturated is exactly so.
    stretch = (1 + 8 * torch.finfo(dtype).eps) / width
    # 1 / rho is 0 where no more groups are live than fit: as little as divisions bear.
    shortest = torch.finfo(dtype).tiny / step
    numbers = [step, step + width, stretch, 1 / (1 + step * (1 - debias)), shortest]
    anchor = math.floor(k) if anchored else 0
    return _FUSED(norms, parts.to(dtype), torch.tensor(numbers, dtype=dtype), anchor, work=work)


def projection(norms: Tensor, count: int, survivor: float, *, work: int) -> Tensor:
    """Return ``survivor`` for the strongest of every segment (ties: lower index), else 0, (S, n).

    Args:
        norms: shape (S, n), at least 0; what is zero stays so.
        count: how many.
        survivor: their factor.
        work: as in `multipliers`.

    >>> projection(torch.tensor([[1.0, 3.0, 1.0]]), 2, 0.5, work=3)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    return _PROJECTED(norms, torch.tensor(survivor, dtype=norms.dtype), count, work=work)


def _multipliers(
    norms: Sequence[Tensor], parts: Tensor, numbers: Tensor, anchor: int
) -> list[Tensor]:
    """Return the multipliers of every group of a segment, each of shape (S,).

    Args:
        norms: of every group of a segment.
        parts: one over the numerators of the formula of this module, those of s a row.
        numbers: t, t + d, the stretch, the factor of what is saturated, and the least 1 / rho.
        anchor: the place, from 1 on, of the group by whose factor all are divided; 0: by none.
    """
    step, end, stretch, most, least = numbers.unbind()
    norms = [norm.to(numbers.dtype) for norm in norms]
    ordered = _in_order(norms)
    way = _larger(_inverse_root(ordered, parts), least)
    lowest, highest = way * step, way * end

    def factors(norms: Tensor, stretch: Tensor, most: Tensor) -> Tensor:
        # With b = clip(a, t / rho, (t + d) / rho) the factor is (b - t / rho) / (d b).
        bounded = _smaller(_larger(norms, lowest), highest)
        return _smaller((bounded - lowest) * stretch / bounded, most)

    if anchor:  # where that group is zero, all live ones are saturated: any small number does
        stretch = stretch / _larger(factors(ordered[anchor - 1], stretch, most), most * _LEAST)
        most = torch.ones_like(most)
    return [factors(norm, stretch, most) for norm in norms]


def _projection(norms: Sequence[Tensor], survivor: Tensor, count: int) -> list[Tensor]:
    """Return the factors of every group of a segment, each of shape (S,)."""
    rows = [bits(norm) for norm in norms]
    ahead = [torch.zeros_like(row) for row in rows]
    for second in range(len(norms)):
        for first in range(second):
            wins = (rows[first] >= rows[second]).to(rows[first].dtype)
            ahead[second] = ahead[second] + wins
            ahead[first] = ahead[first] + (1 - wins)
    return [
        torch.where((place < count) & (row > 0), survivor, 0)
        for row, place in zip(rows, ahead, strict=True)
    ]


_FUSED = Fused(_multipliers, "n:m")
_PROJECTED = Fused(_projection, "n:m at its end")


def _inverse_root(ordered: Sequence[Tensor], parts: Tensor) -> Tensor:
    """Return 1 / rho for every segment, by the formula of this module."""
    # Of 1 / rho, which is 0 where too few groups are live, the largest over e and the least over s.
    k, least = len(parts), None
    for saturated in range(k):
        # The sum a_{s+1} + .. + a_e, which gains one norm with every e.
        total = sum(ordered[saturated + 1 : k], ordered[saturated])
        greatest = total * parts[saturated, 0]
        for entered in range(k, len(ordered)):
            total = total + ordered[entered]
            greatest = _larger(greatest, total * parts[saturated, entered - k + 1])
        least = greatest if least is None else _smaller(least, greatest)
    assert least is not None
    return least


def _in_order(norms: Sequence[Tensor]) -> list[Tensor]:
    """Sort the norms in descending order, entry by entry (odd-even merge sort, Batcher 1968)."""
    # Which pairs are compared does not depend on values: every step is one pass over two of them.
    rows = [bits(norm) for norm in norms]
    for first, second in _network(len(rows)):
        one, other = rows[first], rows[second]
        rows[first], rows[second] = torch.maximum(one, other), torch.minimum(one, other)
    return [row.view(norms[0].dtype) for row in rows]


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


def _larger(first: Tensor, second: Tensor) -> Tensor:
    return torch.maximum(bits(first), bits(second)).view(first.dtype)


def _smaller(first: Tensor, second: Tensor) -> Tensor:
    return torch.minimum(bits(first), bits(second)).view(first.dtype)

r"""Size of the slim network, a polynomial in the numbers of groups alive.

What `slim` leaves of a layer costs as much as the widths that it reads and makes say: a dense layer
of n inputs and p outputs has n p weights, attention with h heads two products for each of them, a
depthwise convolution as many filters as there are channels. Every width is affine in the numbers
alive, a concatenation's the sum of its parts', so that with the numbers :math:`n_g` of groups of
each kind that are alive

.. math:: S(n) = \sum_t c_t \prod_{f \in t} (b_f + \sum_g s_{fg} n_g).

Its gradient at the widths as they are is what a group costs there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlimSize:
    """Size of what `slim` makes of a network, by its groups that are alive.

    Attributes:
        unit: what is counted: "FLOPs" (of one sample), "parameters" or "bytes".
        kinds: which groups are alike, shape (m,): removing one of a kind has the effect of
            removing any other.
        base: the constant of every width, shape (widths,).
        slopes: what a group of each kind adds to every width, shape (widths, kinds).
        coefficients: of the products, shape (products,).
        factors: the widths that are multiplied, shape (products, most factors); the last width is
            the number 1.

    All numbers are float64, in which counts are exact.

    >>> size = SlimSize(  # two dense layers, 4 to n to 3, with n = 5 groups: 4 n + 3 n
    ...     unit="parameters",
    ...     kinds=torch.zeros(5, dtype=torch.long),
    ...     base=torch.tensor([0.0, 1.0]).double(),
    ...     slopes=torch.tensor([[1.0], [0.0]]).double(),
    ...     coefficients=torch.tensor([4.0, 3.0]).double(),
    ...     factors=torch.tensor([[0], [0]]),
    ... )
    >>> size.of(torch.tensor([True, True, False, False, False])), size.total
    (tensor(14., dtype=torch.float64), tensor(35., dtype=torch.float64))
    >>> size.costs(torch.ones(5, dtype=torch.bool)).tolist()
    [7.0, 7.0, 7.0, 7.0, 7.0]
    """

    unit: str
    kinds: Tensor
    base: Tensor
    slopes: Tensor
    coefficients: Tensor
    factors: Tensor

    @property
    def total(self) -> Tensor:
        """The size of the dense network, shape ()."""
        return self.of(torch.ones_like(self.kinds, dtype=torch.bool))

    def of(self, alive: Tensor) -> Tensor:
        """Count the size of the slim network where these groups, booleans (m,), are alive."""
        return self._of(self._counts(alive))

    def costs(self, alive: Tensor) -> Tensor:
        """Return what every group costs at the widths of these alive, the gradient, shape (m,)."""
        widths = self._widths(self._counts(alive))
        gradient = torch.zeros_like(self.slopes[0])
        for place in range(widths.shape[1]):
            others = torch.cat([widths[:, :place], widths[:, place + 1 :]], 1).prod(1)
            gradient = gradient + (self.coefficients * others) @ self.slopes[self.factors[:, place]]
        return gradient[self.kinds]

    def fitting(self, strengths: Tensor, first: Tensor, budget: Tensor) -> Tensor:
        """Find which groups fit a budget, in the order of their strengths.

        The longest beginning of the order that fits, found by bisection, for a size never falls
        where a group more is alive; and of the groups behind, those that still fit, kind after kind
        in the order of the strongest: where one is dear, cheaper ones use what it leaves. No group
        more of a kind fits at what it costs at most. Waits for no accelerator.

        Args:
            strengths: of the groups, at least 0, shape (m,); what has none does not enter behind
                one that does not fit. Equals enter in their order.
            first: which groups enter whatever they cost, booleans, shape (m,).
            budget: in units of size, shape ().

        Returns:
            Which groups enter, booleans, shape (m,).
        """
        count = len(strengths)
        places = torch.arange(count, device=strengths.device)
        strengths = strengths.masked_fill(first, torch.inf)
        order = strengths.sort(descending=True, stable=True).indices
        rank = torch.empty_like(places).index_put_((order,), places)
        budget = budget * (1 + _SLACK)
        low, high = first.sum(), torch.full_like(first.sum(), count)
        for _ in range(count.bit_length()):
            middle = (low + high + 1) // 2
            fits = self.of(rank < middle) <= budget
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
            high = torch.maximum(low, high)
        inside = rank < low
        counts = self._counts(inside)
        most = torch.maximum(counts, self._counts(inside | (strengths > 0)))
        outside = torch.full_like(counts, count).long()
        waiting = torch.where(inside, count, rank)
        outside = outside.scatter_reduce(0, self.kinds, waiting, "amin")
        for kind in outside.argsort().view(-1, 1):
            full = counts.index_copy(0, kind, most[kind])
            size = self._of(counts)
            room = (budget - size) / (self._of(full) - size) * (most - counts)[kind]
            more = torch.where(room > 0, room, 0).floor()  # of no group at all there is no room
            counts = torch.minimum(counts.index_add(0, kind, more), most)
        return self._rank_in_kind(order) < counts[self.kinds]

    def to(self, device: torch.device) -> SlimSize:
        """Move all tensors."""
        tensors = {n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]  # the unit stays

    def _counts(self, alive: Tensor) -> Tensor:
        """Count the groups alive of every kind."""
        counts = self.base.new_zeros(self.slopes.shape[1])
        return counts.index_add(0, self.kinds, alive.to(counts.dtype))

    def _of(self, counts: Tensor) -> Tensor:
        return self._widths(counts).prod(1) @ self.coefficients

    def _widths(self, counts: Tensor) -> Tensor:
        """Return the widths that are multiplied, shape (products, most factors)."""
        return (self.base + self.slopes @ counts)[self.factors]

    def _rank_in_kind(self, order: Tensor) -> Tensor:
        """Return the place of every group among those of its kind, in an order of all."""
        by_kind = order[self.kinds[order].sort(stable=True).indices]
        counts = self._counts(torch.ones_like(order)).long()
        starts = (counts.cumsum(0) - counts)[self.kinds[by_kind]]
        places = torch.arange(len(order), device=order.device) - starts
        return torch.empty_like(order).index_put_((by_kind,), places)


# Shares of counts are rounded: 0.7 * 10 is less than 7.
_SLACK = 1e-12

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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_wgsef.groups.grouped_layer import GroupedLayer


@dataclass(frozen=True, eq=False)
class WidthLimits:
    """How many groups of each layer may stay.

    Attributes:
        owner: the layer of every group, shape (m,); groups of a layer follow one another.
        least: that have to stay, whatever they cost, shape (layers,).
        most: that may stay, shape (layers,).
        multiple: what stays is a multiple of this, shape (layers,).
    """

    owner: Tensor
    least: Tensor
    most: Tensor
    multiple: Tensor

    @classmethod
    def of(cls, layers: Sequence[GroupedLayer], device: torch.device) -> WidthLimits:
        """Collect the limits of layers; least and most are multiples then."""
        rows = [[*layer.bounds, layer.multiple] for layer in layers]
        counts = torch.tensor([layer.count for layer in layers])
        owner = torch.arange(len(layers)).repeat_interleave(counts)
        least, most, multiple = torch.tensor(rows).T.contiguous()
        return cls(*(x.to(device) for x in (owner, least, most, multiple)))

    def ranks(self, strengths: Tensor) -> Tensor:
        """Return the place of every group in the order of its layer; equals in their order."""
        return ranks(strengths.sort(descending=True, stable=True).indices, self.owner)


def ranks(order: Tensor, owner: Tensor) -> Tensor:
    """Return the place of every group among those of its owner, in an order of all.

    >>> ranks(torch.tensor([3, 0, 2, 1]), torch.tensor([0, 0, 1, 1])).tolist()
    [0, 1, 1, 0]
    """
    grouped = order[owner[order].sort(stable=True).indices]
    places = torch.arange(len(order), device=order.device)
    counts = torch.zeros_like(order).index_add(0, owner, torch.ones_like(order))
    starts = (counts.cumsum(0) - counts)[owner[grouped]]
    return torch.empty_like(order).index_put_((grouped,), places - starts)


@dataclass(frozen=True, eq=False)
class SlimSize:
    """Size of what `slim` makes of a network, by its groups that are alive.

    Attributes:
        unit: what is counted: "FLOPs" (of one sample), "parameters" or "bytes"; or "ms", measured.
        kinds: which groups are alike, shape (m,): removing one of a kind has the effect of
            removing any other.
        base: the constant of every width, shape (widths,).
        slopes: what a group of each kind adds to every width, shape (widths, kinds).
        coefficients: of the products, shape (products,).
        factors: the widths that are multiplied, shape (products, most factors); the last width is
            the number 1.
        dense: the size of the dense network where that was measured by itself, shape (); None: it
            is that of all groups.

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
    dense: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The size of the dense network, shape ()."""
        return (
            self.dense
            if self.dense is not None
            else self.of(torch.ones_like(self.kinds, dtype=torch.bool))
        )

    @property
    def latency(self) -> Tensor | None:
        """What was measured: of the dense network, and the coefficients; None: nothing was."""
        return None if self.dense is None else torch.cat([self.dense.view(1), self.coefficients])

    def with_latency(self, measured: Tensor) -> SlimSize:
        """Take what was measured before, as `latency` has it."""
        return replace(self, dense=measured[0], coefficients=measured[1:])

    def shown(self, value: float) -> str:
        """Write a size, without its unit."""
        return f"{value:.3g}" if self.unit == "ms" else f"{value:,.0f}"

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

    def fitting(self, strengths: Tensor, limits: WidthLimits, budget: Tensor) -> Tensor:
        """Find which groups fit a budget, in the order of their strengths.

        Of every layer the least that have to stay enter first, then multiples of groups in the
        order of their mean squares: the longest beginning that fits, found by bisection, for a size
        never falls where a group more is alive. Of the groups behind, those that still fit enter,
        kind after kind in the order of the strongest: where one is dear, cheaper ones use what it
        leaves. No multiple more of a kind fits at what it costs at most. Waits for no accelerator.

        Args:
            strengths: of the groups, at least 0, shape (m,); those of none do not enter. Equals
                enter in their order.
            limits: of the widths.
            budget: in units of size, shape ().

        Returns:
            Which groups enter, booleans, shape (m,).
        """
        count, owner = len(strengths), limits.owner
        strengths = strengths.double()
        places = limits.ranks(strengths)
        alive = torch.zeros_like(limits.most).index_add(0, owner, (strengths > 0).long())
        most = torch.minimum(limits.most, alive // limits.multiple * limits.multiple)
        allowed = places < torch.maximum(most, limits.least)[owner]
        least, multiple = limits.least[owner], limits.multiple[owner]
        number = torch.where(places < least, 0, 1 + (places - least) // multiple)
        sizes = torch.zeros_like(limits.most).index_add(0, owner, torch.ones_like(owner))
        portion = (sizes.cumsum(0) - sizes)[owner] + number  # at most one for every group
        means = strengths.new_full((count,), -1.0)
        means = means.scatter_reduce(
            0, portion, strengths.square(), "mean", include_self=False
        ).masked_fill_(
            torch.zeros_like(allowed).index_fill(0, portion[number == 0], True), torch.inf
        )
        order = means.sort(descending=True, stable=True).indices
        rank = torch.empty_like(order).index_put_(
            (order,), torch.arange(count, device=order.device)
        )[portion]
        rank = torch.where(allowed, rank, count)
        budget = budget * (1 + _SLACK)
        low = torch.full_like(limits.most.sum(), len(limits.most))
        high = torch.full_like(low, count)
        for _ in range(count.bit_length()):
            middle = (low + high + 1) // 2
            fits = self.of(rank < middle) <= budget
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
            high = torch.maximum(low, high)
        inside = rank < low
        counts, highest = self._counts(inside), self._counts(allowed)
        step, alike = self._steps(limits)
        highest = torch.where(alike, highest, counts)
        outside = torch.full_like(counts, count).long()
        outside = outside.scatter_reduce(0, self.kinds, torch.where(inside, count, rank), "amin")
        for kind in outside.argsort().view(-1, 1):
            full = counts.index_copy(0, kind, highest[kind])
            size = self._of(counts)
            room = (budget - size) / (self._of(full) - size) * (highest - counts)[kind]
            more = torch.where(room > 0, room, 0)  # of no group at all there is no room
            counts = counts.index_add(0, kind, (more / step[kind]).floor() * step[kind])
            counts = torch.minimum(counts, highest)
        in_order = strengths.sort(descending=True, stable=True).indices
        return ranks(in_order, self.kinds) < counts[self.kinds]

    def _steps(self, limits: WidthLimits) -> tuple[Tensor, Tensor]:
        """Return in which steps groups of every kind may enter, and whether they may alone."""
        kinds = self.slopes.shape[1]
        layer = torch.zeros(kinds, dtype=torch.long, device=self.kinds.device)
        layer = layer.index_put((self.kinds,), limits.owner)
        step = limits.multiple[layer]
        several = torch.zeros_like(limits.most).index_add(0, layer, torch.ones_like(layer)) > 1
        return step.double(), (step == 1) | ~several[layer]

    def to(self, device: torch.device) -> SlimSize:
        """Move all tensors."""
        tensors = {n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]  # the unit stays

    @classmethod
    def of_costs(cls, layers: Sequence[GroupedLayer]) -> SlimSize:
        """Make the size of groups that cost what they cost whatever else is alive: a sum."""
        kinds, prices, first = [], [], 0
        for layer in layers:
            costs = torch.ones(layer.count) if layer.costs is None else layer.costs.cpu()
            values, own = torch.unique(costs.double(), return_inverse=True)
            kinds.append(own + first)
            prices.append(values)
            first += len(values)
        one = torch.ones(1, dtype=torch.float64)
        return cls(
            unit="",
            kinds=torch.cat(kinds),
            base=torch.cat([torch.zeros(first, dtype=torch.float64), one]),
            slopes=torch.eye(first + 1, first, dtype=torch.float64),
            coefficients=torch.cat(prices),
            factors=torch.arange(first).view(-1, 1),
        )

    def _counts(self, alive: Tensor) -> Tensor:
        """Count the groups alive of every kind."""
        counts = self.base.new_zeros(self.slopes.shape[1])
        return counts.index_add(0, self.kinds, alive.to(counts.dtype))

    def _of(self, counts: Tensor) -> Tensor:
        return self._widths(counts).prod(1) @ self.coefficients

    def _widths(self, counts: Tensor) -> Tensor:
        """Return the widths that are multiplied, shape (products, most factors)."""
        return (self.base + self.slopes @ counts)[self.factors]


# Shares of counts are rounded: 0.7 * 10 is less than 7.
_SLACK = 1e-12

"""Competition for budgets, as the envelope and its proximal step both have to solve it.

Checked arguments in working precision, laid out with one segment a row; the shares u_j that spend
each budget exactly; and the groups that a projection keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wgsef.penalties.segments import Bucket, Segments
from lightning_wgsef.penalties.solvers.root_finding import root_by_rank, root_of_budget
from lightning_wgsef.utils.validation import (
    check_kind,
    check_values,
    per_group,
    per_segment,
    shape_of,
)

# Costs are sums of floating-point numbers: a set whose cost exceeds the budget by no more than this
# share of it fits. "Fits" is the wider test, so that what a projection keeps always fits.
PROJECTION_SLACK = 1e-9

_FIT_SLACK = 2e-9


@dataclass(frozen=True, eq=False)
class Competition:
    """Groups and the budgets they compete for, one segment a row, padded with norm 0.

    Attributes:
        norms: group norms a_j, shape (S, n).
        budgets: the budget K of every segment, shape (S, 1).
        weights: penalty weights w_j, shape (S, n); None: 1.
        costs: costs c_j, shape (S, n); None: 1.
    """

    norms: Tensor
    budgets: Tensor
    weights: Tensor | None = None
    costs: Tensor | None = None

    @property
    def on_host(self) -> bool:
        """May the host look at values without waiting for an accelerator?"""
        return self.norms.device.type == "cpu"

    def total(self, values: Tensor) -> Tensor:
        """Sum ``values`` over each segment, shape (S, 1)."""
        return values.sum(1, keepdim=True)

    def weighted(self, values: Tensor) -> Tensor:
        """Multiply ``values`` by the penalty weights."""
        return values if self.weights is None else values * self.weights

    def priced(self, values: Tensor) -> Tensor:
        """Multiply ``values`` by the costs."""
        return values if self.costs is None else values * self.costs

    def strengths(self) -> Tensor:
        r"""Return :math:`a_j \sqrt{w_j / c_j}`, in whose order groups enter a budget."""
        strengths = self.norms
        if self.weights is not None:
            strengths = strengths * self.weights.sqrt()
        if self.costs is not None:
            strengths = strengths / self.costs.sqrt()
        return strengths

    def live(self) -> Tensor:
        """Return 1 for every group that is not zero, 0 for the others."""
        return (self.norms > 0).to(self.norms.dtype)

    def shares(self, thresholds: Tensor, widths: Tensor) -> Tensor:
        r"""Find :math:`u_j = clip((\rho z_j - threshold_j) / width_j, 0, 1)` that spend K.

        :math:`z_j` is the group's strength and :math:`\rho` the root of :math:`\sum c_j u_j = K`
        in its segment; live groups that fit get 1, zero groups 0.

        Args:
            thresholds: at least 0, shape (S, n) or (S, 1).
            widths: above 0, shape (S, n) or (S, 1).
        """
        slopes, offsets = self.strengths() / widths, thresholds / widths
        live = self.live()
        cost = self.total(self.priced(live))
        fits = cost <= self.budgets * (1 + _FIT_SLACK)
        if self.on_host:
            # Starting with the root if no group were clipped.
            if offsets.shape[1] == 1:
                unclipped = cost * offsets
            else:
                unclipped = self.total(self.priced(live) * offsets)
            start = (self.budgets + unclipped) / self.total(self.priced(slopes))
            root = root_of_budget(slopes, offsets, self.costs, self.budgets, start, fits)
        else:
            root = root_by_rank(slopes, offsets, self.costs, self.budgets)
        shares = torch.addcmul(-offsets, slopes, root)
        # Stretched by its own rounding, so that what ends on a bound is exactly there.
        rounding = 4 * torch.finfo(shares.dtype).eps * (1 + offsets)
        shares = torch.addcmul(shares, shares - 0.5, rounding).clamp_(0, 1)
        if self.on_host and not fits.any():
            return shares
        return torch.where(fits, live, shares)

    def last_within_budget(self) -> Tensor:
        """Find the weakest group that a projection keeps: its place in the row, (S, 1), -1: none.

        Of several groups with its strength it is any one.
        """
        if self.costs is not None:
            return self.within_budget()[1]
        strengths = self.strengths()
        limits = (self.budgets * (1 + PROJECTION_SLACK)).floor()
        most = strengths.shape[1]
        if self.on_host:  # the strongest K are all that has to be ordered
            most = min(most, max(1, int(limits.max())))
        ordered, order = strengths.topk(most, 1)
        live = (ordered > 0).sum(1, keepdim=True)
        last = torch.minimum(limits, live).long() - 1
        return torch.where(last >= 0, order.gather(1, last.clamp(min=0)), -1)

    def within_budget(self) -> tuple[Tensor, Tensor]:
        """Find the groups that a projection keeps, and the weakest of them in every segment.

        Strongest first (ties: lower index first), while their costs fit the budget.

        Returns:
            A boolean for every group, shape (S, n), and its position in the row for every segment,
            shape (S, 1), -1 where nothing is kept.
        """
        strengths = self.strengths()
        limits = self.budgets * (1 + PROJECTION_SLACK)
        ordered, order = strengths.sort(dim=1, descending=True, stable=True)
        costs = torch.ones_like(ordered) if self.costs is None else self.costs.gather(1, order)
        admitted = (costs.cumsum(1) <= limits) & (ordered > 0)
        kept = torch.zeros_like(admitted).scatter_(1, order, admitted)
        number = admitted.sum(1, keepdim=True)
        last = order.gather(1, (number - 1).clamp(min=0))
        return kept, torch.where(number > 0, last, -1)


class Problem:
    """Checked arguments of the envelope's functions, and the way back from rows to vectors.

    Raises:
        ValueError: a wrong shape, dtype or value; the message names the argument.

    >>> Problem(torch.tensor([3.0, 4.0]), 0)
    Traceback (most recent call last):
    ...
    ValueError: k must be a finite number, positive, got 0
    """

    def __init__(
        self,
        norms: Tensor,
        k: float | Tensor,
        weights: Tensor | None = None,
        costs: Tensor | None = None,
        segments: Tensor | int | Segments | None = None,
    ) -> None:
        check_kind("norms", norms, Tensor, "a tensor")
        if norms.dim() != 1 or not norms.is_floating_point():
            raise ValueError(
                f"norms must be floating point of shape (m,), got {norms.dtype} of "
                f"{shape_of(norms)}"
            )
        norms = norms.detach()
        check_values("norms", norms, "finite and not negative")
        self.norms = norms
        self.segments = as_segments(segments, norms, k)
        work = torch.float32 if norms.device.type == "mps" else torch.float64
        like = norms.new_empty(0, dtype=work)
        self.budgets = per_segment("k", k, self.segments.count, like, positive=True)
        self.weights = None if weights is None else per_group("weights", weights, norms.to(work))
        self.costs = None if costs is None else per_group("costs", costs, norms.to(work))

    def buckets(self) -> list[Bucket]:
        """List the segments that share a matrix, without empty ones."""
        return [bucket for bucket in self.segments.buckets if bucket.rows and bucket.width]

    def competition(self, bucket: Bucket) -> Competition:
        """Lay the competition in these segments out, in working precision."""
        return Competition(
            bucket.matrix(self.norms).to(self.budgets.dtype),
            bucket.column(self.budgets),
            self._matrix(bucket, self.weights),
            self._matrix(bucket, self.costs),
        )

    def with_norms(self, norms: Tensor) -> Problem:
        """Return the same competition among groups of other norms, which are not checked."""
        replaced = copy(self)
        replaced.norms = norms
        return replaced

    def solve(self, of: Callable[..., Tensor], *per_group: Tensor) -> Tensor:
        """Apply ``of`` to every competition, with vectors over groups as matrices, as per_group."""
        result = None
        for bucket in self.buckets():
            matrices = [bucket.matrix(vector, pad_with_lowest=True) for vector in per_group]
            solved = of(self.competition(bucket), *matrices)
            result = bucket.place(solved, result, self.segments.size)
        return self.norms.clone() if result is None else result

    @staticmethod
    def _matrix(bucket: Bucket, values: Tensor | None) -> Tensor | None:
        return None if values is None else bucket.matrix(values, pad_with_lowest=True)

    def per_group(self, of: Callable[[Bucket], Tensor]) -> Tensor:
        """Apply ``of`` to every bucket: matrices to a vector over groups, (m,), dtype of norms."""
        result = None
        for bucket in self.buckets():
            matrix = of(bucket).to(self.norms.dtype)
            result = bucket.place(matrix, result, self.segments.size)
        return self.norms.clone() if result is None else result

    def per_segment(self, of: Callable[[Competition], Tensor]) -> Tensor:
        """Apply ``of`` to every competition: columns to a vector over segments, (S,)."""
        result = self.norms.new_zeros(self.segments.count)
        for bucket in self.buckets():
            values = bucket.of_segments(of(self.competition(bucket)).to(result))
            if bucket.segments is None:
                return values
            result[bucket.segments] = values
        return result


def as_segments(segments: Tensor | int | Segments | None, norms: Tensor, k: object) -> Segments:
    """Read ``segments`` in every form in which it may be given.

    Raises:
        ValueError: labels of another length or dtype, a length that does not divide m, or more
            segments than budgets.
    """
    given = len(k) if isinstance(k, Tensor) and k.dim() == 1 else None
    size = len(norms)
    if isinstance(segments, Segments):
        if segments.size != size:
            raise ValueError(f"segments are those of {segments.size} groups, norms has {size}")
        return segments
    if segments is None:
        return Segments.of_sizes([size] + [0] * ((given or 1) - 1), norms.device)
    if isinstance(segments, int):
        if segments < 1 or size % segments:
            raise ValueError(
                f"segments = {segments}: a length must be at least 1 and divide the {size} groups"
            )
        return Segments(size, size // segments, [Bucket(size // segments, segments)])
    check_kind("segments", segments, Tensor, "a tensor of labels, or the length of every segment")
    if segments.shape != norms.shape or segments.is_floating_point() or segments.is_complex():
        raise ValueError(
            f"segments must be integers of shape {shape_of(norms)}, "
            f"got {segments.dtype} of {shape_of(segments)}"
        )
    check_values("segments", segments, "at least 0")
    needed = int(segments.max()) + 1 if size else 1
    if given is not None and given < needed:
        raise ValueError(f"k has {given} budgets but segments go up to {needed - 1}")
    return Segments.of_labels(segments, given)

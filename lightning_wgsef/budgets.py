"""One competition for budgets: what the envelope and its proximal step both have to solve.

Checked arguments in working precision, the shares u_j that spend each budget exactly, and the
groups that a projection keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from lightning_wgsef.segments import (
    cumulative_sum_within,
    first_positions,
    segment_sizes,
    segment_sum,
    sort_within,
)

# Costs are sums of floating-point numbers: a set whose cost exceeds the budget by no more than this
# share of it fits. "Fits" is the wider test, so that what a projection keeps always fits.
_PROJECTION_SLACK = 1e-9
_FIT_SLACK = 2e-9


@dataclass(frozen=True)
class Competition:
    """Groups and the budgets they compete for; build it with `Competition.between`.

    Attributes:
        norms: group norms a_j, shape (m,).
        weights: penalty weights w_j, shape (m,).
        costs: costs c_j, shape (m,).
        segments: the segment of every group, integers 0..S-1, shape (m,).
        budgets: the budget K of every segment, shape (S,).
    """

    norms: Tensor
    weights: Tensor
    costs: Tensor
    segments: Tensor
    budgets: Tensor

    @classmethod
    def between(
        cls,
        norms: Tensor,
        k: float | Tensor,
        weights: Tensor | None = None,
        costs: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Competition:
        """Check the arguments; work in float64 where the device has it.

        Raises:
            ValueError: a wrong shape, dtype or value; the message names the argument.

        >>> Competition.between(torch.tensor([3.0, 4.0]), 0)
        Traceback (most recent call last):
        ...
        ValueError: k must be a finite number, positive, got 0
        """
        if norms.dim() != 1 or not norms.is_floating_point():
            raise ValueError(
                f"norms must be floating point of shape (m,), got {norms.dtype} of {_shape(norms)}"
            )
        work = norms.detach().to(torch.float32 if norms.device.type == "mps" else torch.float64)
        _check_values("norms", work, "finite and not negative", work >= 0)
        count = _segment_count(k, segments, work)
        if segments is None:
            segments = torch.zeros(len(work), dtype=torch.long, device=work.device)
        return cls(
            norms=work,
            weights=_per_group("weights", weights, work),
            costs=_per_group("costs", costs, work),
            segments=segments.to(device=work.device, dtype=torch.long),
            budgets=per_segment("k", k, count, work, positive=True),
        )

    def total(self, values: Tensor) -> Tensor:
        """Sum of ``values`` within segments, shape (S,)."""
        return segment_sum(values, self.segments, len(self.budgets))

    def spread(self, values: Tensor) -> Tensor:
        """For every group the value of its segment, shape (m,)."""
        return values[self.segments]

    def strengths(self) -> Tensor:
        r"""The order in which groups enter a budget: :math:`a_j \sqrt{w_j / c_j}`."""
        return self.norms * (self.weights / self.costs).sqrt()

    def fits(self) -> Tensor:
        """For every segment: do its live groups fit the budget as they are?"""
        live_cost = self.total(self.costs * (self.norms > 0))
        return live_cost <= self.budgets * (1 + _FIT_SLACK)

    def shares(self, thresholds: Tensor, widths: Tensor) -> Tensor:
        r"""Shares :math:`u_j = clip((\rho z_j - threshold_j) / width_j, 0, 1)` that spend K.

        :math:`z_j` is the group's strength and :math:`\rho` the root of :math:`\sum c_j u_j = K`
        in its segment; live groups that fit get 1, zero groups 0.

        A binary search over the sorted breakpoints of each segment finds the interval of the root
        by evaluating the sum itself (running sums over breakpoints would cancel badly when norms
        span many orders of magnitude); inside it the sum is linear and the root exact.
        """
        if not len(self.norms):
            return self.norms
        strengths = self.strengths()
        live = self.norms > 0
        largest = torch.finfo(strengths.dtype).max
        enters = torch.where(live, thresholds / strengths, largest).clamp(max=largest)
        saturates = torch.where(live, (thresholds + widths) / strengths, largest)
        saturates = saturates.clamp(max=largest)
        slopes, offsets = strengths / widths, thresholds / widths

        def spent(root: Tensor) -> Tensor:
            shares = (self.spread(root) * slopes - offsets).clamp(0, 1)
            return self.total(self.costs * shares)

        breakpoints = torch.cat([enters, saturates])
        owners = self.segments.repeat(2)
        breakpoints = breakpoints[sort_within(breakpoints, owners)]
        sizes = segment_sizes(owners, len(self.budgets))
        low = first_positions(sizes).clamp(max=len(breakpoints) - 1)
        high = low + sizes
        longest = int(sizes.max()) if sizes.device.type == "cpu" else len(breakpoints)
        for _ in range(longest.bit_length()):
            middle = (low + high).div(2, rounding_mode="floor")
            root = breakpoints[middle.clamp(max=len(breakpoints) - 1)]
            below = (middle < high) & (spent(root) <= self.budgets)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        left = breakpoints[low]
        rising = (enters <= self.spread(left)) & (self.spread(left) < saturates)
        slope = self.total(torch.where(rising, self.costs * slopes, 0))
        distance = ((self.budgets - spent(left)) / slope).clamp(min=0)
        root = self.spread(torch.where(slope > 0, left + distance, left))
        shares = ((root * strengths - thresholds) / widths).clamp(0, 1)
        shares = torch.where(root >= saturates, 1, torch.where(root > enters, shares, 0))
        return torch.where(self.spread(self.fits()), 1, shares) * live

    def within_budget(self) -> tuple[Tensor, Tensor]:
        """The groups kept by a projection, and the weakest of them in every segment.

        Strongest first (ties: lower index first), while their costs fit the budget.

        Returns:
            A boolean for every group, shape (m,), and an index for every segment, shape (S,), -1
            where nothing is kept.
        """
        strengths = self.strengths()
        order = sort_within(strengths, self.segments, descending=True)
        sizes = segment_sizes(self.segments, len(self.budgets))
        # Running sums go over all segments: in units of the budget's power of two none drowns
        # another, and whole costs stay exact.
        unit = torch.exp2(self.budgets.log2().floor())
        costs = self.costs / self.spread(unit)
        running = cumulative_sum_within(costs, order, self.segments, sizes)
        limits = self.spread(self.budgets / unit)[order] * (1 + _PROJECTION_SLACK)
        admitted = (running <= limits) & (strengths[order] > 0)
        kept = torch.zeros_like(admitted).scatter_(0, order, admitted)
        number = self.total(kept.to(sizes.dtype))
        position = (first_positions(sizes) + number - 1).clamp(min=0, max=max(len(order) - 1, 0))
        return kept, torch.where(number > 0, order[position], -1)


def per_segment(
    name: str, value: float | Tensor, count: int, norms: Tensor, *, positive: bool = False
) -> Tensor:
    """``value`` as a tensor of shape (count,), like ``norms``.

    Raises:
        ValueError: a wrong shape or value; the message calls it ``name``.
    """
    if not isinstance(value, Tensor):
        check_number(name, value, positive=positive)
        return torch.full((count,), float(value), dtype=norms.dtype, device=norms.device)
    if value.dim() > 1 or (value.dim() == 1 and len(value) != count):
        raise ValueError(
            f"{name} must be a number or have shape ({count},), one entry a segment, "
            f"got {_shape(value)}"
        )
    values = value.detach().to(norms).expand(count)
    wanted = "finite and positive" if positive else "finite and not negative"
    _check_values(name, values, wanted, values > 0 if positive else values >= 0)
    return values


def check_number(
    name: str, value: float, *, highest: float = math.inf, positive: bool = False
) -> None:
    """Raise `ValueError` unless ``value`` is finite, from 0 (if ``positive``: above) to highest."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)
        or not 0 <= value <= highest
        or (positive and value == 0)
    ):
        wanted = "positive" if positive else "at least 0"
        bound = f" and at most {highest:g}" if math.isfinite(highest) else ""
        raise ValueError(f"{name} must be a finite number, {wanted}{bound}, got {value!r}")


def check_count_or_share(name: str, value: object, unit: str) -> None:
    """Raise `ValueError` unless ``value`` is a count (int >= 1) or a share (float in (0, 1]).

    >>> check_count_or_share("k", 1.5, "groups")
    Traceback (most recent call last):
    ...
    ValueError: k must be a number of groups (int >= 1) or a share (float in (0, 1]), got 1.5
    """
    if isinstance(value, Integral):
        valid = int(value) >= 1
    else:
        valid = isinstance(value, Real) and 0 < float(value) <= 1
    if not valid or isinstance(value, bool):
        raise ValueError(
            f"{name} must be a number of {unit} (int >= 1) or a share (float in (0, 1]), "
            f"got {value!r}"
        )


def _segment_count(k: float | Tensor, segments: Tensor | None, norms: Tensor) -> int:
    given = len(k) if isinstance(k, Tensor) and k.dim() == 1 else None
    if segments is None:
        return given or 1
    if segments.shape != norms.shape or segments.is_floating_point() or segments.is_complex():
        raise ValueError(
            f"segments must be integers of shape {_shape(norms)}, "
            f"got {segments.dtype} of {_shape(segments)}"
        )
    if given is not None and segments.device.type != "cpu":
        return given
    _check_values("segments", segments, "at least 0", segments >= 0)
    needed = int(segments.max()) + 1 if len(segments) else 1
    if given is not None and given < needed:
        raise ValueError(f"k has {given} budgets but segments go up to {needed - 1}")
    return given or needed


def _per_group(name: str, values: Tensor | None, norms: Tensor) -> Tensor:
    if values is None:
        return torch.ones_like(norms)
    if values.shape != norms.shape:
        raise ValueError(f"{name} must have shape {_shape(norms)}, got {_shape(values)}")
    values = values.detach().to(norms)
    _check_values(name, values, "finite and positive", values > 0)
    return values


def _check_values(name: str, values: Tensor, wanted: str, valid: Tensor) -> None:
    if values.device.type != "cpu":
        return
    wrong = ~(valid & torch.isfinite(values))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must be {wanted}, got {values[place].item()!r} at index {place}")


def _shape(values: Tensor) -> str:
    return str(tuple(values.shape))

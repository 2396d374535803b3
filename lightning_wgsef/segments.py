"""Sums and order within segments: groups that compete for one budget, many budgets in one call.

Everything here is a handful of whole-tensor operations: no Python loop over groups or segments
and, on an accelerator, no synchronisation with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sum ``values`` of shape (m,) within each of ``count`` segments; shape (count,).

    >>> segment_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]), 2)
    tensor([4., 2.])
    """
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(
        0, segments, values
    )


def segment_sizes(segments: Tensor, count: int) -> Tensor:
    """Number of entries of each segment, shape (count,).

    >>> segment_sizes(torch.tensor([0, 1, 0]), 3)
    tensor([2, 1, 0])
    """
    return segment_sum(torch.ones_like(segments), segments, count)


def sort_within(values: Tensor, segments: Tensor, *, descending: bool = False) -> Tensor:
    """Indices that order by segment first, by value second; ties keep the order of the input.

    >>> sort_within(torch.tensor([3.0, 9.0, 1.0]), torch.tensor([0, 1, 0])).tolist()
    [2, 0, 1]
    """
    order = values.argsort(stable=True, descending=descending)
    return order[segments[order].argsort(stable=True)]


def first_positions(sizes: Tensor) -> Tensor:
    """Position at which each segment starts in an order made by `sort_within`.

    >>> first_positions(torch.tensor([2, 1, 3])).tolist()
    [0, 2, 3]
    """
    return sizes.cumsum(0) - sizes


def cumulative_sum_within(values: Tensor, order: Tensor, segments: Tensor, sizes: Tensor) -> Tensor:
    """Running sum of ``values[order]`` that restarts in every segment; shape (m,), in that order.

    >>> order = torch.tensor([2, 0, 1])
    >>> cumulative_sum_within(
    ...     torch.tensor([3.0, 9.0, 1.0]), order, torch.tensor([0, 1, 0]), torch.tensor([2, 1])
    ... )
    tensor([1., 4., 9.])
    """
    ordered = values[order]
    running = ordered.cumsum(0)
    before = (running - ordered)[first_positions(sizes).clamp(max=len(order) - 1)]
    return running - before[segments[order]]

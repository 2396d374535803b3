r"""The root that spends a budget: bracketed Newton on a piecewise linear function.

For every row, :math:`g(\rho) = \sum_j c_j\, \mathrm{clip}(\rho\, s_j - o_j, 0, 1)` with slopes
:math:`s_j \ge 0` and offsets :math:`o_j \ge 0` is continuous, piecewise linear and non-decreasing.
Newton's step is exact once it starts on the root's own piece; where it leaves the bracket, or does
not at least halve the previous step, the bracket is halved instead, on the scale of exponents,
since norms may span any number of orders of magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 64
"""20,000 random problems took 40 at most; on an accelerator, where nobody looks, all are made."""


def root_of_budget(
    slopes: Tensor,
    offsets: Tensor,
    costs: Tensor | None,
    budgets: Tensor,
    start: Tensor,
    out_of_reach: Tensor,
) -> Tensor:
    r"""The :math:`\rho` with :math:`g(\rho) = K` in every row.

    Args:
        slopes: :math:`s_j`, shape (S, n); 0 for a group that is zero.
        offsets: :math:`o_j`, shape (S, n) or (S, 1).
        costs: :math:`c_j`, shape (S, n); None: 1.
        budgets: K, shape (S, 1).
        start: where to start looking, shape (S, 1).
        out_of_reach: rows whose sum does not exceed K anywhere, shape (S, 1); not waited for.

    Returns:
        Shape (S, 1); some positive number in rows that are out of reach.

    >>> slopes, offsets = torch.tensor([[4.0, 2.0, 1.0]]), torch.zeros(1, 1)
    >>> start, never = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    >>> budgets = torch.tensor([[2.0]])
    >>> root_of_budget(slopes, offsets, None, budgets, start, never)  # shares 1, 2/3, 1/3
    tensor([[0.3333]])
    """
    numbers = torch.finfo(slopes.dtype)
    largest = numbers.max / 4
    priced = slopes if costs is None else slopes * costs
    root = start.nan_to_num(1.0, largest, 1.0).clamp(numbers.tiny, largest)
    low, high = torch.zeros_like(root), torch.full_like(root, largest)
    previous = torch.full_like(root, 2.0)
    done, negative, tolerance = out_of_reach, -offsets, 8 * numbers.eps * budgets
    for _ in range(ROUNDS):
        unclipped = torch.addcmul(negative, slopes, root)
        shares = unclipped.clamp(0, 1)
        slope = ((shares == unclipped) * priced).sum(1, True)
        excess = (shares if costs is None else shares * costs).sum(1, True) - budgets
        below = excess <= 0
        low, high = torch.where(below, root, low), torch.where(below, high, root)
        newton = root - excess / slope
        step = (newton - root).abs() / torch.maximum(newton, root)
        middle = _middle(low, high)
        trusted = (newton > low) & (newton < high) & (step <= 0.5 * previous)
        previous = torch.where(trusted, step, 2.0)
        done = done | (step <= 2 * numbers.eps) | (excess.abs() <= tolerance) | (middle == low)
        root = torch.where(done, root, torch.where(trusted, newton, middle))
        if root.device.type == "cpu" and bool(done.all()):
            break
    return root


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """Between two positive numbers, halfway on the scale of their exponents."""
    whole = torch.int64 if low.dtype == torch.float64 else torch.int32
    first, last = low.view(whole), high.view(whole)
    return (first + (last - first).div_(2, rounding_mode="floor")).view(low.dtype)

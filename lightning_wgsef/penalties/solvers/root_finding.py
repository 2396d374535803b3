r"""Root finding for the multiplier that spends a budget: of a piecewise linear function.

For every row, :math:`g(\rho) = \sum_j c_j\, \mathrm{clip}(\rho\, s_j - o_j, 0, 1)` with slopes
:math:`s_j \ge 0` and offsets :math:`o_j \ge 0` is continuous, piecewise linear and non-decreasing.

**Newton** (`root_of_budget`) is exact once it starts on the root's own piece; where it leaves the
bracket, or does not at least halve the previous step, the bracket is halved instead, on the scale
of exponents, since norms may span any number of orders of magnitude. It needs few rounds, and
somebody who looks when they are enough.

**By rank** (`root_by_rank`), for accelerators, where nobody may look: the breakpoints in order,
many of them tried at once, leave the two between which the root lies in a number of rounds that is
known beforehand. Between them g is a line.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 20,000 random problems took 40 at most.
ROUNDS = 64

# Breakpoints of a row that are tried at once.
TRIALS = 31

# Numbers that trying them may take in all: of long rows fewer are tried.
_TRIED = 2**22


def root_of_budget(
    slopes: Tensor,
    offsets: Tensor,
    costs: Tensor | None,
    budgets: Tensor,
    start: Tensor,
    out_of_reach: Tensor,
) -> Tensor:
    r"""Find the :math:`\rho` with :math:`g(\rho) = K` in every row.

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
    # Longer than any relative step: the first Newton step inside the bracket is trusted.
    previous = torch.full_like(root, 2.0)
    done, negative, tolerance = out_of_reach, -offsets, 8 * numbers.eps * budgets
    for _ in range(ROUNDS):
        unclipped = torch.addcmul(negative, slopes, root)
        shares = unclipped.clamp(0, 1)
        # What clipping left alone is what still grows with the root.
        slope = ((shares == unclipped) * priced).sum(1, True)
        excess = (shares if costs is None else shares * costs).sum(1, True) - budgets
        below = excess <= 0
        low, high = torch.where(below, root, low), torch.where(below, high, root)
        newton = root - excess / slope  # infinite or NaN where nothing grows: then not trusted
        step = (newton - root).abs() / torch.maximum(newton, root)
        middle = _middle(low, high)
        trusted = (newton > low) & (newton < high) & (step <= 0.5 * previous)
        previous = torch.where(trusted, step, 2.0)
        # Rows that are done stay where they are while others go on; `middle == low`: no number is
        # left between the ends of the bracket.
        done = done | (step <= 2 * numbers.eps) | (excess.abs() <= tolerance) | (middle == low)
        root = torch.where(done, root, torch.where(trusted, newton, middle))
        if bool(done.all()):
            break
    return root


def root_by_rank(slopes: Tensor, offsets: Tensor, costs: Tensor | None, budgets: Tensor) -> Tensor:
    """Find what `root_of_budget` finds, without looking at a value.

    >>> slopes, offsets = torch.tensor([[4.0, 2.0, 1.0]]), torch.zeros(1, 1)
    >>> root_by_rank(slopes, offsets, None, torch.tensor([[2.0]]))  # shares 1, 2/3, 1/3
    tensor([[0.3333]])
    """
    numbers = torch.finfo(slopes.dtype)
    beyond = numbers.max / 4
    # A little apart, so that in spite of rounding shares are 0 and 1 there.
    apart = 4 * numbers.eps
    enters = torch.where(slopes > 0, offsets * (1 - apart) / slopes, beyond).clamp(max=beyond)
    saturates = (1 + offsets) * (1 + apart) / slopes
    saturates = torch.where(slopes > 0, saturates, beyond).clamp(max=beyond)
    # 0 is among them, so that the first spends nothing.
    nothing = torch.zeros_like(budgets)
    points = torch.cat([nothing, enters, saturates], 1).sort(1).values
    last = points.shape[1] - 1
    trials = min(TRIALS, max(1, _TRIED // max(slopes.numel(), 1)))
    number = torch.arange(1, trials + 1, device=slopes.device)

    def spent(roots: Tensor) -> Tensor:
        """Return what the shares at these roots cost, a column each, shape (S, any)."""
        unclipped = torch.addcmul(-offsets.unsqueeze(2), slopes.unsqueeze(2), roots.unsqueeze(1))
        shares = unclipped.clamp_(0, 1)
        return (shares if costs is None else shares.mul_(costs.unsqueeze(2))).sum(1)

    # The last breakpoint that spends no more than the budget is one of `span`, the first at `low`.
    low, span = torch.zeros_like(budgets, dtype=torch.long), last + 1
    # How often depends on their number alone, hence the host can know it.
    while span > 1:
        stride = -(-span // (trials + 1))
        tried = (low + stride * number).clamp(max=last)
        low = low + stride * (spent(points.gather(1, tried)) <= budgets).sum(1, True)
        low, span = low.clamp(max=last), stride
    # Between two breakpoints next to each other the sum is a line: one interpolation is exact.
    ends = points.gather(1, torch.cat([low, (low + 1).clamp(max=last)], 1))
    sums = spent(ends)
    first, following = ends[:, :1], ends[:, 1:]
    rise = sums[:, 1:] - sums[:, :1]
    root = first + (budgets - sums[:, :1]) / rise * (following - first)
    return torch.where(rise > 0, root.clamp(first, following), first)


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """Return the number halfway between two positive ones on the scale of their exponents."""
    # Bits of a positive float, read as an integer, rise with it: their mean is near the geometric
    # one, also where one end is 0 or the product of both would overflow.
    whole = torch.int64 if low.dtype == torch.float64 else torch.int32
    first, last = low.view(whole), high.view(whole)
    return (first + (last - first).div_(2, rounding_mode="floor")).view(low.dtype)

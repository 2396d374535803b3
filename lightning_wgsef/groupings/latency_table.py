r"""Table of latencies: what the modules of a network take by their widths, fitted to some.

A layer that reads a numbers, makes b and needs p operations for it takes

.. math:: t = t_0 + t_1 a + t_2 b + t_3 p, \qquad t_0, .., t_3 \ge 0,

a bilinear form in its widths: starting it, memory, arithmetic. Its coefficients are those nearest
to what was measured at all widths of the table, so that they are no noisier than a mean, and a
narrower layer is never slower. Kernels for blocks of 8 or 16 channels make times a staircase, which
this follows in the mean; the widths that are measured keep to ``multiple_of``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# Of the time of a layer its operations are at least this share, so that no group is free.
_LEAST = 1e-6

ONE, READ, MADE, OPERATIONS = range(4)


def fitted(
    names: Sequence[str], kinds: Sequence[int], values: Tensor, seconds: Tensor, whole: Tensor
) -> Tensor:
    """Return what one unit of every part takes, in seconds, shape (parts,).

    What was measured of modules is fitted first, and then how much of all that, of what depends on
    widths and of what does not, is in the whole passes, which no marks between modules slow down.

    Args:
        names: of every part, what it is a part of.
        kinds: of every part, `ONE`, `READ`, `MADE` or `OPERATIONS`.
        values: of every part at all widths of the table, shape (widths, parts), float64.
        seconds: of what ``names`` lists, in the order in which they come first, (widths, names).
        whole: of the passes, (widths,).

    >>> a = torch.tensor([4.0, 2.0, 1.0]).double()
    >>> values = torch.stack([torch.ones(3).double(), a], 1)
    >>> fitted(["fc"] * 2, [ONE, MADE], values, (3 + 2 * a)[:, None], 6 + 4 * a).round()
    tensor([6., 4.], dtype=torch.float64)
    """
    units = torch.zeros(len(names), dtype=torch.float64)
    for number, name in enumerate(dict.fromkeys(names)):
        own = torch.tensor([x == name for x in names])
        of_kind = [own & (torch.tensor(kinds) == kind) for kind in range(4)]
        columns = torch.stack([values[:, mask].sum(1) for mask in of_kind], 1)
        found = nonnegative(columns, seconds[:, number])
        least = _LEAST * seconds[:, number].mean() / columns[:, OPERATIONS].mean()
        if bool(least.isfinite()):
            found[OPERATIONS] = found[OPERATIONS].clamp(min=float(least))
        for mask, unit in zip(of_kind, found.tolist(), strict=True):
            units[mask] = unit
    fixed = torch.tensor(kinds) == ONE
    sums = torch.stack([values[:, mask] @ units[mask] for mask in (fixed, ~fixed)], 1)
    shares = nonnegative(sums, whole).clamp(min=_LEAST)
    return units * torch.where(fixed, shares[0], shares[1])


def nonnegative(columns: Tensor, times: Tensor) -> Tensor:
    r"""Return the coefficients of least squared relative error that are not negative.

    .. math:: \arg\min_{x \ge 0} \sum_i (1 - \sum_j c_{ij} x_j / t_i)^2

    There are few columns: all sets of them are tried.

    >>> columns = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]).double()
    >>> nonnegative(columns, torch.tensor([3.0, 2.0, 1.0]).double())[1]
    tensor(0., dtype=torch.float64)
    """
    times = times.clamp(min=1e-9)
    scale = columns.abs().amax(0)
    scaled = columns / torch.where(scale > 0, scale, 1) / times[:, None]
    best, least = torch.zeros_like(scale), float(len(times))
    used = (scale > 0).nonzero().flatten().tolist()
    for count in range(1, len(used) + 1):
        for chosen in map(list, itertools.combinations(used, count)):
            found = torch.linalg.lstsq(scaled[:, chosen], torch.ones_like(times)).solution
            error = float((scaled[:, chosen] @ found - 1).square().sum())
            if bool((found >= 0).all()) and error < least - 1e-12:
                best, least = (
                    torch.zeros_like(scale).index_put((torch.tensor(chosen),), found),
                    error,
                )
    return best / torch.where(scale > 0, scale, 1)

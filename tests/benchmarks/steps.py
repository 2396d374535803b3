"""The proximal steps and the floors that several benchmarks measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_wgsef import Groups, prox_multipliers

HOMOTOPY, PAPER = "homotopy (anchored)", "the paper's step"
VARIANTS: dict[str, dict[str, Any]] = {
    HOMOTOPY: {"step": 0.05, "debias": 1.0, "anchored": True},
    PAPER: {"step": 1e-4, "debias": 0.0},
}


def groups_step(groups: Groups, variant: str) -> Callable[[], None]:
    """Norms, multipliers, scaling."""
    settings = VARIANTS[variant]

    def step() -> None:
        norms = groups.norms()
        groups.scale_(prox_multipliers(norms, k=groups.budgets, **settings, **groups.competition))

    return step


def floor(tensors: list[Tensor]) -> Callable[[], None]:
    """Read all weights once and write them once."""

    def read_and_write() -> None:
        torch._foreach_norm(tensors)
        torch._foreach_mul_(tensors, 1.0000001)

    return read_and_write


def prox_by_sorting(
    values: Tensor, step: float, k: float, *, debias: float = 0.0, anchored: bool = False
) -> None:
    """The same step on single weights, in place, the textbook way: sort, prefix sums, bisection.

    As for the projection onto the simplex (Held, Wolfe, Crowder 1974): with the sorted magnitudes
    and their prefix sums the budget that a root spends costs two binary searches.
    """
    magnitudes = values.abs()
    ordered = magnitudes.sort().values
    sums = torch.zeros(len(ordered) + 1, dtype=torch.float64)
    torch.cumsum(ordered, 0, dtype=torch.float64, out=sums[1:])
    width = 1 - debias * step

    def clipped(root: float) -> tuple[int, int, float]:
        first = int(torch.searchsorted(ordered, step / root, right=True))
        full = int(torch.searchsorted(ordered, (step + width) / root))
        return first, full, float(sums[full] - sums[first])

    def spent(root: float) -> float:
        first, full, between = clipped(root)
        return len(ordered) - full + (root * between - step * (full - first)) / width

    low, high = 0.0, 1.0 / float(ordered[-1])
    while spent(high) < k:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) < k else (low, middle)
    first, full, between = clipped(high)
    root = (width * (k - len(ordered) + full) + step * (full - first)) / between

    def factors(of: Tensor) -> Tensor:
        shares = of.mul(root).sub_(step).div_(width).clamp_(0, 1)
        return shares.div_(shares.mul(1 - debias * step).add_(step))

    multipliers = factors(magnitudes)
    if anchored:
        anchor = float(factors(ordered[len(ordered) - int(k)].clone()))
        multipliers.div_(anchor or 1.0).clamp_(max=1)
    values.mul_(multipliers)

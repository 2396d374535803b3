"""Half-space step of HSPG and AdaHSPG+: groups that are about to turn round become zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Chunk
from lightning_wgsef.training.schedules import in_steps
from lightning_wgsef.utils.validation import check_count_or_share


@dataclass(frozen=True)
class HalfSpace:
    r"""Projection of groups that leave their half space, after a warm-up of proximal steps.

    With :math:`\theta` the weights before a step and :math:`\hat\theta` after the optimizer's and
    the proximal step,

    .. math:: \theta^{new}_j = 0 \quad \text{if} \quad
              \langle \hat\theta_j, \theta_j \rangle < \epsilon \|\theta_j\|^2,

    and a group that was zero stays zero (Chen et al., "Half-Space Proximal Stochastic Gradient
    Method for Group-Sparsity Regularized Problem", 2020; Dai et al., AdaHSPG+, 2023).

    Args:
        epsilon: in [0, 1); 0 is the half space itself, larger values project more.
        start: when it begins: steps (int), or a share of training (float in (0, 1]). None: half of
            the way to the step that fixes the mask at the latest; of training where none does.

    Raises:
        ValueError: an argument out of its range.

    >>> HalfSpace().first_step(fixed=40, total=100), HalfSpace().first_step(fixed=None, total=100)
    (20, 50)
    >>> HalfSpace(epsilon=1.0)
    Traceback (most recent call last):
    ...
    ValueError: epsilon must be a number in [0, 1), got 1.0
    """

    epsilon: float = 0.0
    start: int | float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.epsilon, (int, float)) and not isinstance(self.epsilon, bool)
        if not number or not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must be a number in [0, 1), got {self.epsilon!r}")
        if self.start is not None:
            check_count_or_share("start", self.start, "steps")

    def first_step(self, fixed: int | None, total: int | None) -> int:
        """Return after how many steps it begins.

        Args:
            fixed: step that fixes the mask at the latest; None: none does.
            total: how many steps training lasts, if known.

        Raises:
            ValueError: a share of training of unknown length.
        """
        if self.start is None and fixed is not None:
            return fixed // 2
        return in_steps("HalfSpace(start=...)", 0.5 if self.start is None else self.start, total)


def as_half_space(half_space: float | HalfSpace | None) -> HalfSpace | None:
    """Return ``half_space`` as a `HalfSpace`, where a number is its epsilon.

    Raises:
        ValueError: an epsilon outside [0, 1), or something else.

    >>> as_half_space(0.1)
    HalfSpace(epsilon=0.1, start=None)
    """
    if half_space is None or isinstance(half_space, HalfSpace):
        return half_space
    try:
        return HalfSpace(half_space)
    except ValueError:
        raise ValueError(
            f"half_space must be None, an epsilon in [0, 1) or HalfSpace(...), got {half_space!r}"
        ) from None


@torch.no_grad()
def inside_half_space(groups: Groups, before: Mapping[str, Tensor], epsilon: float) -> Tensor:
    """Return 1 for every group that stays in its half space, 0 for the others, shape (m,).

    Args:
        groups: their weights are the trial point.
        before: the parameters before the step, by name.
        epsilon: see `HalfSpace`.
    """
    products, squares = [], []
    for member in groups.layout.members:
        chunk = Chunk(member, None)
        old = member.seen(member.own(before[member.name])).to(groups.dtype)
        trial = member.seen(member.weights).to(groups.dtype)
        products.append(chunk.sum(trial * old))
        squares.append(chunk.sum(old * old))
    square = groups.layout.gathered(squares)
    inside = groups.layout.gathered(products) >= epsilon * square
    return (inside & (square > 0)).to(groups.dtype)

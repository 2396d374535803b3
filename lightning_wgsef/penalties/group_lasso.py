"""Group lasso, which the envelope is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_wgsef.penalties.base import Penalty
from lightning_wgsef.penalties.problem import Competition, Problem
from lightning_wgsef.penalties.segments import Bucket


@dataclass(frozen=True)
class GroupLasso(Penalty):
    r"""The group lasso :math:`\sum_j w_j \|\theta_j\|` (Yuan and Lin 2006).

    Its proximal step shrinks every norm by the same amount, :math:`\tau w_j`, and knows no budget:
    the number of groups that stay depends on lam. With it a plain loop is ProxSGD, and with
    `HalfSpace` it is HSPG. A budget is used only where a mask is fixed at a given step.

    >>> import torch
    >>> GroupLasso().multipliers(torch.tensor([0.5, 4.0]), 1.0, 1)
    tensor([0.0000, 0.7500])
    >>> GroupLasso().value(torch.tensor([0.5, 4.0]), 1)
    tensor([4.5000])
    """

    def _value(self, competition: Competition) -> Tensor:
        r""":math:`\sum_j w_j a_j` in every segment."""
        return competition.total(competition.weighted(competition.norms))

    def _factors(self, problem: Problem, bucket: Bucket, steps: Tensor, debias: float) -> Tensor:
        r""":math:`\max(0, 1 - \tau w_j / a_j)`, and 1 where :math:`a_j` is 0.

        Raises:
            ValueError: a debias other than 0: the group lasso's bias does not come from a ridge.
        """
        if debias:
            raise ValueError(f"debias must be 0 (or None) with GroupLasso(), got {debias!r}")
        competition = problem.competition(bucket)
        shrunk = competition.norms - competition.weighted(steps)
        return (shrunk / competition.norms).clamp(min=0).nan_to_num(1.0)

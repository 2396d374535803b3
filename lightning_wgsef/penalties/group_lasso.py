"""The group lasso, which the envelope is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_wgsef.penalties.problem import Competition, Problem
from lightning_wgsef.penalties.segments import Bucket, Segments
from lightning_wgsef.utils.validation import per_segment


@dataclass(frozen=True)
class GroupLasso:
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

    def value(
        self,
        norms: Tensor,
        k: float | Tensor,
        *,
        weights: Tensor | None = None,
        costs: Tensor | None = None,
        segments: Tensor | int | Segments | None = None,
    ) -> Tensor:
        r""":math:`\sum_j w_j a_j` in every segment, shape (S,)."""

        def value(competition: Competition) -> Tensor:
            return competition.total(competition.weighted(competition.norms))

        return Problem(norms, k, weights, costs, segments).per_segment(value)

    def multipliers(
        self,
        norms: Tensor,
        step: float | Tensor,
        k: float | Tensor,
        *,
        weights: Tensor | None = None,
        costs: Tensor | None = None,
        segments: Tensor | int | Segments | None = None,
        debias: float = 0.0,
    ) -> Tensor:
        r""":math:`\max(0, 1 - \tau w_j / a_j)`, shape (m,): the prox of :math:`\tau` times it.

        Raises:
            ValueError: a wrong shape, dtype or value, or a debias other than 0: the group lasso's
                bias does not come from a ridge.
        """
        if debias:
            raise ValueError(f"debias must be 0 (or None) with GroupLasso(), got {debias!r}")
        problem = Problem(norms, k, weights, costs, segments)
        steps = per_segment("step", step, problem.segments.count, problem.budgets)

        def multipliers(bucket: Bucket) -> Tensor:
            competition = problem.competition(bucket)
            shrunk = competition.norms - competition.weighted(bucket.column(steps))
            return (shrunk / competition.norms).clamp(min=0).nan_to_num(1.0)

        return problem.per_group(multipliers)

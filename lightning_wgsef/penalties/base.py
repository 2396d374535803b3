"""Penalty: what is added to the loss, by its value and its proximal step."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_wgsef.penalties.problem import Competition, Problem
from lightning_wgsef.penalties.segments import Bucket, Segments
from lightning_wgsef.utils.validation import check_number, per_segment


class Penalty(ABC):
    """A penalty whose proximal step scales every group by one number.

    A subclass gives `_value` and `_factors`, which see checked arguments, one segment a row. An
    object with `value` and `multipliers` of its own serves as well.
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
        """Return the penalty of every segment, shape (S,); arguments as in `envelope_value`.

        Raises:
            ValueError: a wrong shape, dtype or value; the message names the argument.
        """
        return Problem(norms, k, weights, costs, segments).per_segment(self._value)

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
        """Return the factor of every group, shape (m,); arguments as in `prox_multipliers`.

        Raises:
            ValueError: a wrong shape, dtype or value; the message names the argument.
        """
        problem = Problem(norms, k, weights, costs, segments)
        check_number("debias", debias, highest=1.0)
        steps = per_segment("step", step, problem.segments.count, problem.budgets)
        return problem.per_group(
            lambda bucket: self._factors(problem, bucket, bucket.column(steps), debias)
        )

    @abstractmethod
    def _value(self, competition: Competition) -> Tensor:
        """Return the penalty of every segment as a column, shape (S, 1)."""

    @abstractmethod
    def _factors(self, problem: Problem, bucket: Bucket, steps: Tensor, debias: float) -> Tensor:
        """Return the factors in the segments of ``bucket``, shape (rows, width).

        Args:
            problem: the groups and their budgets.
            bucket: which segments.
            steps: the step size of every row, shape (rows, 1).
            debias: the share of the ridge in the penalty that is taken back.
        """

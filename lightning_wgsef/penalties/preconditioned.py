r"""Proximal step in a diagonal metric, such as the one that Adam steps in.

.. math:: \theta = \arg\min_\theta \tfrac12 \sum_i D_i (\theta_i - v_i)^2
          + \tau \big( E(\theta) - \gamma\, \tfrac12 \sum_j w_j \|\theta_j\|^2 \big),
          \qquad D_i > \gamma \tau w_j.

With :math:`t_j = \tau w_j` and :math:`x_i(u) = (D_i - \gamma t_j)\, u + t_j`, minimising over
:math:`\theta` for fixed shares u (see `envelope`) gives :math:`\theta_i = v_i D_i u_j / x_i(u_j)`.
What is left is convex and separable in u but for the budget, whose multiplier :math:`\mu` gives,
with :math:`h_j(u) = \tfrac12 t_j \sum_{i \in j} D_i^2 v_i^2 / x_i(u)^2` (decreasing),

.. math:: u_j = 0 \text{ if } h_j(0) \le \mu c_j, \quad 1 \text{ if } h_j(1) \ge \mu c_j, \quad
          h_j(u_j) = \mu c_j \text{ otherwise}, \qquad \sum_j c_j u_j = K.

**Why the root is unique.** Every :math:`h_j` is positive and strictly decreasing, so that each
:math:`u_j`, and with it :math:`\sum c_j u_j`, falls continuously in :math:`\mu`.

**How it is found.** :math:`\varphi_j(u) = (\sum_{i \in j} D_i^2 v_i^2 / x_i(u)^2)^{-1/2}` is a
power mean (exponent -2) of affine functions of u, hence concave and increasing, and linear where D
is constant in the group: the classical reformulation of a trust region's secular equation (Moré and
Sorensen 1983). The conditions say :math:`\varphi_j(u_j) = \rho \sqrt{w_j / c_j}`, clipped. Each
round replaces every :math:`\varphi_j` by its tangent, which turns the problem into that of
`prox_multipliers`, solved exactly. A tangent lies above the curve, so that from the first round on
:math:`\rho` is at least the root, and it falls: at the new shares each curve lies below its old
tangent, the next tangents ask for more than the budget at the same :math:`\rho`. A falling bounded
sequence of Newton's kind: from every start it converges, in the end quadratically. In a metric that
is constant within groups one round is exact.

The metric prox is this project's; the paper (Refael et al. 2022) excludes Adam.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_wgsef.penalties.problem import Competition, Problem
from lightning_wgsef.penalties.segments import Segments
from lightning_wgsef.utils.validation import check_kind, check_number, per_segment, shape_of

# From shares u, shape (m,), to the sums of (D v / x)^2 and (D v / x)^2 x' / x over every group.
Sums = Callable[[Tensor], tuple[Tensor, Tensor]]

ROUNDS = 40


def prox_metric(
    values: Tensor,
    metric: Tensor,
    index: Tensor,
    step: float | Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    costs: Tensor | None = None,
    segments: Tensor | int | Segments | None = None,
    debias: float = 0.0,
) -> Tensor:
    r"""Return the weights after the envelope's proximal step in the metric D.

    Formula and derivation: this module.

    Args:
        values: the weights v, shape (n,), floating point.
        metric: :math:`D_i > 0`, shape (n,).
        index: the group 0..m-1 of every weight, shape (n,).
        step: :math:`\tau \ge 0`: a number, or shape (S,).
        k: budget K > 0: a number, or shape (S,).
        weights: penalty weights :math:`w_j > 0`, shape (m,).
        costs: :math:`c_j > 0`, shape (m,).
        segments: as in `envelope_value`, for the m groups.
        debias: :math:`\gamma` in [0, 1]; :math:`D_i > \gamma \tau w_j` must hold.

    Returns:
        :math:`\theta`, shape, dtype and device of ``values``.

    Raises:
        ValueError: a wrong shape, dtype or value; the message names the argument.

    >>> values, index = torch.tensor([3.0, 4.0, 1.0]), torch.tensor([0, 0, 1])
    >>> prox_metric(values, torch.ones(3), index, 0.5, 1)  # D = 1: the multipliers 2/3 and 0
    tensor([2.0000, 2.6667, 0.0000])
    >>> prox_metric(values, torch.tensor([1.0, 1.0, 90.0]), index, 0.5, 1)  # a dear weight stays
    tensor([1.8044, 2.4059, 0.9779])
    """
    for name, given in (("values", values), ("metric", metric), ("index", index)):
        check_kind(name, given, Tensor, "a tensor, with one entry for every weight")
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(
            f"values must be floating point of shape (n,), got {values.dtype} of {shape_of(values)}"
        )
    count = _group_count(index, weights, costs, segments)
    _check_index(index, values, count)
    work = torch.float32 if values.device.type == "mps" else torch.float64
    groups = torch.zeros(count, dtype=work, device=values.device)
    v = values.detach().to(work)
    magnitudes = groups.index_add(0, index, v.square())
    if not bool(torch.isfinite(magnitudes).all()):
        raise ValueError("values must be finite, got NaN or infinity, or squares beyond float64")
    problem = Problem(magnitudes.sqrt(), k, weights, costs, segments)
    check_number("debias", debias, highest=1.0)
    steps = per_segment("step", step, problem.segments.count, problem.budgets)
    thresholds = steps[problem.segments.labels().to(steps.device)]
    if problem.weights is not None:
        thresholds = thresholds * problem.weights
    diagonal = _checked_metric(metric, v, debias * thresholds[index])
    reduced = diagonal - debias * thresholds[index]

    def sums(shares: Tensor) -> tuple[Tensor, Tensor]:
        x = reduced * shares[index] + thresholds[index]
        squares = (diagonal * v / x).square()
        return (
            groups.index_add(0, index, squares),
            groups.index_add(0, index, squares * reduced / x),
        )

    shares = metric_shares(problem, sums, torch.ones_like(groups), thresholds)
    shares = shares[index]
    factors = torch.where(
        shares > 0, diagonal * shares / (reduced * shares + thresholds[index]), 0.0
    )
    return (v * factors).to(values.dtype)


def metric_shares(
    problem: Problem,
    sums: Sums,
    start: Tensor,
    thresholds: Tensor,
    *,
    tolerance: float = 1e-10,
    rounds: int = ROUNDS,
) -> Tensor:
    """Find the shares u_j of the metric prox, shape (m,).

    Args:
        problem: the budgets; its norms are not used.
        sums: see `Sums`.
        start: shares to start from, in [0, 1], shape (m,).
        thresholds: t_j, shape (m,).
        tolerance: stop when no share moves by more.
        rounds: the most tangents that are taken; on an accelerator, exactly so many.
    """
    shares = torch.where(thresholds > 0, start, 1)
    for _ in range(rounds):
        squares, slopes = sums(shares)
        following = tangent_shares(problem, squares, slopes, shares)
        moved = (following - shares).abs().max() if len(shares) else shares.sum()
        shares = torch.where(thresholds > 0, following, 1)
        if shares.device.type == "cpu" and float(moved) <= tolerance:
            break
    return shares


def tangent_shares(problem: Problem, squares: Tensor, slopes: Tensor, shares: Tensor) -> Tensor:
    """Find the shares that spend the budgets if every phi_j were its tangent at ``shares``.

    Multiplied by the square root of ``squares`` the tangent's equation reads
    1 + (slopes / squares) (u - shares) = rho z, z = sqrt(squares w / c).
    """
    widths = (slopes / squares).nan_to_num(1.0, 1.0, 1.0).clamp(min=1e-12)
    offsets = (1 - widths * shares).clamp(min=0)
    replaced = problem.with_norms(squares.sqrt())

    def solve(competition: Competition, widths: Tensor, offsets: Tensor) -> Tensor:
        return competition.shares(offsets, widths)

    return replaced.solve(solve, widths, offsets)


def _group_count(
    index: Tensor,
    weights: Tensor | None,
    costs: Tensor | None,
    segments: Tensor | int | Segments | None,
) -> int:
    for values in (weights, costs, segments):
        if isinstance(values, Tensor):
            return len(values)
        if isinstance(values, Segments):
            return values.size
    return int(index.max()) + 1 if len(index) else 0


def _check_index(index: Tensor, values: Tensor, count: int) -> None:
    if index.shape != values.shape or index.is_floating_point() or index.is_complex():
        raise ValueError(
            f"index must be integers of shape {shape_of(values)}, "
            f"got {index.dtype} of {shape_of(index)}"
        )
    if index.device.type == "cpu" and len(index) and int(index.min()) < 0:
        raise ValueError(f"index must be at least 0, got {int(index.min())}")
    if index.device.type == "cpu" and len(index) and int(index.max()) >= count:
        raise ValueError(
            f"index goes up to {int(index.max())}, but weights, costs or segments are of "
            f"{count} groups"
        )


def _checked_metric(metric: Tensor, values: Tensor, least: Tensor) -> Tensor:
    if metric.shape != values.shape:
        raise ValueError(f"metric must have shape {shape_of(values)}, got {shape_of(metric)}")
    diagonal = metric.detach().to(values)
    if diagonal.device.type == "cpu":
        wrong = ~((diagonal > least) & torch.isfinite(diagonal))
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise ValueError(
                "metric must be finite, positive and larger than debias * step * weights "
                f"({float(least[place]):g}), got {float(diagonal[place])!r} at index {place}; "
                "take a smaller step or a smaller debias"
            )
    return diagonal

r"""The weighted group sparse envelope: value, conjugate, sparsity gap and proximal step.

Pure functions of group norms. Groups :math:`j = 1..m` have norms :math:`a_j = \|\theta_j\|_2`,
penalty weights :math:`w_j > 0` and costs :math:`c_j > 0` (1 unless given) and compete inside their
segment for its budget :math:`K` (``k``). The envelope is

.. math:: E(\theta) = \tfrac12 \min_u \Big\{ \sum_j w_j a_j^2 / u_j :
          0 \le u_j \le 1,\ \sum_j c_j u_j \le K \Big\}, \qquad 0/0 = 0,

which for unit costs and integer K is the biconjugate of "half the weighted squared norm if at most
K groups are alive, infinite otherwise". Both E and its proximal step are solved by one number per
segment, the root :math:`\rho` of :math:`\sum_j c_j u_j(\rho) = K`: for a fixed multiplier of the
budget each :math:`u_j` has a closed form, clipped to [0, 1] and non-decreasing in :math:`\rho`, so
the sum is continuous, piecewise linear and non-decreasing; it is 0 at the first breakpoint and the
cost of all live groups at the last, hence the root exists whenever the live groups exceed the
budget, and :math:`u` at the root is unique.

Sources: Refael, Arbel, Huleihel, "Learning (k-Level) Structured Sparse Neural Networks Using Group
Envelope Regularization" (2022, arXiv 2212.12921); Beck, Refael, "Sparse regularization via
bidualization" (2022). Costs, the debiased form and the anchored step are this project's.

Values are checked where that is free (on the CPU); on an accelerator only types and shapes are,
since looking at values would stall the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wgsef.budgets import Competition, check_number, per_segment
from lightning_wgsef.segments import (
    cumulative_sum_within,
    segment_sizes,
    segment_sum,
    sort_within,
)

# debias * step * weight counts as 1 within the rounding of float32 arguments.
_FULL_STEP_SLACK = 6e-8
# Below this the width of the clip drowns in the rounding of the root.
_NARROWEST = 1e-8


def envelope_value(
    norms: Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    costs: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    r"""Value E of the envelope in every segment (Refael et al. 2022; the formula above).

    The minimiser is :math:`u_j = \min(1, \rho\, a_j \sqrt{w_j/c_j})` with :math:`\rho` the root of
    :math:`\sum c_j u_j = K`, or :math:`u_j = 1` for every live group if those fit the budget.

    Args:
        norms: group norms :math:`a_j \ge 0`, shape (m,), floating point.
        k: budget K > 0 in units of cost (groups when costs are 1): a number, or shape (S,).
        weights: penalty weights :math:`w_j > 0`, shape (m,).
        costs: costs :math:`c_j > 0`, shape (m,).
        segments: integers 0..S-1, shape (m,): which groups compete. None: one segment. With a
            number for ``k`` S is read from the largest entry, which on an accelerator waits for it.

    Returns:
        Shape (S,), dtype and device of ``norms``.

    Raises:
        ValueError: a wrong shape, dtype or value; the message names the argument.

    >>> envelope_value(torch.tensor([3.0, 4.0]), 2)  # both groups fit: half the squared norm
    tensor([12.5000])
    >>> envelope_value(torch.tensor([3.0, 4.0]), 1)  # k = 1: half the squared sum of norms
    tensor([24.5000])
    """
    competition = Competition.between(norms, k, weights, costs, segments)
    shares = _envelope_shares(competition)
    live = shares > 0
    squares = competition.weights * competition.norms.square()
    return competition.total(0.5 * torch.where(live, squares / shares, 0)).to(norms.dtype)


def sparsity_gap(
    norms: Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    costs: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    r"""The gap :math:`R = E - \tfrac12\sum_j w_j a_j^2 \ge 0`; 0 exactly when the budget is kept.

    Computed as :math:`\tfrac12\sum_j w_j a_j^2 (1 - u_j)/u_j`, without the cancellation of the
    difference. Arguments, result and errors as in `envelope_value`.

    >>> sparsity_gap(torch.tensor([3.0, 4.0]), 1)
    tensor([12.])
    >>> sparsity_gap(torch.tensor([0.0, 4.0]), 1)
    tensor([0.])
    """
    competition = Competition.between(norms, k, weights, costs, segments)
    shares = _envelope_shares(competition)
    squares = competition.weights * competition.norms.square()
    excess = torch.where(shares > 0, squares * (1 - shares) / shares, 0)
    return competition.total(0.5 * excess).to(norms.dtype)


def envelope_conjugate(
    norms: Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    r"""Conjugate :math:`E^*(y) = \sup_\theta \langle y, \theta\rangle - E(\theta)`, unit costs.

    Half the sum of the K largest :math:`\|y_j\|^2 / w_j` (Beck and Refael 2022); a fractional
    budget adds that fraction of the next one. Arguments, result and errors as in `envelope_value`,
    with the norms :math:`\|y_j\|`.

    >>> envelope_conjugate(torch.tensor([3.0, 4.0, 1.0]), 2)
    tensor([12.5000])
    """
    competition = Competition.between(norms, k, weights, None, segments)
    squares = competition.norms.square() / competition.weights
    order = sort_within(squares, competition.segments, descending=True)
    sizes = segment_sizes(competition.segments, len(competition.budgets))
    rank = cumulative_sum_within(competition.costs, order, competition.segments, sizes) - 1
    ordered_segments = competition.segments[order]
    share = (competition.budgets[ordered_segments] - rank).clamp(0, 1)
    halves = 0.5 * squares[order] * share
    return segment_sum(halves, ordered_segments, len(competition.budgets)).to(norms.dtype)


def prox_multipliers(
    norms: Tensor,
    step: float | Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    costs: Tensor | None = None,
    segments: Tensor | None = None,
    debias: float = 0.0,
    anchored: bool = False,
) -> Tensor:
    r"""The factor by which the proximal step scales every group: :math:`\theta_j = f_j v_j`.

    .. math:: \theta = \arg\min_\theta \tfrac12\|\theta - v\|^2
              + \tau \big( E(\theta) - \gamma\, \tfrac12 \sum_j w_j \|\theta_j\|^2 \big)

    With :math:`t_j = \tau w_j`, minimising over :math:`\theta` for fixed u gives
    :math:`f_j = u_j / ((1 - \gamma t_j) u_j + t_j)`, and the multiplier of the budget gives
    :math:`u_j = \mathrm{clip}\big((\rho\, a_j \sqrt{w_j/c_j} - t_j) / (1 - \gamma t_j), 0, 1\big)`
    (all live groups 1 if they fit). Groups with :math:`u_j = 0` become exactly zero.

    Where :math:`\gamma t_j = 1` for all live groups of a segment, u jumps from 0 to 1: in order of
    :math:`a_j \sqrt{w_j/c_j}` (ties: lower index first) groups are kept while their costs fit the
    budget, the others become zero. For :math:`\gamma = 1` this is the exact projection: what it
    keeps is untouched.

    ``anchored`` divides by the factor of the last group that fits the budget in that order and cuts
    at 1, so that the K strongest groups are untouched at every step size while the others shrink
    relative to them: where norms are nearly equal the exact step shrinks winners and losers alike.

    Args:
        norms: group norms :math:`a_j \ge 0` of v, shape (m,), floating point.
        step: :math:`\tau \ge 0`, learning rate times lam: a number, or shape (S,).
        k: budget K > 0: a number, or shape (S,).
        weights: :math:`w_j > 0`, shape (m,).
        costs: :math:`c_j > 0`, shape (m,).
        segments: as in `envelope_value`.
        debias: :math:`\gamma` in [0, 1]: 0 is the paper's form, 1 leaves the survivors unbiased.
            :math:`\gamma \tau w_j` must not exceed 1.
        anchored: see above.

    Returns:
        Factors in [0, 1], shape (m,), dtype and device of ``norms``.

    Raises:
        ValueError: a wrong shape, dtype or value; the message names the argument.

    >>> prox_multipliers(torch.tensor([3.0, 4.0]), 1.0, 2)  # the budget is kept: plain ridge
    tensor([0.5000, 0.5000])
    >>> prox_multipliers(torch.tensor([0.5, 4.0]), 0.5, 1)  # the weak group dies, u = (0, 1)
    tensor([0.0000, 0.6667])
    >>> prox_multipliers(torch.tensor([3.0, 4.0]), 1.0, 1, debias=1.0)  # projection
    tensor([0., 1.])
    """
    competition = Competition.between(norms, k, weights, costs, segments)
    check_number("debias", debias, highest=1.0)
    steps = per_segment("step", step, len(competition.budgets), competition.norms)
    thresholds = competition.spread(steps) * competition.weights
    _check_debiased_step(thresholds, debias)
    if not len(norms):
        return norms.clone()
    widths = (1 - debias * thresholds).clamp(min=_NARROWEST)  # 0 is handled below
    shares = competition.shares(thresholds, widths)
    # Written so that u = 1 at debias 1 and t = 0 at any debias give exactly 1.
    factors = shares / (shares + thresholds * (1 - debias * shares))
    factors = torch.where(shares > 0, factors, 0)
    factors = torch.where(thresholds > 0, factors, 1)
    if not anchored and debias == 0:
        return factors.to(norms.dtype)
    kept, last = competition.within_budget()
    if anchored:
        anchor = torch.where(last >= 0, factors[last.clamp(min=0)], 1)
        anchor = competition.spread(torch.where(anchor > 0, anchor, 1))
        factors = torch.where(kept, 1, (factors / anchor).clamp(max=1))
        survivors = torch.ones_like(factors)
    else:
        survivors = 1 / (1 + thresholds * (1 - debias))
    partial = (debias * thresholds < 1 - _FULL_STEP_SLACK) & (competition.norms > 0)
    full_step = competition.spread(competition.total(partial.to(thresholds.dtype))) == 0
    return torch.where(full_step, kept * survivors, factors).to(norms.dtype)


def _envelope_shares(competition: Competition) -> Tensor:
    """The minimiser u of the envelope's value: the step's shares at threshold 0 and width 1."""
    nothing = torch.zeros_like(competition.norms)
    return competition.shares(nothing, torch.ones_like(nothing))


def _check_debiased_step(thresholds: Tensor, debias: float) -> None:
    if thresholds.device.type == "cpu" and len(thresholds) and debias > 0:
        worst = debias * thresholds.max().item()
        if worst > 1 + _FULL_STEP_SLACK:
            raise ValueError(
                f"debias * step * weights must not exceed 1 (the exact projection), got {worst:g}; "
                "take a smaller step or a smaller debias"
            )

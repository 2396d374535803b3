r"""Weighted group sparse envelope: value, conjugate, sparsity gap and proximal step.

Pure functions of group norms. Groups :math:`j = 1..m` have norms :math:`a_j = \|\theta_j\|_2`,
penalty weights :math:`w_j > 0` and costs :math:`c_j > 0` (1 unless given) and compete inside their
segment for its budget :math:`K` (``k``).

**Value.** "Half the weighted squared norm if the live groups fit the budget, else infinite" has the
envelope

.. math:: E(\theta) = \tfrac12 \min_u \Big\{ \sum_j w_j a_j^2 / u_j :
          0 \le u_j \le 1,\ \sum_j c_j u_j \le K \Big\}, \qquad 0/0 = 0,

which for unit costs and whole K is the biconjugate (Refael, Arbel, Huleihel, "Learning (k-Level)
Structured Sparse Neural Networks Using Group Envelope Regularization", 2022, arXiv 2212.12921; for
groups of one Beck, Refael, "Sparse regularization via bidualization", 2022). With a multiplier
:math:`\mu` for the budget, :math:`-w_j a_j^2 / (2 u_j^2) + \mu c_j = 0` gives
:math:`u_j = \min(1, \rho\, a_j \sqrt{w_j / c_j})`, where :math:`\rho = (2 \mu)^{-1/2}` is the root
of :math:`\sum c_j u_j = K`, unless all live groups fit (:math:`u_j = 1`).

**Prox.** For :math:`\arg\min_\theta \tfrac12 \|\theta - v\|^2 + \tau E(\theta)` write E with its u
and exchange the minima. For fixed u, with :math:`t_j = \tau w_j`,
:math:`\theta_j = v_j u_j / (u_j + t_j)`, at the cost :math:`\tfrac12 a_j^2 t_j / (u_j + t_j)`, a_j
the norms of v. What is left is convex in u, and
:math:`-\tfrac12 a_j^2 t_j / (u_j + t_j)^2 + \mu c_j = 0` gives
:math:`u_j = \mathrm{clip}(\rho\, a_j \sqrt{t_j / c_j} - t_j, 0, 1)` (for unit costs Refael et al.
2022). In the code :math:`\rho` stands for :math:`\rho \sqrt\tau`. Costs are this project's.

**Debiased prox.** E shrinks the groups that stay, too. Penalise :math:`E - \gamma\, \tfrac12 \sum
w_j a_j^2` instead: for fixed u, :math:`\theta_j = v_j u_j / ((1 - \gamma t_j) u_j + t_j)`, at the
cost :math:`\tfrac12 a_j^2 t_j (1 - \gamma u_j) / ((1 - \gamma t_j) u_j + t_j)`, whose derivative is
:math:`-\tfrac12 a_j^2 t_j / ((1 - \gamma t_j) u_j + t_j)^2`. It rises with u as long as
:math:`\gamma t_j < 1`, so that this is convex, too, and

.. math:: u_j = \mathrm{clip}\Big( \frac{\rho\, a_j \sqrt{t_j / c_j} - t_j}{1 - \gamma t_j},
          0, 1 \Big).

At :math:`\gamma = 1` a group with :math:`u_j = 1` is untouched, and :math:`E - \tfrac12 \sum w_j
a_j^2` is the sparsity gap: a network within its budget pays nothing. This form is this project's.

**Projection limit.** As :math:`\gamma t_j \to 1` the width of the clip goes to 0: u jumps from 0 to
1 at a threshold of :math:`a_j \sqrt{w_j / c_j}`, and for :math:`\gamma = 1` what stays is
untouched: the step becomes the projection onto the budget, which is what is computed there.

**Why the root is unique.** Each :math:`c_j u_j(\rho)` is continuous, piecewise linear and
non-decreasing, 0 at its first breakpoint and :math:`c_j` from its second one on. Their sum is 0 at
the first breakpoint of all and what all live groups cost at the last: if that exceeds K there is a
root, and where the sum is constant at K all roots give the same u. `root_finding` finds it.

**Metric prox.** See `preconditioned`: the same with :math:`\tfrac12 \sum_i D_i (\theta_i - v_i)^2`.

Values are checked where that is free (on the CPU); on an accelerator only types and shapes are,
since looking at values would stall the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wgsef.penalties.base import Penalty
from lightning_wgsef.penalties.problem import PROJECTION_SLACK, Competition, Problem
from lightning_wgsef.penalties.segments import LARGE, Bucket, Segments
from lightning_wgsef.penalties.solvers import sampled_secant, sorting_network
from lightning_wgsef.penalties.solvers.sampled_secant import FULL_STEP_SLACK
from lightning_wgsef.utils.validation import check_number, per_segment


def envelope_value(
    norms: Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    costs: Tensor | None = None,
    segments: Tensor | int | Segments | None = None,
) -> Tensor:
    r"""Return the value E of the envelope in every segment (Refael et al. 2022; the formula above).

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
    return Problem(norms, k, weights, costs, segments).per_segment(_value)


def sparsity_gap(
    norms: Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    costs: Tensor | None = None,
    segments: Tensor | int | Segments | None = None,
) -> Tensor:
    r"""Return the gap :math:`R = E - \tfrac12\sum_j w_j a_j^2 \ge 0`.

    It is 0 exactly when the budget is kept. Computed as
    :math:`\tfrac12\sum_j w_j a_j^2 (1 - u_j)/u_j`, without the cancellation of the difference.
    Arguments, result and errors as in `envelope_value`.

    >>> sparsity_gap(torch.tensor([3.0, 4.0]), 1)
    tensor([12.])
    >>> sparsity_gap(torch.tensor([0.0, 4.0]), 1)
    tensor([0.])
    """
    return Problem(norms, k, weights, costs, segments).per_segment(_gap)


def envelope_conjugate(
    norms: Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    segments: Tensor | int | Segments | None = None,
) -> Tensor:
    r"""Return :math:`E^*(y) = \sup_\theta \langle y, \theta\rangle - E(\theta)`, the conjugate.

    With unit costs: half the sum of the K largest :math:`\|y_j\|^2 / w_j` (Beck and Refael 2022);
    a fractional budget adds that fraction of the next one. Arguments, result and errors as in
    `envelope_value`, with the norms :math:`\|y_j\|`.

    >>> envelope_conjugate(torch.tensor([3.0, 4.0, 1.0]), 2)
    tensor([12.5000])
    """
    return Problem(norms, k, weights, None, segments).per_segment(_conjugate)


def prox_multipliers(
    norms: Tensor,
    step: float | Tensor,
    k: float | Tensor,
    *,
    weights: Tensor | None = None,
    costs: Tensor | None = None,
    segments: Tensor | int | Segments | None = None,
    debias: float = 0.0,
    anchored: bool = False,
) -> Tensor:
    r"""Return the factor by which the proximal step scales every group: :math:`\theta_j = f_j v_j`.

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
    problem = Problem(norms, k, weights, costs, segments)
    check_number("debias", debias, highest=1.0)
    steps = per_segment("step", step, problem.segments.count, problem.budgets)
    return problem.per_group(
        lambda bucket: _multipliers(problem, bucket, bucket.column(steps), debias, anchored)
    )


def _value(competition: Competition) -> Tensor:
    shares = _envelope_shares(competition)
    squares = competition.weighted(competition.norms.square())
    return competition.total(0.5 * torch.where(shares > 0, squares / shares, 0))


def _gap(competition: Competition) -> Tensor:
    shares = _envelope_shares(competition)
    squares = competition.weighted(competition.norms.square())
    return competition.total(0.5 * torch.where(shares > 0, squares * (1 - shares) / shares, 0))


def _conjugate(competition: Competition) -> Tensor:
    squares = competition.norms.square()
    if competition.weights is not None:
        squares = squares / competition.weights
    ordered = squares.sort(dim=1, descending=True).values
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    return competition.total(0.5 * ordered * (competition.budgets - rank).clamp(0, 1))


def _envelope_shares(competition: Competition) -> Tensor:
    """Find the minimiser u of the value: the step's shares at threshold 0 and width 1."""
    nothing = torch.zeros_like(competition.budgets)
    return competition.shares(nothing, torch.ones_like(nothing))


# Below this the width of the clip drowns in the rounding of the root.
_NARROWEST = 1e-8


def _multipliers(
    problem: Problem, bucket: Bucket, steps: Tensor, debias: float, anchored: bool
) -> Tensor:
    """Return what `prox_multipliers` gives for the segments of ``bucket``, one a row.

    Raises:
        ValueError: debias * step * weights exceeds 1.
    """
    special = _special(problem, bucket, steps, debias, anchored)
    if special is not None:
        return special
    return _general(problem.competition(bucket), steps, debias, anchored)


def _general(competition: Competition, steps: Tensor, debias: float, anchored: bool) -> Tensor:
    thresholds = competition.weighted(steps)
    _check_debiased_step(thresholds, debias)
    full = debias * thresholds >= 1 - FULL_STEP_SLACK
    if competition.weights is not None:
        live = competition.norms > 0
        full = (full | ~live).all(1, keepdim=True) & live.any(1, keepdim=True)
    if not competition.on_host or full.any():
        kept, _ = competition.within_budget()
        projection = kept * (1.0 if anchored else 1 / (1 + thresholds * (1 - debias)))
        if competition.on_host and full.all():
            return projection
    widths = (1 - debias * thresholds).clamp(min=_NARROWEST)
    shares = competition.shares(thresholds, widths)
    factors = _factors(shares, thresholds, debias)
    if anchored:
        factors = _anchored(competition, factors)
    if not competition.on_host or full.any():
        factors = torch.where(full, projection, factors)
    return factors


def _special(
    problem: Problem, bucket: Bucket, steps: Tensor, debias: float, anchored: bool
) -> Tensor | None:
    """Solve millions of groups in one segment, or many segments of a few; return None for others.

    Both are solved in the precision of the norms, without a copy of all in float64.
    """
    plain = problem.weights is None and problem.costs is None
    if not plain or problem.norms.device.type != "cpu" or bucket.positions is not None:
        return None
    k, step = float(bucket.column(problem.budgets)[0]), float(steps[0])
    alike = bucket.n_of_m or (problem.budgets.stride(0) == 0 and steps.stride(0) == 0)
    survivor = 1.0 if anchored else 1 / (1 + step * (1 - debias))
    norms = bucket.matrix(problem.norms)
    if bucket.rows == 1 and bucket.width >= LARGE:
        _check_debiased_step(steps, debias)
        return sampled_secant.multipliers(norms[0], step, k, debias=debias, anchored=anchored).view(
            1, -1
        )
    if (
        bucket.rows >= sorting_network.MANY
        and alike
        and step > 0
        and bucket.width <= sorting_network.LONGEST
        and k <= bucket.width
    ):
        work = problem.segments.size
        if debias * step < 1 - FULL_STEP_SLACK:
            return sorting_network.multipliers(
                norms, step, k, debias=debias, anchored=anchored, work=work
            )
        _check_debiased_step(steps, debias)
        kept = math.floor(k * (1 + PROJECTION_SLACK))
        return sorting_network.projection(norms, kept, survivor, work=work)
    return None


def _factors(shares: Tensor, thresholds: Tensor, debias: float) -> Tensor:
    """Return the factors u / ((1 - debias t) u + t), and 1 where t = 0."""
    # Written so that u = 1 at debias 1 gives exactly 1.
    factors = shares / (shares + thresholds * (1 - debias * shares))
    if thresholds.device.type == "cpu" and bool((thresholds > 0).all()):
        return factors
    return torch.where(thresholds > 0, factors, 1)


def _anchored(competition: Competition, factors: Tensor) -> Tensor:
    """Divide by the factor of the last group within the budget and cut at 1."""
    last = competition.last_within_budget()
    anchor = torch.where(last >= 0, factors.gather(1, last.clamp(min=0)), 1)
    # Where nothing is kept, or the exact prox kills the last one, the others stay as they are.
    anchored = (factors / torch.where(anchor > 0, anchor, 1)).clamp_(max=1)
    if competition.weights is None:  # factors rise with strength: what is kept is at 1 already
        return anchored
    return torch.where(competition.within_budget()[0], 1, anchored)


def _check_debiased_step(thresholds: Tensor, debias: float) -> None:
    if thresholds.device.type == "cpu" and debias > 0:
        worst = debias * thresholds.max().item()
        if worst > 1 + FULL_STEP_SLACK:
            raise ValueError(
                f"debias * step * weights must not exceed 1 (the exact projection), got {worst:g}; "
                "take a smaller step or a smaller debias"
            )


@dataclass(frozen=True)
class Envelope(Penalty):
    """The weighted group sparse envelope, see `lightning_wgsef.penalties.envelope`; the default."""

    def _value(self, competition: Competition) -> Tensor:
        return _value(competition)

    def _factors(self, problem: Problem, bucket: Bucket, steps: Tensor, debias: float) -> Tensor:
        return _multipliers(problem, bucket, steps, debias, anchored=False)

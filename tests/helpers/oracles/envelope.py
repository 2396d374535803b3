"""Slow float64 twins of `lightning_wgsef.penalties.envelope`, written from the definitions.

Nothing here sorts, pivots or clips: minimisers are found by listing every way in which the bounds
of the problem can be active, solving the stationarity conditions of each, and keeping the one that
is optimal. `project` and `anchored` are plain loops. `solver_oracle` holds what a general solver
finds.

Notation: n_j >= 0 are the norms of the groups, w_j > 0 their weights, c_j > 0 their costs, K > 0
the budget, tau >= 0 the step and gamma in [0, 1] the debias. `allocation`, `value`, `gap` and
`prox_multipliers` take one problem, arrays of shape (m,), or a batch of them, arrays of shape
(problems, m) with k and step of shape (problems,); a problem with fewer groups is padded with
groups of norm zero. The others take one problem.
"""

import functools
import itertools

import numpy as np

# 80 bits where the machine has them, so that the oracle is more accurate than what it judges.
Real = np.longdouble


def _batch(norms, k, weights, costs, step=0.0, debias=0.0):
    """Everything as `Real` arrays that broadcast against (problems, patterns, groups)."""
    norms = np.atleast_2d(np.asarray(norms, dtype=Real))
    weights, costs = (
        np.broadcast_to(np.asarray(1.0 if x is None else x, dtype=Real), norms.shape)
        for x in (weights, costs)
    )
    k, step, debias = (
        np.broadcast_to(np.asarray(x, dtype=Real), norms.shape[:1])[:, None, None]
        for x in (k, step, debias)
    )
    return norms[:, None], k, weights[:, None], costs[:, None], step, debias


@functools.cache
def _patterns(states, groups):
    """All assignments of a state to each group, shape (1, states**groups, groups)."""
    return np.array(list(itertools.product(range(states), repeat=groups)))[None]


def _solve_in_chunks(solve, states, norms, *others, chunk=100):
    """`solve` for a few problems at a time, and without their padding: the tables stay small."""
    result = np.zeros_like(norms[:, 0])
    # The number of groups up to the last that is alive, at least 1.
    sizes = np.max((norms[:, 0] > 0) * np.arange(1, norms.shape[-1] + 1), axis=-1).clip(min=1)
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        for some in np.split(rows, range(chunk, len(rows), chunk)):
            part = (x[some, :, :size] for x in (norms, *others))
            result[some, :size] = solve(*part, _patterns(states, int(size)))
    return result


def subsets(groups, size):
    """Every subset of range(groups) with at most `size` elements, as tuples."""
    return [
        s for n in range(min(size, groups) + 1) for s in itertools.combinations(range(groups), n)
    ]


def conjugate(norms, k, weights=None):
    """f*(y) = sup { <y, x> - 1/2 sum_j w_j x_j^2 : at most k of the x_j are not zero }.

    For each support (k whole), x_j = y_j / w_j attains the supremum; the supports are listed. With
    k = n + r, 0 < r < 1, E*(y) = sup_x <y, x> - E(x) is the linear programme
    sup { 1/2 sum_j u_j y_j^2 / w_j : 0 <= u_j <= 1, sum_j u_j <= k }, whose vertices are the
    supports of n groups with share 1 and one further group with share r.
    """
    norms = np.asarray(norms, dtype=np.float64)
    weights = np.ones_like(norms) if weights is None else np.asarray(weights, dtype=np.float64)
    x = norms / weights
    gain = norms * x - 0.5 * weights * x**2
    whole = int(k)
    best = 0.0
    for support in subsets(len(norms), whole):
        others = [gain[j] for j in range(len(norms)) if j not in support]
        best = max(best, gain[list(support)].sum() + (k - whole) * max(others, default=0.0))
    return float(best)


def _envelope_objective(norms, weights, u):
    """1/2 sum_j w_j n_j^2 / u_j with 0/0 = 0."""
    live = norms > 0
    with np.errstate(divide="ignore"):
        terms = np.where(live, weights * norms**2 / np.where(live, u, 1), 0)
    return 0.5 * terms.sum(axis=-1)


def allocation(norms, k, weights=None, costs=None):
    """argmin_u { 1/2 sum_j w_j n_j^2 / u_j : 0 <= u_j <= 1, sum_j c_j u_j <= K }.

    u_j = 0 where n_j = 0.

    Lists which u_j are at the bound 1. The others obey w_j n_j^2 / (2 u_j^2) = mu c_j and spend
    what is left of the budget (mu > 0 because n_j > 0). Of the feasible candidates the one with the
    least objective is returned.
    """

    def solve(norms, k, weights, costs, at_one):
        live = norms > 0
        at_one = (at_one == 1) & live
        inside = live & ~at_one
        left = k[..., 0] - np.sum(costs * at_one, axis=-1)
        direction = norms * np.sqrt(weights / costs)  # u_j = scale * direction_j, scale^-2 = 2 mu
        spent_per_scale = np.sum(costs * direction * inside, axis=-1)
        any_inside = inside.any(axis=-1)
        scale = np.where(any_inside, left / np.where(any_inside, spent_per_scale, 1), 0)
        u = np.where(inside, scale[..., None] * direction, at_one)
        room = 1e-14 * k[..., 0]
        feasible = np.where(any_inside, left > room, left >= -room) & (u <= 1 + 1e-14).all(axis=-1)
        # A group that was named at the bound and is dead makes a duplicate, which does no harm.
        objective = np.where(feasible, _envelope_objective(norms, weights, u), np.inf)
        best = objective.argmin(axis=-1)
        assert np.isfinite(objective.min(axis=-1)).all()
        return np.take_along_axis(u, best[:, None, None], axis=1)[:, 0]

    shape = np.shape(norms)
    norms, k, weights, costs, _, _ = _batch(norms, k, weights, costs)
    u = _solve_in_chunks(solve, 2, norms, k, weights, costs)
    return u.reshape(shape).astype(np.float64)


def value(norms, k, weights=None, costs=None):
    """E = min_u { 1/2 sum_j w_j n_j^2 / u_j : 0 <= u_j <= 1, sum_j c_j u_j <= K }, with 0/0 = 0."""
    u = allocation(norms, k, weights, costs)
    norms = np.asarray(norms, dtype=np.float64)
    weights = np.ones_like(norms) if weights is None else np.broadcast_to(weights, norms.shape)
    return _envelope_objective(norms, weights, u)


def gap(norms, k, weights=None, costs=None):
    """R = E - 1/2 sum_j w_j n_j^2."""
    weights_or_one = 1.0 if weights is None else weights
    ridge = 0.5 * np.sum(weights_or_one * np.asarray(norms, dtype=np.float64) ** 2, axis=-1)
    return value(norms, k, weights, costs) - ridge


def prox_multipliers(norms, step, k, weights=None, costs=None, debias=0.0):
    r"""a_j / n_j for the argmin over a >= 0 and u in [0, 1]^m with sum_j c_j u_j <= K of

        1/2 sum_j (a_j - n_j)^2 + tau/2 sum_j w_j a_j^2 / u_j - gamma tau/2 sum_j w_j a_j^2

    (0/0 = 0; convex while gamma tau w_j < 1). By rotation the prox only shortens a group, so norms
    suffice.

    Lists for each u_j whether it is 0, inside (0, 1), or 1. With lambda the multiplier of the
    budget, stationarity is

        in a_j:            a_j - n_j + tau w_j a_j / u_j - gamma tau w_j a_j = 0,
        in u_j, inside:    tau w_j / 2 (a_j / u_j)^2  = lambda c_j,
        in u_j, at 1:      tau w_j / 2  a_j^2        >= lambda c_j,
        in u_j, at 0:      a_j = 0 and n_j^2 / (2 tau w_j) <= lambda c_j.

    The pattern that violates them least is kept, and its violation must be at rounding level.
    Choosing by the violation and not by the objective gives full accuracy: the objective is flat at
    its minimum. Groups of norm zero get multiplier 0.
    """

    def solve(norms, k, weights, costs, step, debias, state):
        live = norms > 0
        zero, inside, full = ((state == i) & live for i in range(3))
        penalty = step * weights
        curvature = 1 - debias * penalty
        # Inside, a_j / u_j = sigma * ratio_j with sigma = sqrt(2 lambda); then u_j is affine in 1 /
        # sigma.
        ratio = np.sqrt(costs / penalty)
        left = k[..., 0] - np.sum(costs * full, axis=-1)
        slope = np.sum(costs * norms / (ratio * curvature) * inside, axis=-1)
        offset = np.sum(costs * penalty / curvature * inside, axis=-1)
        any_inside = inside.any(axis=-1)
        sigma_inside = slope / np.where(any_inside & (left > 0), left + offset, np.inf)
        # Without one inside, sigma may be anything between the bounds of the zeros and of the ones.
        sigma_between = np.max(np.where(zero, norms / (penalty * ratio), 0), axis=-1)
        sigma = np.where(any_inside, sigma_inside, sigma_between)[..., None]
        spread = sigma * ratio
        u_inside = (norms / np.where(inside & (spread > 0), spread, 1) - penalty) / curvature
        a_full = norms / (1 + penalty - debias * penalty)

        rounding = 1e-15 * k[..., 0]
        budget_met = np.where(
            zero.any(axis=-1), np.abs(left) <= rounding, left >= -rounding
        )  # lambda > 0 as soon as a live group is at 0
        admissible = np.where(any_inside, left > 0, budget_met)
        # Dead groups have one pattern only.
        admissible &= ~((state != 0) & ~live).any(axis=-1)
        safe = np.where(live, norms, 1)
        violation = np.maximum.reduce(
            [
                np.where(inside, np.maximum(-u_inside, u_inside - 1), 0),
                np.where(zero, 1 - penalty * spread / safe, 0),
                np.where(full, spread / np.where(live, a_full, 1) - 1, 0),
                np.zeros_like(u_inside),
            ]
        ).max(axis=-1)
        violation = np.where(admissible, violation, np.inf)
        best = violation.argmin(axis=-1)
        assert violation.min(axis=-1).max() < 1e-12, "no pattern satisfies the conditions"
        multipliers = np.where(full, a_full / safe, np.where(inside, u_inside * spread / safe, 0))
        return np.take_along_axis(multipliers, best[:, None, None], axis=1)[:, 0]

    shape = np.shape(norms)
    norms, k, weights, costs, step, debias = _batch(norms, k, weights, costs, step, debias)
    assert (debias * step * weights)[norms > 0].max(initial=0) < 1
    no_step = step[:, 0] == 0  # the prox of the zero function is the identity
    step = np.where(step == 0, 1e-3, step)
    multipliers = _solve_in_chunks(solve, 3, norms, k, weights, costs, step, debias)
    multipliers = np.where(no_step, norms[:, 0] > 0, multipliers)
    return multipliers.reshape(shape).astype(np.float64)


def prox_objective(point, norms, step, k, weights=None, costs=None, debias=0.0):
    """1/2 sum (a_j - n_j)^2 + tau E(a) - gamma tau/2 sum w_j a_j^2 at a = `point`, from `value`."""
    weights_or_one = 1.0 if weights is None else weights
    ridge = 0.5 * np.sum(weights_or_one * point**2, axis=-1)
    distance = 0.5 * np.sum((point - norms) ** 2, axis=-1)
    return distance + step * value(point, k, weights, costs) - debias * step * ridge


def _kept(norms, k, weights=None, costs=None):
    """The groups within the budget, in order of n_j sqrt(w_j / c_j), ties by index."""
    groups = range(len(norms))
    weights = [1.0] * len(norms) if weights is None else weights
    costs = [1.0] * len(norms) if costs is None else costs
    strength = [float(norms[j]) * float(weights[j] / costs[j]) ** 0.5 for j in groups]
    kept, spent = [], 0.0
    for j in sorted(groups, key=lambda j: -strength[j]):
        spent += float(costs[j])
        if norms[j] == 0 or spent > k:
            break
        kept.append(j)
    return kept


def project(norms, k, weights=None, costs=None):
    """1 for the groups within the budget, else 0; the first that does not fit ends the list."""
    multipliers = np.zeros(len(norms))
    for j in _kept(norms, k, weights, costs):
        multipliers[j] = 1.0
    return multipliers


def anchored(multipliers, norms, k, weights=None, costs=None):
    """1 for the groups within the budget, else min(1, f_j / f_last).

    f_last is the multiplier of the last group within the budget.
    Without a group in the budget: unchanged. Where f_last is 0 the quotient has no value: NaN for
    the others.
    """
    kept = _kept(norms, k, weights, costs)
    if not kept:
        return np.array(multipliers, dtype=np.float64)
    last = float(multipliers[kept[-1]])
    result = np.zeros(len(norms))
    for j, multiplier in enumerate(multipliers):
        if j in kept:
            result[j] = 1.0
        else:
            result[j] = min(1.0, multiplier / last) if last > 0 else np.nan
    return result

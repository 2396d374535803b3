"""Slow float64 twins of the envelope that leave the minimum to a general solver.

The argmin of the definition is handed to a conic solver, or to sequential quadratic programming,
as it stands. One problem at a time, of any number of groups; notation as in `oracle`.
"""

import warnings

import cvxpy as cp
import numpy as np
from scipy.optimize import minimize

from tests.helpers.oracles.envelope import conjugate, subsets


def _solve_conic(objective, constraints):
    problem = cp.Problem(cp.Minimize(objective), constraints)
    # Tighter than Clarabel can certify: it then stops where it makes no more progress and calls
    # that inaccurate. The argmin is nearer to the truth than with a tolerance that it reaches; what
    # it is worth is measured in the tests.
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        problem.solve(solver=cp.CLARABEL, **tolerances)
    assert problem.status in {cp.OPTIMAL, cp.OPTIMAL_INACCURATE}, problem.status
    return problem


def _fraction(numerator, denominator):
    """A variable t and the second-order cone t_j >= numerator_j^2 / denominator_j."""
    t = cp.Variable(numerator.shape[0])
    cone = cp.SOC(t + denominator, cp.vstack([2 * numerator, t - denominator]), axis=0)
    return t, cone


def value_conic(norms, k, weights, costs):
    """`value`, its argmin handed to Clarabel."""
    norms = np.asarray(norms, dtype=np.float64)
    scale = norms.max()
    u = cp.Variable(len(norms))
    t, cone = _fraction(cp.Constant(norms / scale), u)
    objective = 0.5 * (weights @ t)
    problem = _solve_conic(objective, [cone, u >= 0, u <= 1, costs @ u <= k])
    return float(problem.value) * scale**2


def prox_conic(norms, step, k, weights, costs, debias=0.0):
    """`prox_multipliers`, its argmin (with the a_j^2 collected: convex) handed to Clarabel."""
    norms = np.asarray(norms, dtype=np.float64)
    scale = norms.max()
    a, u = cp.Variable(len(norms)), cp.Variable(len(norms))
    t, cone = _fraction(a, u)
    curvature = 1 - debias * step * np.asarray(weights)
    quadratic = 0.5 * cp.sum_squares(cp.multiply(np.sqrt(curvature), a))
    objective = quadratic - (norms / scale) @ a + 0.5 * step * (weights @ t)
    _solve_conic(objective, [cone, a >= 0, u >= 0, u <= 1, costs @ u <= k])
    return np.where(norms > 0, a.value * scale / np.where(norms > 0, norms, 1), 0)


def prox_conjugate(point, step, k, weights):
    """argmin_y 1/2 ||y - point||^2 + step f*(y) for whole k.

    f* is the maximum over the supports that `conjugate` lists:

    min_{y, h} 1/2 ||y - point||^2 + step h subject to h >= 1/2 sum_{j in S} y_j^2 / w_j for every
    support S, by sequential quadratic programming (nearer to the argmin than the conic solver,
    whose objective is flat there).
    """
    groups, scale = len(point), np.abs(point).max()
    target = np.asarray(point, dtype=np.float64) / scale
    supports = [s for s in subsets(groups, int(k)) if len(s) == min(int(k), groups)]
    inverse = np.array([[j in s for j in range(groups)] for s in supports]) / weights
    result = minimize(
        lambda x: 0.5 * np.sum((x[:-1] - target) ** 2) + step * x[-1],
        np.append(target, conjugate(target, int(k), weights)),
        jac=lambda x: np.append(x[:-1] - target, step),
        constraints={
            "type": "ineq",
            "fun": lambda x: x[-1] - 0.5 * inverse @ x[:-1] ** 2,
            "jac": lambda x: np.hstack([-inverse * x[:-1], np.ones((len(inverse), 1))]),
        },
        method="SLSQP",
        options={"ftol": 1e-18, "maxiter": 1000},
    )
    return result.x[:-1] * scale

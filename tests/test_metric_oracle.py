"""The twin of `prox_metric` against what else is known: the twin for D = 1, a solver, its value."""

import cvxpy as cp
import metric_oracle
import numpy as np
import oracle
import pytest
import solver_oracle
from envelope_problems import loguniform
from metric_oracle import objective, random_problems, relative_error, worst_descent

DEBIASES = [0.0, 0.3, 1.0]


def one_problem(seed, debias):
    """Arrays of a problem that a conic solver can solve well: D over three orders of magnitude."""
    rng = np.random.default_rng(2000 + seed)
    groups = int(rng.integers(2, 7))
    index = rng.permutation(np.repeat(np.arange(groups), rng.integers(1, 6, groups)))
    values = rng.normal(size=len(index))
    values[index == 0] *= seed % 3 > 0
    metric = loguniform(rng, 1e-2, 1e1, len(index))
    weights, costs = np.exp(0.5 * rng.normal(size=(2, groups)))
    step = loguniform(rng, 1e-2, 10, 1)[0]
    if debias:
        if seed % 2:
            metric = metric[index]
        weights = np.array([metric[index == j].min() for j in range(groups)])
        step = rng.uniform(0.5, 0.9) * (metric / weights[index]).min() / debias
    return {
        "values": values,
        "metric": metric,
        "index": index,
        "step": step,
        "k": rng.uniform(0.1, 0.9) * costs.sum(),
        "weights": weights,
        "costs": costs,
        "debias": debias,
    }


def solve_conic(values, metric, index, step, k, weights, costs, debias):
    """The argmin over theta and u as it stands, squares collected, in sqrt(D - gamma t) theta."""
    root = np.sqrt(metric - debias * step * weights[index])
    target = metric * values / root
    scale = np.abs(target).max()
    y, u = cp.Variable(len(values)), cp.Variable(len(weights))
    theta = cp.multiply(np.sqrt(step * weights[index]) / root, y)
    fractions = [cp.quad_over_lin(theta[index == j], u[j]) for j in range(len(weights))]
    objective = cp.sum_squares(y - target / scale) + sum(fractions)
    solver_oracle._solve_conic(0.5 * objective, [u >= 0, u <= 1, costs @ u <= k])
    return scale * y.value / root


@pytest.mark.parametrize("debias", DEBIASES)
def test_metric_of_one_is_the_euclidean_oracle(debias):
    problems = random_problems(np.random.default_rng(31), 150, debias)
    if debias:
        # Without its own metric the step is as near to the limit as before.
        lowest = np.where(problems.exists, problems.metric, np.inf).min(axis=(1, 2), keepdims=True)
        weights = problems.weights / problems.weights.max(axis=1, keepdims=True)
        problems.weights = weights * lowest[..., 0]
        problems.step = problems.step.clip(max=0.999 / debias / problems.weights.max(axis=1))
    problems.metric = np.ones_like(problems.metric)
    want = oracle.prox_multipliers(
        np.sqrt(np.sum(problems.values**2, axis=-1)),
        problems.step,
        problems.k,
        problems.weights,
        problems.costs,
        debias,
    )
    error = relative_error(problems.exact(), want[..., None] * problems.values, problems)
    print(f"worst relative error {error:.1e}")
    assert error <= 1e-9


@pytest.mark.parametrize("debias", DEBIASES)
def test_agrees_with_a_conic_solver(debias):
    worst = deaths = 0.0
    for seed in range(20):
        problem = one_problem(seed, debias)
        weights = problem["weights"]
        got = metric_oracle.prox_metric(**problem)
        want = solve_conic(**problem)
        assert objective(got, **problem) <= objective(want, **problem) + 1e-14
        # The solver's accuracy is that of the whole point in its own variables, and the root of
        # that of the objective.
        root = np.sqrt(problem["metric"] - debias * problem["step"] * weights[problem["index"]])
        worst = max(worst, np.abs(root * (got - want)).max() / np.abs(root * want).max())
        deaths += np.sum((got == 0) & (problem["values"] != 0))
    print(f"worst relative error {worst:.1e}, {deaths:.0f} weights in groups that died")
    assert worst <= 5e-5
    assert deaths > 0


@pytest.mark.parametrize("debias", DEBIASES)
def test_the_objective_is_the_euclidean_one_for_metric_one(debias):
    rng = np.random.default_rng(32)
    for seed in range(20):
        problem = one_problem(seed, debias) | {"metric": 1.0}
        values = problem["values"]
        norms, shorter = (
            np.sqrt(np.bincount(problem["index"], x**2)) for x in (values, 0.7 * values)
        )
        weights = problem["weights"]
        numbers = problem["step"], problem["k"], weights, problem["costs"], debias
        want = oracle.prox_objective(shorter, norms, *numbers)
        assert objective(0.7 * values, **problem) == pytest.approx(want, rel=1e-12)
        factors = rng.uniform(size=(3, 1))
        several = objective(factors * values, **problem)
        singly = [objective(factor * values, **problem) for factor in factors]
        np.testing.assert_allclose(several, singly, rtol=1e-12)


@pytest.mark.parametrize("debias", DEBIASES)
def test_no_perturbation_lowers_the_objective(debias):
    rng = np.random.default_rng(33)
    problems = random_problems(rng, 100, debias)
    theta = problems.exact()
    worst = worst_descent(theta, problems, rng)
    print(f"worst descent {worst:.1e}")
    assert worst <= 1e-14
    # It sees a point that is off by a little: that of another budget.
    problems.k = problems.k * 0.99
    assert worst_descent(problems.exact(), problems, rng) <= 1e-14
    assert worst_descent(theta, problems, rng) > 1e-8


def test_one_problem_is_the_same_as_many():
    problems = random_problems(np.random.default_rng(34), 20, 0.5)
    many = problems.exact()
    for one, rows in zip(problems, many, strict=True):
        theta = metric_oracle.prox_metric(**one.alone())
        np.testing.assert_allclose(one.rows(theta)[0], rows, rtol=1e-12)
    metric = np.array([1.0, 2.0, 0.5])
    arguments = np.array([1.0, -2.0, 0.3]), metric, np.array([1, 0, 1]), 0.1, 1.5
    given = metric_oracle.prox_metric(*arguments, np.ones(2), np.ones(2))
    assert (metric_oracle.prox_metric(*arguments) == given).all()


def test_no_step_is_the_identity():
    problems = random_problems(np.random.default_rng(35), 10)
    problems.step[::2] = 0
    got = problems.exact()
    assert (got[::2] == problems.values[::2]).all()
    assert (got[1::2] != problems.values[1::2]).any()

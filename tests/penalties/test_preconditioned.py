"""The twin of `prox_metric` against what else is known: the twin for D = 1, a solver, its value."""

import functools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch

import lightning_wgsef
from lightning_wgsef import prox_metric, prox_multipliers
from tests.helpers.groups import raises_naming
from tests.helpers.oracles import cvxpy as solver_oracle
from tests.helpers.oracles import envelope as oracle
from tests.helpers.oracles import preconditioned as metric_oracle
from tests.helpers.oracles.preconditioned import (
    objective,
    random_problems,
    relative_error,
    run,
    worst_descent,
)
from tests.helpers.problems import TOLERANCE, loguniform

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


DEBIASES_OF_SHARES = (0.0, 0.0, 0.0, 0.21, 0.5, 0.83, 1.0, 1.0)


@functools.cache
def known(count, seed, debias):
    """Problems and the oracle's answers."""
    problems = random_problems(np.random.default_rng(seed), count, debias)
    return problems, problems.exact()


def check_oracle(env, count=1200, seed=100):
    """Every weight as the oracle has it; what it kills is zero."""
    worst = 0.0
    for number, debias in enumerate(DEBIASES_OF_SHARES):
        problems, want = known(count // len(DEBIASES_OF_SHARES), seed + number, debias)
        got = problems.run(env)
        worst = max(worst, relative_error(got, want, problems))
        assert worst <= TOLERANCE
        assert (got * problems.values >= 0).all()
        assert (np.abs(got) <= np.abs(problems.values) * (1 + 1e-14)).all()
        killed = got[(want == 0) & (problems.values != 0)]
        assert (killed == 0).mean() > 0.99
    return worst


def check_optimality(env, count=240, seed=200):
    """No change of the weights, in dead groups neither, lowers the objective."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in (0.0, 0.4, 1.0):
        problems = random_problems(rng, count // 3, debias)
        worst = max(worst, worst_descent(problems.run(env), problems, rng))
        assert worst <= 1e-13
    return worst


def check_euclidean(env, count=600, seed=300):
    """D = d everywhere is the Euclidean step of size tau / d; all weights of a group alike."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in (0.0, 0.5, 1.0):
        for same in (np.ones(count // 6), loguniform(rng, 1e-4, 1e2, count // 6)):
            problems = random_problems(rng, len(same), debias)
            problems.metric = same[:, None, None] * np.ones_like(problems.metric)
            if debias:
                limit = same / problems.weights.max(axis=1) / debias
                problems.step = rng.uniform(0, 0.999, len(same)) * limit
            flat = {name: torch.as_tensor(x) for name, x in problems.flat().items()}
            values, index = flat.pop("values"), flat.pop("index")
            squares = torch.zeros_like(flat["weights"]).index_add_(0, index, values.square())
            flat |= {"step": torch.as_tensor(problems.step / same), "debias": debias}
            del flat["metric"]
            factors = prox_multipliers(squares.sqrt(), **flat)
            want = problems.rows(factors[index] * values)
            worst = max(worst, relative_error(problems.run(env), want, problems))
            assert worst <= TOLERANCE
    return worst


def check_ridge(env, count=200, seed=400):
    """A budget for all groups that are not zero: v D / (D + t (1 - gamma))."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in (0.0, 0.5, 1.0):
        problems = random_problems(rng, count, debias)
        live = (problems.values != 0).any(axis=-1)
        needed = (problems.costs * live).sum(axis=1) * rng.choice([1, 1.5], count)
        problems.k = np.where(needed > 0, needed, 1)
        penalty = (problems.step[:, None] * problems.weights)[..., None]
        want = problems.values / (1 + penalty * (1 - debias) / problems.metric)
        worst = max(worst, relative_error(problems.run(env), want, problems))
        assert worst <= TOLERANCE
    return worst


def check_squared_lasso(env, count=300, seed=500):
    """K = 1 and unit costs: E = 1/2 (sum_j sqrt(w_j) ||theta_j||)^2, which needs no u.

    With s that sum, D (theta - v) - gamma t_j theta + tau s sqrt(w_j) theta / ||theta_j|| = 0 in a
    group that lives, and ||D v|| <= tau s sqrt(w_j) in one that does not.
    """
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in (0.0, 0.5, 1.0):
        problems = random_problems(rng, count // 3, debias, unit_costs=True)
        problems.k = np.ones(len(problems.k))
        theta = problems.run(env)
        roots = np.sqrt(problems.weights)
        norms = np.sqrt((theta**2).sum(axis=-1))
        pull = (problems.step * (roots * norms).sum(axis=1))[:, None] * roots
        force = problems.metric * problems.values
        live = norms > 0
        direction = theta / np.where(live, norms, 1)[..., None]
        penalty = debias * (problems.step[:, None] * problems.weights)[..., None]
        rest = (problems.metric - penalty) * theta + pull[..., None] * direction - force
        size = np.sqrt((force**2).sum(axis=-1))
        error = np.abs(rest).max(axis=-1)[live] / size[live]
        worst = max(worst, float(error.max()))
        assert worst <= TOLERANCE
        assert (size[~live] <= pull[~live] * (1 + TOLERANCE)).all()
    return worst


def check_unchanged(env, count=200, seed=600):
    """No step, bit for bit, also of some segments only; what is zero remains so."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in (0.0, 0.5, 1.0):
        problems = random_problems(rng, count, debias)
        assert (problems.run(env, step=0.0) == problems.values).all()
        step = problems.step * (rng.random(count) < 0.5)
        got = problems.run(env, step=step)
        assert (got[step == 0] == problems.values[step == 0]).all()
        assert (got[problems.values == 0] == 0).all()
        want = np.where(step[:, None, None] > 0, problems.run(env), problems.values)
        worst = max(worst, relative_error(got, want, problems))
        assert worst <= TOLERANCE
    return worst


def check_order(env, count=200, seed=700):
    """The order of weights, and that of groups, do not matter."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in (0.0, 0.6, 1.0):
        problems = random_problems(rng, count, debias)
        want = problems.run(env)
        problems.mix()
        worst = max(worst, relative_error(problems.run(env), want, problems))
        assert worst <= TOLERANCE
    return worst


def check_segments(env, count=1000, seed=800):
    """One call of 1,000 segments is 1,000 calls."""
    problems = random_problems(np.random.default_rng(seed), count, 0.7)
    together = problems.run(env)
    alone = np.zeros_like(together)
    for row, one in enumerate(problems):
        alone[row] = one.rows(run(env, one.alone()))[0]
    worst = relative_error(alone, together, problems)
    assert worst <= TOLERANCE
    return worst


def check_float32(env, count=400, seed=900):
    """float32 in, float32 out: what float64 makes of the same numbers."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in (0.0, 0.5, 0.9, 1.0):
        problems = random_problems(rng, count // 4, debias)
        flat = problems.flat()
        floats = [name for name, x in flat.items() if np.ndim(x) and x.dtype == np.float64]
        narrow = flat | {name: flat[name].astype(np.float32) for name in floats}
        wide = flat | {name: narrow[name].astype(np.float64) for name in floats}
        got, want = run(env, narrow), run(env, wide)
        assert (got.dtype, want.dtype) == (torch.float32, torch.float64)
        worst = max(worst, relative_error(problems.rows(got), problems.rows(want), problems))
        assert worst <= TOLERANCE
    return worst


CHECKS = [
    check_oracle,
    check_optimality,
    check_euclidean,
    check_ridge,
    check_squared_lasso,
    check_unchanged,
    check_order,
    check_segments,
    check_float32,
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees(check, record_property):
    worst = check(lightning_wgsef)
    record_property("worst_error", worst)
    print(f"{check.__name__}: worst error {worst:.1e}")


# ----------------------------------------------------------------------
# By hand.


def test_two_weights_of_one_group_are_a_ridge_in_their_own_metric():
    values, metric = torch.tensor([3.0, -8.0]), torch.tensor([1.0, 3.0])
    got = prox_metric(values, metric, torch.tensor([0, 0]), 1.0, 1)
    torch.testing.assert_close(got, torch.tensor([1.5, -6.0]))
    assert values.tolist() == [3.0, -8.0]


@pytest.mark.parametrize(
    ("metric", "want"),
    [
        ([4.0, 0.5], [8 / 5, 0]),
        ([0.5, 4.0], [0, 8 / 5]),
        ([1.0, 1.0], [2 / 3, 2 / 3]),
        ([4.0, 1.0], [14 / 9, 2 / 9]),
    ],
)
def test_the_metric_decides_which_group_dies(metric, want):
    """K = 1: theta_j = 2 - s / D_j with s = sum_j theta_j, or 0 where 2 D_j <= s."""
    values, metric, want = (torch.tensor(x, dtype=torch.float64) for x in ([2, 2], metric, want))
    got = prox_metric(values, metric, torch.tensor([0, 1]), 1.0, 1)
    torch.testing.assert_close(got, want)
    assert (got == 0).tolist() == (want == 0).tolist()


def test_a_group_may_have_no_weights():
    rng = np.random.default_rng(1000)
    values, metric = (torch.as_tensor(x) for x in (rng.normal(size=6), rng.uniform(1, 9, 6)))
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    want = prox_metric(values, metric, index, 0.5, 1.5)
    given = torch.ones(5, dtype=torch.float64)
    for options in ({"weights": given}, {"costs": given}, {"segments": given.long() * 0}):
        for spread in (index, index + 1, index * 2):
            assert prox_metric(values, metric, spread, 0.5, 1.5, **options).tolist() == (
                pytest.approx(want.tolist(), rel=1e-9, abs=1e-12)
            )
    torch.testing.assert_close(prox_metric(values, metric, index * 3, 0.5, 1.5), want)


ONES = torch.ones(3)
INDEX = torch.tensor([0, 1, 1])


def call(**changed):
    arguments = {"values": torch.tensor([1.0, -2.0, 3.0]), "metric": ONES, "index": INDEX}
    return prox_metric(**(arguments | {"step": 0.5, "k": 1} | changed))


def entry(value, like=ONES):
    """The last is another."""
    return torch.cat([like[:-1], torch.as_tensor([value], dtype=like.dtype)])


def test_what_the_errors_change_is_accepted():
    assert call().shape == (3,)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (-2.5, "-2.5"), (math.nan, "nan"), (math.inf, "inf")]
)
def test_a_metric_that_is_not_positive_and_finite(value, shown):
    with raises_naming("metric", shown):
        call(metric=entry(value))
    with raises_naming("metric", shown):
        call(metric=entry(value).double(), values=torch.zeros(3).double(), step=0.0)


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ({"debias": 1.0}, 0.25),
        ({"debias": 1.0}, 0.5),  # equal is too small
        ({"debias": 0.5}, 0.25),
        ({"debias": 0.5, "weights": torch.tensor([1.0, 3.0])}, 0.75),
        ({"debias": 1.0, "step": torch.tensor([0.5])}, 0.375),
        (
            {
                "debias": 1.0,
                "step": torch.tensor([0.1, 0.5]),
                "k": torch.tensor([1.0, 1.0]),
                "segments": torch.tensor([0, 1]),
            },
            0.25,
        ),
    ],
)
def test_a_metric_that_the_debias_leaves_nothing_of(changed, value):
    assert call(**changed, metric=entry(2.5)).shape == (3,)
    with raises_naming("metric", "debias"):
        call(**changed, metric=entry(value))
    # The other group has a smaller weight, another segment, or none of the debias.
    assert call(**changed | {"debias": 0.0}, metric=entry(value)).shape == (3,)


def test_the_metric_is_compared_with_the_step_of_its_own_group():
    weights, small = torch.tensor([0.1, 1.0]), torch.tensor([0.2, 1.0, 1.0])
    assert call(debias=1.0, weights=weights, metric=small).shape == (3,)
    with raises_naming("metric"):
        call(debias=1.0, weights=weights.flip(0), metric=small)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metric": torch.ones(2)}, ("metric", "(2,)", "(3,)")),
        ({"metric": torch.ones(4)}, ("metric", "(4,)", "(3,)")),
        ({"metric": torch.ones(3, 1)}, ("metric", "(3, 1)")),
        ({"metric": torch.tensor(1.0)}, ("metric", "()")),
        ({"index": INDEX[:2]}, ("index", "(2,)", "(3,)")),
        ({"index": INDEX[None]}, ("index", "(1, 3)")),
        ({"index": INDEX.float()}, ("index", "float32")),
        ({"index": entry(-1, INDEX)}, ("index", "-1")),
        ({"values": torch.tensor([1, 2, 3])}, ("values", "int64")),
        ({"values": torch.ones(3, 1)}, ("values", "(3, 1)")),
        ({"values": torch.tensor(1.0)}, ("values", "()")),
        ({"k": 0}, ("k", "0")),
        ({"k": math.nan}, ("k", "nan")),
        ({"step": -0.25}, ("step", "-0.25")),
        ({"step": math.nan}, ("step", "nan")),
        ({"weights": torch.tensor([1.0, -2.5])}, ("weights", "-2.5")),
        ({"costs": torch.tensor([-2.5, 1.0])}, ("costs", "-2.5")),
        ({"segments": torch.tensor([0, -1])}, ("segments", "-1")),
        ({"segments": torch.tensor([0.0, 0.0])}, ("segments", "float32")),
        ({"debias": -0.25}, ("debias", "-0.25")),
        ({"debias": 1.5}, ("debias", "1.5")),
        ({"debias": math.nan}, ("debias", "nan")),
    ],
)
def test_bad_arguments(changed, words):
    with raises_naming(*words):
        call(**changed)


@pytest.mark.parametrize("name", ["weights", "costs", "segments"])
def test_an_index_beyond_the_groups(name):
    one = torch.zeros(1, dtype=torch.int64) if name == "segments" else torch.ones(1)
    with raises_naming("1"):
        call(**{name: one})

"""The proximal step in a diagonal metric: twin, optimality, and the cases that are known otherwise.

The `check_*` functions take what is under test, anything with a `prox_metric`, so that it can be a
broken one. They return the worst error.
"""

import functools

import numpy as np
import pytest
import torch
from envelope_problems import TOLERANCE, loguniform
from metric_oracle import random_problems, relative_error, run, worst_descent

import lightning_wgsef
from lightning_wgsef import prox_metric, prox_multipliers

DEBIASES = (0.0, 0.0, 0.0, 0.21, 0.5, 0.83, 1.0, 1.0)


@functools.cache
def known(count, seed, debias):
    """Problems and the oracle's answers."""
    problems = random_problems(np.random.default_rng(seed), count, debias)
    return problems, problems.exact()


def check_oracle(env, count=1200, seed=100):
    """Every weight as the oracle has it; what it kills is zero."""
    worst = 0.0
    for number, debias in enumerate(DEBIASES):
        problems, want = known(count // len(DEBIASES), seed + number, debias)
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

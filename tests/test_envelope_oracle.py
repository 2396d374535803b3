"""The envelope's pure functions against an oracle that lists every possible solution.

The `check_*` functions take the module under test, so that `test_planted_faults` can give them a
broken one.
"""

import numpy as np
import oracle
import pytest
from envelope_problems import (
    FLOOR,
    TOLERANCE,
    random_problems,
    random_steps,
    relative_error,
    tensor,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_wgsef import budgets, envelope

# ----------------------------------------------------------------------
# Checkers: AssertionError unless the module agrees with the oracle; they return the worst error.


def check_value(env, count=2000, seed=1):
    """Value and gap."""
    rng = np.random.default_rng(seed)
    problems = random_problems(rng, count, groups=8)
    arguments = (problems.flat(problems.norms), tensor(problems.k))
    value = env.envelope_value(*arguments, **problems.groups()).numpy()
    gap = env.sparsity_gap(*arguments, **problems.groups()).numpy()
    rows = (problems.norms, problems.k, problems.weights, problems.costs)
    want = oracle.value(*rows)
    error = relative_error(value, want)
    assert error <= TOLERANCE
    # The gap is a difference, so its error is measured against the value.
    live = np.maximum(want, 1e-300)
    gap_error = float(np.max(np.abs(gap - oracle.gap(*rows)) / live))
    assert gap_error <= TOLERANCE
    assert (gap >= 0).all()
    fits = (problems.costs * (problems.norms > 0)).sum(axis=1) <= problems.k
    assert (gap[fits] == 0).all()
    return max(error, gap_error)


def check_conjugate(env, count=1000, seed=2):
    """Conjugate: unit costs, whole and fractional budgets."""
    rng = np.random.default_rng(seed)
    problems = random_problems(rng, count, groups=7, unit_costs=True)
    got = env.envelope_conjugate(
        problems.flat(problems.norms), tensor(problems.k), **problems.groups(costs=False)
    )
    want = [oracle.conjugate(norms, k, weights) for norms, k, weights, _, _ in problems]
    error = relative_error(got, want)
    assert error <= TOLERANCE
    return error


def debiases(rng):
    """The paper's form, the gap, and between."""
    return [0.0, 0.0, 1.0, 1.0, *rng.uniform(0, 1, 6)]


def check_prox(env, count=3000, seed=3):
    """Exact prox at every debias."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for debias in debiases(rng):
        problems = random_problems(rng, count // 10)
        step = random_steps(rng, problems.weights, debias)
        got = problems.multipliers(env, tensor(step), debias=debias)
        assert ((got >= 0) & (got <= 1)).all()
        live = problems.norms > 0
        got, want = got[live], problems.exact_multipliers(step, debias)[live]
        worst = max(worst, relative_error(got, want, FLOOR))
        assert worst <= TOLERANCE
        # Sparsity is exact: but for a few on the threshold itself, what the oracle kills is zero.
        assert (got[want == 0] <= 1e-14).all()
        assert (got[want == 0] == 0).mean() > 0.99
    return worst


def check_projection(env, count=2000, seed=4):
    """Debias 1 and step * weight = 1: exactly the projection."""
    rng = np.random.default_rng(seed)
    problems = random_problems(rng, count, unit_weights=True)
    weight = 2.0 ** rng.integers(-3, 4, count)  # powers of two, so that step * weight is exactly 1
    problems.weights = problems.weights * weight[:, None]
    got = problems.multipliers(env, tensor(1 / weight), debias=1.0)
    for norms, k, weights, costs, row in problems:
        want = oracle.project(norms, k, weights, costs)
        live = norms > 0
        assert (got[row, : len(norms)][live] == want[live]).all(), (norms, k, weights, costs)
    return 0.0


def check_anchored(env, count=2000, seed=5):
    """The anchored step, from the oracle's exact prox."""
    rng = np.random.default_rng(seed)
    worst, undefined = 0.0, 0
    for debias in debiases(rng):
        problems = random_problems(rng, count // 10)
        step = random_steps(rng, problems.weights, debias)
        got = problems.multipliers(env, tensor(step), debias=debias, anchored=True)
        exact = problems.exact_multipliers(step, debias)
        for norms, k, weights, costs, row in problems:
            one = slice(len(norms))
            want = oracle.anchored(exact[row, one], norms, k, weights, costs)
            assert ((got[row, one] >= 0) & (got[row, one] <= 1)).all()
            settled = (norms > 0) & ~np.isnan(want)
            undefined += int(np.isnan(want).any())
            error = relative_error(got[row, one][settled], want[settled], FLOOR)
            worst = max(worst, error)
            assert error <= TOLERANCE, (norms, step[row], k, weights, costs, debias)
    assert undefined < 0.1 * count
    return worst


CHECKS = [check_value, check_conjugate, check_prox, check_projection, check_anchored]


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_oracle(check, on_host, record_property, monkeypatch):
    """Where the host may look at values, and the way of accelerators, where it may not."""
    monkeypatch.setattr(budgets.Competition, "on_host", on_host)
    worst = check(envelope)
    record_property("worst_relative_error", worst)
    print(f"{check.__name__}, on host {on_host}: worst relative error {worst:.1e}")
    assert worst <= TOLERANCE


# ----------------------------------------------------------------------
# The same through hypothesis, which looks for the corners.


@st.composite
def one_problem(draw, groups=6):
    size = draw(st.integers(1, groups))

    def array(elements):
        return np.array(draw(st.lists(elements, min_size=size, max_size=size)))

    positive = st.floats(0.1, 10)
    norms = array(st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0]), st.floats(1e-3, 1e3)))
    weights = array(st.one_of(st.just(1.0), positive))
    costs = array(st.one_of(st.just(1.0), positive))
    k = draw(st.one_of(st.integers(1, size), st.floats(0.1, 1.5).map(lambda x: x * costs.sum())))
    debias = draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(0.01, 1)))
    if debias == 0:
        step = draw(st.floats(1e-6, 10))
    else:
        step = min(draw(st.floats(1e-6, 0.999)) / (debias * weights.max()), 10)
    return norms, k, weights, costs, step, debias


fuzz = settings(max_examples=300, deadline=None, database=None, derandomize=True)


@fuzz
@given(one_problem())
def test_fuzzed_value_and_gap(problem):
    norms, k, weights, costs, _, _ = problem
    arguments = {"weights": tensor(weights), "costs": tensor(costs)}
    want = oracle.value(norms, k, weights, costs)
    got = envelope.envelope_value(tensor(norms), k, **arguments)
    assert relative_error(got, [want]) <= TOLERANCE
    got = envelope.sparsity_gap(tensor(norms), k, **arguments)
    assert abs(got.item() - oracle.gap(norms, k, weights, costs)) <= TOLERANCE * want


@fuzz
@given(one_problem())
def test_fuzzed_conjugate(problem):
    norms, k, weights, _, _, _ = problem
    got = envelope.envelope_conjugate(tensor(norms), k, weights=tensor(weights))
    assert relative_error(got, [oracle.conjugate(norms, k, weights)]) <= TOLERANCE


@fuzz
@given(one_problem(), st.booleans())
def test_fuzzed_prox(problem, anchored):
    norms, k, weights, costs, step, debias = problem
    got = envelope.prox_multipliers(
        tensor(norms),
        step,
        k,
        weights=tensor(weights),
        costs=tensor(costs),
        debias=debias,
        anchored=anchored,
    )
    want = oracle.prox_multipliers(norms, step, k, weights, costs, debias)
    if anchored:
        want = oracle.anchored(want, norms, k, weights, costs)
    settled = (norms > 0) & ~np.isnan(want)
    assert ((got >= 0) & (got <= 1)).all()
    assert relative_error(got.numpy()[settled], want[settled], FLOOR) <= TOLERANCE

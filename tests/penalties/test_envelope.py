"""The envelope is the minimum that it is defined as: solvers, optimality conditions, duality.

Coded apart from both the package and the oracle's prox.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_wgsef.penalties import envelope as envelope
from lightning_wgsef.penalties import problem as budgets
from tests.helpers.oracles import cvxpy as solver_oracle
from tests.helpers.oracles import envelope as oracle
from tests.helpers.problems import (
    FLOOR,
    TOLERANCE,
    loguniform,
    random_problems,
    random_steps,
    relative_error,
    tensor,
)

CONIC_PROBLEMS = 60


def conic_problem(seed):
    rng = np.random.default_rng(1000 + seed)
    size = int(rng.integers(20, 41))
    norms = np.exp(rng.normal(size=size))
    norms[rng.random(size) < 0.1 * (seed % 2)] = 0
    weights, costs = np.exp(0.7 * rng.normal(size=(2, size)))
    k = rng.uniform(0.05, 0.9) * costs.sum()
    debias = [0.0, 1.0, rng.uniform()][seed % 3]
    if debias == 0:
        step = loguniform(rng, 1e-3, 3, 1)[0]
    else:
        step = min(rng.uniform(0.02, 0.98) / (debias * weights.max()), 3)
    return norms, step, k, weights, costs, debias


def test_agrees_with_a_conic_solver(record_property):
    value_error = prox_error = 0.0
    for seed in range(CONIC_PROBLEMS):
        norms, step, k, weights, costs, debias = conic_problem(seed)
        arguments = {"weights": tensor(weights), "costs": tensor(costs)}
        got = envelope.envelope_value(tensor(norms), k, **arguments)
        want = solver_oracle.value_conic(norms, k, weights, costs)
        value_error = max(value_error, relative_error(got, [want]))
        got = envelope.prox_multipliers(tensor(norms), step, k, debias=debias, **arguments)
        want = solver_oracle.prox_conic(norms, step, k, weights, costs, debias)
        # The solver's accuracy is that of the whole point, so the largest norm is the measure.
        distance = np.abs(got.numpy() - want) * norms
        prox_error = max(prox_error, float(distance.max() / norms.max()))
    record_property("worst_value_error", value_error)
    record_property("worst_prox_error", prox_error)
    print(f"conic: value {value_error:.1e}, prox {prox_error:.1e}")
    assert value_error <= TOLERANCE
    assert prox_error <= TOLERANCE


def test_oracle_agrees_with_a_conic_solver():
    for seed in range(20):
        norms, step, k, weights, costs, debias = conic_problem(seed)
        norms, weights, costs = norms[:6] + 0.01, weights[:6], costs[:6]
        k = k * costs.sum() / conic_problem(seed)[4].sum()
        want = solver_oracle.value_conic(norms, k, weights, costs)
        assert oracle.value(norms, k, weights, costs) == pytest.approx(want, rel=1e-8)
        got = oracle.prox_multipliers(norms, step, k, weights, costs, debias)
        want = solver_oracle.prox_conic(norms, step, k, weights, costs, debias)
        assert np.abs((got - want) * norms).max() <= TOLERANCE * norms.max()


@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
def test_no_perturbation_lowers_the_objective(debias):
    rng = np.random.default_rng(6)
    for _ in range(60):
        size = int(rng.integers(2, 7))
        norms = np.exp(rng.normal(size=size))
        weights, costs = np.exp(0.5 * rng.normal(size=(2, size)))
        k = rng.uniform(0.1, 1.0) * costs.sum()
        step = loguniform(rng, 1e-2, 0.99, 1)[0] / weights.max()
        multipliers = envelope.prox_multipliers(
            tensor(norms), step, k, weights=tensor(weights), costs=tensor(costs), debias=debias
        )
        point = norms * multipliers.numpy()
        directions = rng.normal(size=(150, size)) * loguniform(rng, 1e-5, 1, (150, 1))
        # Half of them along an axis, which is where a clipped group would gain.
        directions[::2] *= rng.permuted(np.eye(size)[rng.integers(0, size, 75)], axis=1)
        others = np.maximum(point + directions * norms, 0)
        k_many, step_many = np.full(150, k), step

        def objective(points, budget, norms=norms, costs=costs, weights=weights, step=step_many):
            weights, costs = (np.broadcast_to(x, points.shape) for x in (weights, costs))
            return oracle.prox_objective(points, norms, step, budget, weights, costs, debias)

        least = objective(point, k)
        assert (objective(others, k_many) >= least * (1 - 1e-14)).all()


@pytest.mark.parametrize("debias", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("size", [50, 3000])
def test_many_groups_satisfy_the_optimality_conditions(size, debias):
    rng = np.random.default_rng(7)
    norms, weights, costs = np.exp(rng.normal(size=(3, size)) * [[1.0], [0.5], [0.5]])
    k = 0.3 * costs.sum()
    penalty = 0.7 / weights.max() * weights
    f = envelope.prox_multipliers(
        tensor(norms),
        0.7 / weights.max(),
        k,
        weights=tensor(weights),
        costs=tensor(costs),
        debias=debias,
    ).numpy()
    a = f * norms
    # Stationarity in a gives u; that in u gives the multiplier of the budget, one for all groups
    # inside (0, 1).
    u = penalty * a / (norms - (1 - debias * penalty) * a)
    assert (u >= 0).all()
    assert (u <= 1 + 1e-12).all()
    assert (costs * u).sum() == pytest.approx(k, rel=1e-10)
    at_one = u > 1 - 1e-12
    inside = (u > 0) & ~at_one
    assert inside.any()
    assert (u == 0).any()
    rate = (penalty / (2 * costs))[inside] * (a[inside] / u[inside]) ** 2
    np.testing.assert_allclose(rate, np.median(rate), rtol=1e-9)
    multiplier = np.median(rate)
    assert at_one.any()
    assert (penalty * a**2 / (2 * costs) >= multiplier * (1 - 1e-9))[at_one].all()
    assert (norms**2 / (2 * penalty * costs) <= multiplier * (1 + 1e-9))[u == 0].all()


def test_moreau_identity():
    """v = prox_{tau E}(v) + tau prox_{E*/tau}(v / tau)."""
    rng = np.random.default_rng(8)
    for _ in range(40):
        size = int(rng.integers(1, 6))
        k = int(rng.integers(1, size + 1))
        norms, weights = np.exp(rng.normal(size=(2, size)) * 0.7)
        step = loguniform(rng, 0.05, 5, 1)[0]
        multipliers = envelope.prox_multipliers(tensor(norms), step, k, weights=tensor(weights))
        dual = solver_oracle.prox_conjugate(norms / step, 1 / step, k, weights)
        total = norms * multipliers.numpy() + step * dual
        assert np.abs(total - norms).max() <= TOLERANCE * norms.max()


def test_fenchel_young_equality():
    """E(x) + E*(y) = <x, y> at the subgradient y_j = w_j x_j / u_j, and >= elsewhere."""
    rng = np.random.default_rng(9)
    for _ in range(200):
        size = int(rng.integers(1, 7))
        k = int(rng.integers(1, size + 1))
        norms, weights = np.exp(rng.normal(size=(2, size)))
        u = oracle.allocation(norms, k, weights)
        subgradient = weights * norms / u
        for y, equal in ((subgradient, True), (subgradient * np.exp(rng.normal(size=size)), False)):
            value = envelope.envelope_value(tensor(norms), k, weights=tensor(weights)).item()
            conjugate = envelope.envelope_conjugate(tensor(y), k, weights=tensor(weights)).item()
            assert value + conjugate >= (norms @ y) * (1 - 1e-12)
            if equal:
                assert value + conjugate == pytest.approx(norms @ y, rel=1e-9)


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


# ----------------------------------------------------------------------
# Cases with a known answer.


def test_budget_of_one_is_half_the_squared_sum():
    rng = np.random.default_rng(10)
    norms, weights = np.exp(rng.normal(size=(2, 9)))
    got = envelope.envelope_value(tensor(norms), 1, weights=tensor(weights)).item()
    assert got == pytest.approx(0.5 * (np.sqrt(weights) @ norms) ** 2, rel=1e-12)
    conjugate = envelope.envelope_conjugate(tensor(norms), 1, weights=tensor(weights)).item()
    assert conjugate == pytest.approx(0.5 * (norms**2 / weights).max(), rel=1e-12)


@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0, 10.0])
def test_budget_of_one_is_soft_thresholding_by_the_shrunken_sum(step):
    norms = np.exp(np.random.default_rng(11).normal(size=9))
    shrunken = norms * envelope.prox_multipliers(tensor(norms), step, 1).numpy()
    threshold = step * shrunken.sum()
    np.testing.assert_allclose(shrunken, np.maximum(norms - threshold, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [7, 7.0, 9, 1e9])
def test_a_budget_for_all_groups_is_ridge_or_identity(k):
    rng = np.random.default_rng(12)
    norms, weights = np.exp(rng.normal(size=(2, 7)))
    norms[3] = 0
    live = norms > 0
    arguments = {"weights": tensor(weights)}
    value = envelope.envelope_value(tensor(norms), k, **arguments).item()
    assert value == pytest.approx(0.5 * weights @ norms**2, rel=1e-12)
    assert envelope.sparsity_gap(tensor(norms), k, **arguments).item() == 0
    step = 0.9 / weights.max()
    ridge = envelope.prox_multipliers(tensor(norms), step, k, **arguments).numpy()
    np.testing.assert_allclose(ridge[live], 1 / (1 + step * weights[live]), rtol=1e-12)
    same = envelope.prox_multipliers(tensor(norms), step, k, debias=1.0, **arguments).numpy()
    assert (same[live] == 1.0).all()


@pytest.mark.parametrize("k", [0.25, 1, 2.5])
def test_a_single_group(k):
    u, step, weight = min(k, 1), 0.3, 2.0
    arguments = {"weights": tensor([weight])}
    value = envelope.envelope_value(tensor([3.0]), k, **arguments).item()
    assert value == pytest.approx(0.5 * weight * 9 / u, rel=1e-12)
    for debias in (0.0, 0.4, 1.0):
        got = envelope.prox_multipliers(tensor([3.0]), step, k, debias=debias, **arguments).item()
        want = u / ((1 - debias * step * weight) * u + step * weight)
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("debias", [0.0, 0.4, 1.0])
def test_equal_norms_get_equal_multipliers(debias):
    u, step = 3 / 8, 0.3
    got = envelope.prox_multipliers(torch.full((8,), 2.0).double(), step, 3, debias=debias).numpy()
    np.testing.assert_allclose(got, u / ((1 - debias * step) * u + step), rtol=1e-12)
    value = envelope.envelope_value(torch.full((8,), 2.0).double(), 3).item()
    assert value == pytest.approx(0.5 * 8 * 4 / u, rel=1e-12)


# ----------------------------------------------------------------------
# Properties of the operator.


def test_firmly_non_expansive():
    """||Px - Py||^2 <= <Px - Py, x - y> for vectors, groups of three entries."""
    rng = np.random.default_rng(13)
    for _ in range(300):
        groups = int(rng.integers(1, 7))
        weights, costs = np.exp(0.7 * rng.normal(size=(2, groups)))
        k = rng.uniform(0.05, 1) * costs.sum()
        step = loguniform(rng, 1e-3, 10, 1)[0]

        def prox(vectors, step=step, k=k, weights=weights, costs=costs):
            norms = np.linalg.norm(vectors, axis=1)
            multipliers = envelope.prox_multipliers(
                tensor(norms), step, k, weights=tensor(weights), costs=tensor(costs)
            )
            return vectors * multipliers.numpy()[:, None]

        x = rng.normal(size=(groups, 3)) * np.exp(rng.normal(size=(groups, 1)))
        y = x + rng.normal(size=(groups, 3)) * loguniform(rng, 1e-3, 3, 1)[0]
        moved = prox(x) - prox(y)
        assert (moved**2).sum() <= (moved * (x - y)).sum() + 1e-12 * (x**2).sum()


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
def test_permutation_equivariant(debias, anchored):
    rng = np.random.default_rng(14)
    norms, weights, costs = np.exp(rng.normal(size=(3, 60)))
    segments = rng.integers(0, 5, 60)
    segments[:5] = range(5)
    step = 0.8 / weights.max()

    def multipliers(order):
        return envelope.prox_multipliers(
            tensor(norms[order]),
            step,
            4.5,
            weights=tensor(weights[order]),
            costs=tensor(costs[order]),
            segments=torch.as_tensor(segments[order]),
            debias=debias,
            anchored=anchored,
        ).numpy()

    order = rng.permutation(60)
    want = multipliers(np.arange(60))[order]
    np.testing.assert_allclose(multipliers(order), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 0.3, 1e12])
def test_scale_equivariant(scale):
    """E is homogeneous of degree 2, so that the multipliers do not know the scale of the norms."""
    rng = np.random.default_rng(15)
    norms, weights, costs = np.exp(rng.normal(size=(3, 12)))
    groups = {"weights": tensor(weights), "costs": tensor(costs)}
    one, scaled = tensor(norms), tensor(norms * scale)
    for function in (envelope.envelope_value, envelope.sparsity_gap):
        got, want = function(scaled, 4.5, **groups), function(one, 4.5, **groups)
        assert got.item() == pytest.approx(scale**2 * want.item(), rel=1e-12)
    for debias in (0.0, 1.0):
        step = 0.5 / weights.max()
        got = envelope.prox_multipliers(scaled, step, 4.5, debias=debias, **groups)
        want = envelope.prox_multipliers(one, step, 4.5, debias=debias, **groups)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)


def test_only_cost_over_budget_and_step_times_weight_matter():
    rng = np.random.default_rng(16)
    norms, weights, costs = np.exp(rng.normal(size=(3, 12)))
    for debias in (0.0, 0.7):
        want = envelope.prox_multipliers(
            tensor(norms), 0.1, 4.5, weights=tensor(weights), costs=tensor(costs), debias=debias
        )
        other_costs = envelope.prox_multipliers(
            tensor(norms), 0.1, 45, weights=tensor(weights), costs=tensor(10 * costs), debias=debias
        )
        other_weights = envelope.prox_multipliers(
            tensor(norms), 1, 4.5, weights=tensor(weights / 10), costs=tensor(costs), debias=debias
        )
        np.testing.assert_allclose(other_costs, want, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(other_weights, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("debias", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_zero_is_the_identity_bit_for_bit(dtype, debias, anchored):
    rng = np.random.default_rng(17)
    problems = random_problems(rng, 200)
    norms = problems.flat(problems.norms).to(dtype)
    got = envelope.prox_multipliers(
        norms, 0, tensor(problems.k), debias=debias, anchored=anchored, **problems.groups()
    )
    assert got.dtype == dtype
    assert (got[norms > 0] == 1).all()
    assert torch.equal(got * norms, norms)


@pytest.mark.parametrize("step", [0.1, 0.5, 0.99, 0.999999])
def test_debiased_survivors_are_untouched_and_losers_exactly_zero(step):
    rng = np.random.default_rng(18)
    for _ in range(50):
        weights = rng.uniform(0.5, 1, 10)
        weights[0] = 1.0
        norms = np.where(np.arange(10) < 4, 1e3, 1.0) * rng.uniform(1, 2, 10)
        got = envelope.prox_multipliers(
            tensor(norms), step, 4, weights=tensor(weights), debias=1.0
        ).numpy()
        assert (got[:4] == 1.0).all()
        assert (got[4:] == 0.0).all()
        half_more = envelope.prox_multipliers(
            tensor(norms), step, 4.5, weights=tensor(weights), debias=1.0
        ).numpy()
        assert (half_more[:4] == 1.0).all()
        assert (half_more[4:] > 0).any()
        assert (half_more[4:] < 1.0).all()


@pytest.mark.parametrize("weight", [1.0, 0.25, 3.0, 49.0, 0.1, 1e-3])
def test_full_step_keeps_exactly_k(weight):
    """1 / 49 * 49 is not 1 in floating point; the budget is kept all the same."""
    rng = np.random.default_rng(19)
    for size, k in ((1, 1), (10, 3), (10, 10), (257, 64)):
        for norms in (np.exp(rng.normal(size=size)), np.ones(size), rng.integers(1, 3, size)):
            got = envelope.prox_multipliers(
                tensor(norms), 1 / weight, k, weights=tensor([weight] * size), debias=1.0
            ).numpy()
            assert (got == oracle.project(norms, k)).all()
            assert got.sum() == k


def test_full_step_with_mixed_weights_is_the_limit_of_smaller_steps():
    """Where only the largest weight reaches debias * step * weight = 1."""
    rng = np.random.default_rng(26)
    for _ in range(50):
        size = int(rng.integers(2, 7))
        norms, weights = np.exp(rng.normal(size=size)), rng.uniform(0.1, 0.9, size)
        weights[rng.integers(size)] = 1.0
        k = rng.uniform(0.2, 0.9) * size
        got = envelope.prox_multipliers(tensor(norms), 1.0, k, weights=tensor(weights), debias=1.0)
        below = oracle.prox_multipliers(norms, 1 - 1e-9, k, weights, debias=1.0)
        # The limit is approached linearly in the distance, with a factor of the order of the spread
        # of norms.
        np.testing.assert_allclose(got, below, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_full_step_with_partial_debias_is_the_limit_of_smaller_steps(k):
    """At debias * step * weight = 1 the argmin scales the survivors by debias: 1 for 1 only."""
    norms, debias = np.array([2.0, 4.0, 1.0]), 0.5
    below = oracle.prox_multipliers(norms, (1 - 1e-9) / debias, k, debias=debias)
    assert below.max() == pytest.approx(debias)
    got = envelope.prox_multipliers(tensor(norms), 1 / debias, k, debias=debias)
    np.testing.assert_allclose(got, below, rtol=0, atol=1e-6)


def test_dead_groups_have_no_say_in_whether_a_full_step_projects():
    got = envelope.prox_multipliers(
        tensor([2.0, 2.0, 0.0]), 1.0, 1, weights=tensor([1.0, 1.0, 0.5]), debias=1.0
    )
    assert got[:2].tolist() == [1, 0]


def test_full_step_with_a_fractional_budget_keeps_what_fits():
    got = envelope.prox_multipliers(tensor([3.0, 2.0, 1.0]), 1.0, 2.9, debias=1.0)
    assert got.tolist() == [1, 1, 0]
    got = envelope.prox_multipliers(tensor([3.0, 2.0, 1.0]), 1.0, 0.9, debias=1.0)
    assert got.tolist() == [0, 0, 0]


@pytest.mark.parametrize("anchored", [False, True])
def test_ties_are_decided_by_index(anchored):
    norms = tensor([1.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    for _ in range(3):
        got = envelope.prox_multipliers(norms, 1.0, 3, debias=1.0, anchored=anchored)
        assert got.tolist() == [0, 1, 1, 0, 0, 1]


def test_homotopy_leaves_the_strongest_untouched_at_every_step():
    rng = np.random.default_rng(20)
    problems = random_problems(rng, 200, unit_weights=True)
    kept = np.zeros(problems.norms.shape)
    for norms, k, _, costs, row in problems:
        kept[row, : len(norms)] = oracle.project(norms, k, costs=costs)
    live = problems.norms > 0
    steps = [0.0, *np.geomspace(1e-6, 1, 25)]
    path = np.array(
        [problems.multipliers(envelope, step, debias=1.0, anchored=True) for step in steps]
    )
    assert (path[:, kept == 1] == 1.0).all()
    assert (path[0][live] == 1.0).all()
    assert (path[-1][live] == kept[live]).all()


def test_anchored_is_the_exact_prox_where_the_budget_saturates():
    norms = tensor([100.0, 1.0, 90.0, 2.0, 1.5])
    for step in (0.1, 0.5, 0.9):
        exact = envelope.prox_multipliers(norms, step, 2, debias=1.0)
        assert exact[0] == exact[2] == 1
        anchored = envelope.prox_multipliers(norms, step, 2, debias=1.0, anchored=True)
        assert torch.equal(exact, anchored)


def test_anchored_step_where_the_last_group_within_the_budget_is_dead():
    """A heavy penalty may kill a group that is strong by the order of the projection: 0/0, not NaN.

    What the others become is not laid down, but the kept one is untouched and a killed or dead one
    is not revived.
    """
    norms, weights = np.array([1.0, 5.0, 0.0, 0.001]), np.array([100.0, 1.0, 1.0, 1.0])
    exact = oracle.prox_multipliers(norms, 0.1, 1, weights)
    assert exact[0] == exact[3] == 0  # but the strength of the first, 1 * sqrt(100), is the largest
    got = envelope.prox_multipliers(tensor(norms), 0.1, 1, weights=tensor(weights), anchored=True)
    assert ((got >= 0) & (got <= 1)).all()
    assert got[0] == 1
    assert got[3] == 0

"""The envelope is the minimum that it is defined as: solvers, optimality conditions, duality.

Coded apart from both the package and the oracle's prox.
"""

import numpy as np
import oracle
import pytest
import solver_oracle
from envelope_problems import TOLERANCE, loguniform, relative_error, tensor

from lightning_wgsef import envelope

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

"""Known answers in simple cases, and the laws that the proximal step obeys."""

import numpy as np
import pytest
import torch
from envelope_problems import loguniform, random_problems, tensor

from lightning_wgsef import envelope

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

"""Who survives untouched: debiased steps, the full step that projects, the anchored step."""

import numpy as np
import oracle
import pytest
import torch
from envelope_problems import random_problems, tensor

from lightning_wgsef import envelope


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

"""The group lasso against its definition."""

import numpy as np
import pytest
import torch

from lightning_wgsef import (
    WGSEF,
    Constant,
    Envelope,
    GroupLasso,
    Homotopy,
    Warmup,
    WGSEFCallback,
    group_parameters,
)
from tests.helpers.groups import batches, columns, dense_network, raises_naming, train

LASSO = GroupLasso()


def test_multipliers_are_the_argmin():
    """1/2 |x - v|^2 + tau sum_j w_j |x_j| is strongly convex: a change d costs |d|^2 / 2."""
    rng = np.random.default_rng(0)
    for tau in (1e-3, 0.3, 1.0, 7.0):
        v = rng.standard_normal((9, 4)) * np.logspace(-3, 2, 9)[:, None]
        v[4] = 0
        weights = rng.uniform(0.2, 3, 9)

        def objective(x, v=v, weights=weights, tau=tau):
            distance = 0.5 * ((x - v) ** 2).sum(axis=(-2, -1))
            return distance + tau * (np.sqrt((x**2).sum(axis=-1)) * weights).sum(axis=-1)

        norms, more = torch.tensor(v).norm(dim=1), {"weights": torch.tensor(weights)}
        factors = LASSO.multipliers(norms, tau, 1, **more).numpy()
        best = factors[:, None] * v
        size = 10 ** rng.uniform(-4, 1, (3000, 1, 1))
        change = size * rng.standard_normal((3000, 9, 4)) * (rng.random((3000, 9, 1)) < 0.4)
        change[:9] = np.eye(9)[:, :, None] * (v - best)  # back to where it came from
        change[9:18] = -np.eye(9)[:, :, None] * best  # and to zero
        rise = objective(best + change) - objective(best)
        cost = 0.5 * (change**2).sum(axis=(1, 2))
        assert (rise >= cost - 1e-12 * objective(best) - 1e-12 * cost).all()
        assert (factors[norms.numpy() <= tau * weights] == 0).all()
        assert (factors[norms.numpy() > tau * weights] > 0).all()


def test_steps_and_values_of_segments():
    norms = torch.tensor([3.0, 1.0, 0.0, 4.0, 2.0], dtype=torch.float64)
    segments, weights = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1.0, 2.0, 1.0, 0.5, 3.0])
    more = {"segments": segments, "weights": weights}
    steps = torch.tensor([1.0, 0.4])
    factors = LASSO.multipliers(norms, steps, 1, **more)
    torch.testing.assert_close(factors, torch.tensor([2 / 3, 0.2, 0.0, 0.95, 0.4]).double())
    assert LASSO.value(norms, 1, **more).tolist() == [3.0, 2.0 + 2.0 + 6.0]
    assert LASSO.value(norms, 1).tolist() == [10.0]
    assert LASSO.multipliers(norms, 0.0, 1, **more).tolist() == [1.0] * 5
    for k in (1, 2, 5):  # a budget is asked for and not used
        assert torch.equal(LASSO.multipliers(norms, steps, k, **more), factors)


@pytest.mark.parametrize("lam", [2.0, Warmup(4.0, length=10)])
@pytest.mark.parametrize("grouping", ["filter", "channel"])
def test_a_loop_is_proximal_gradient_descent(lam, grouping):
    ours, twin = dense_network(), dense_network()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in (ours, twin)]
    more = {"penalty": LASSO, "freeze": None}
    regularizer = WGSEF(ours, 2, lam, grouping, **more).attach(optimizers[0])
    groups = group_parameters(twin, grouping)
    for number, batch in enumerate(batches(40), start=1):
        train(ours, optimizers[0], [batch])
        train(twin, optimizers[1], [batch])
        norms, rate = groups.norms(), 2.0 if lam == 2.0 else 4.0 * min(1, number / 10)
        groups.scale_((1 - 0.02 * rate / norms).clamp(min=0).nan_to_num(0))
        for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert (groups.norms() == 0).any()
    norms = [part.sum() for part in groups.split(groups.norms()).values()]
    torch.testing.assert_close(regularizer.value(), torch.stack(norms))
    assert regularizer.metrics()["value"].item() == pytest.approx(float(sum(norms)))


def test_the_budget_counts_where_the_mask_is_fixed():
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    regularizer = WGSEF(model, 2, 0.1, penalty=LASSO, freeze=10).attach(optimizer)
    train(model, optimizer, batches(9))
    norms = [weight.detach().norm(dim=0) for weight in columns(model)]
    assert [int((n > 0).sum()) for n in norms] == [5, 6]
    train(model, optimizer, batches(10)[9:])
    assert regularizer.frozen
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [2, 2]


@pytest.mark.parametrize("make", [WGSEFCallback, lambda **more: WGSEF(dense_network(), **more)])
@pytest.mark.parametrize("penalty", ["lasso", 1.0, GroupLasso, Envelope])
def test_what_is_no_penalty(make, penalty):
    """Neither is a class."""
    with raises_naming("penalty must be Envelope() or GroupLasso()", repr(penalty)):
        make(lam=0.1, penalty=penalty)


@pytest.mark.parametrize("make", [WGSEFCallback, lambda **more: WGSEF(dense_network(), **more)])
def test_what_does_not_go_with_it(make):
    for lam in (None, Homotopy(), Homotopy(length=5)):
        with raises_naming("lam must be a number or Warmup", "penalty=GroupLasso()", "Homotopy("):
            make(lam=lam, penalty=LASSO)
    for metric in ("auto", "group"):
        with raises_naming("metric must be 'identity'", "penalty=GroupLasso()", f"'{metric}'"):
            make(lam=0.1, penalty=LASSO, metric=metric)
    with raises_naming("debias 0", "penalty=GroupLasso()", "0.5"):
        make(lam=0.1, penalty=LASSO, debias=0.5)
    with raises_naming("metric must be 'auto', 'group' or 'identity'", "'adam'"):
        make(lam=0.1, metric="adam")
    assert make(lam=Constant(0.1), penalty=LASSO, metric="identity", debias=0)


def test_errors_of_its_functions():
    norms = torch.tensor([3.0, 1.0])
    with raises_naming("debias must be 0", "GroupLasso()", "0.5"):
        LASSO.multipliers(norms, 0.1, 1, debias=0.5)
    with raises_naming("step", "-0.1"):
        LASSO.multipliers(norms, -0.1, 1)
    with raises_naming("weights", "(3,)"):
        LASSO.value(norms, 1, weights=torch.ones(3))
    with raises_naming("norms", "-1.0", "index 1"):
        LASSO.multipliers(torch.tensor([1.0, -1.0]), 0.1, 1)


@pytest.mark.parametrize("penalty", [Envelope(), LASSO], ids=str)
def test_arguments_of_every_penalty_are_checked(penalty):
    norms = torch.tensor([3.0, 4.0])
    for call in (
        penalty.value,
        lambda norms, k, **more: penalty.multipliers(norms, 0.1, k, **more),
    ):
        with raises_naming("k must be", "got 0"):
            call(norms, 0)
        with raises_naming("norms", "-1.0"):
            call(-norms / 3, 1)
        with raises_naming("weights", "(2,)", "(3,)"):
            call(norms, 1, weights=torch.ones(3))
    with raises_naming("step", "-0.1"):
        penalty.multipliers(norms, -0.1, 1)
    with raises_naming("debias", "1.5"):
        penalty.multipliers(norms, 0.1, 1, debias=1.5)

"""One budget for all layers: training in lockstep with slow twins."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from helpers import batches, mlp, raises_naming, train

from lightning_wgsef import WGSEF, GroupLasso, Groups, Homotopy, group_parameters

PRICES = (1.0, 2.0, 1.5, 3.0, 1.0, 2.5, 0.5)
FIRST = (0, 3)  # layers of 3 and 4 groups
every_budget = pytest.mark.parametrize(("budget", "prices"), [(4, (1.0,) * 7), (8, PRICES)])


def network():
    """Layer "4" has a hundredth of the weights that it begins with."""
    torch.manual_seed(0)
    model = mlp(4, 3, 4, 2).double()
    with torch.no_grad():
        model[4].weight *= 0.01
    return model


def norms_of(model):
    parts = [model[i].weight.detach().norm(dim=0) for i in (2, 4)]
    return [part.numpy() for part in parts]


def scale(model, factors):
    with torch.no_grad():
        model[2].weight *= torch.as_tensor(np.asarray(factors[:3], dtype=np.float64))
        model[4].weight *= torch.as_tensor(np.asarray(factors[3:], dtype=np.float64))


def strengths(model, prices):
    """Norms over the root mean square of their layer as it is; without the strongest."""
    rated = np.concatenate([n / np.sqrt((n**2).mean()) for n in norms_of(model)])
    first = [
        start + int(np.argmax(rated[start : start + count] ** 2 / prices[start : start + count]))
        for start, count in zip(FIRST, (3, 4), strict=True)
    ]
    others = rated.copy()
    others[first] = 0
    return others, first


def pair(budget, prices, lam, **more):
    models = network(), network()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    costs = None if set(prices) == {1.0} else torch.tensor(prices)
    regularizer = WGSEF(models[0], budget, lam, scope="global", costs=costs, **more)
    return models, optimizers, regularizer.attach(optimizers[0])


@every_budget
@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lam", [2.0, 30.0])
def test_a_constant_lam(budget, prices, debias, lam):
    """The step of the comparable norms; the strongest of every layer have the share 1.

    The second lam is beyond the largest step that is a proximal one, 1 / debias.
    """
    (ours, twin), optimizers, _ = pair(budget, prices, lam, debias=debias, freeze=None)
    prices, ones, size = np.array(prices), np.ones(7), 0.05 * lam
    size = min(size, 1 / debias) if debias else size
    for batch in batches(15):
        train(ours, optimizers[0], [batch])
        train(twin, optimizers[1], [batch])
        others, first = strengths(twin, prices)
        left = budget - prices[first].sum()
        if debias * size == 1:
            factors = oracle.project(others, left, ones, prices) / (1 + size * (1 - debias))
        else:
            factors = oracle.prox_multipliers(others, size, left, ones, prices, debias)
        factors = np.array(factors, dtype=np.float64)
        factors[first] = 1 / (1 + size * (1 - debias))
        scale(twin, factors)
        for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@every_budget
def test_homotopy(budget, prices):
    """To the end: those that stay in the last step are the mask."""
    schedule = Homotopy(start=1e-2, length=15)
    (ours, twin), optimizers, regularizer = pair(budget, prices, schedule)
    prices, ones = np.array(prices), np.ones(7)
    for number, batch in enumerate(batches(15), start=1):
        train(ours, optimizers[0], [batch])
        train(twin, optimizers[1], [batch])
        others, first = strengths(twin, prices)
        left = budget - prices[first].sum()
        if number < 15:
            exact = oracle.prox_multipliers(
                others, 1e-2 ** (1 - number / 15), left, ones, prices, 1.0
            )
            factors = oracle.anchored(exact, others, left, ones, prices)
        else:
            factors = oracle.project(others, left, ones, prices)
        factors = np.array(factors, dtype=np.float64)
        factors[first] = 1
        scale(twin, factors)
        for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert regularizer.frozen
    alive = np.concatenate(norms_of(twin)) > 0
    assert torch.cat(list(regularizer.masks.values())).tolist() == alive.tolist()
    assert not alive.all()


def test_the_group_lasso_has_no_budget_to_share():
    with raises_naming("scope", "layer", "GroupLasso"):
        WGSEF(network(), 4, 1.0, scope="global", penalty=GroupLasso())


def test_the_strongest_is_so_by_the_weights_of_ones_own():
    """Norms 2, 1, 1 and weights 1, 1, 100: strengths 2, 1, 10."""

    def weighted(model):
        layers = group_parameters(model).layers
        own = torch.tensor([1.0, 1.0, 100.0, 1.0], dtype=torch.float64)
        return Groups([replace(layer, weights=own[: layer.count]) for layer in layers])

    model = network()
    with torch.no_grad():
        for weight in (model[2].weight, model[4].weight):
            weight *= torch.tensor([2.0, 1.0, 1.0, 1.0])[: weight.shape[1]] / weight.norm(dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    more = {"scope": "global", "grouping": weighted}
    regularizer = WGSEF(model, 2, Homotopy(length=1), **more).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [mask.nonzero().flatten().tolist() for mask in regularizer.masks.values()] == [[2], [2]]

"""A budget that falls with a cube: the formula, and gradual magnitude pruning."""

import math

import pytest
import torch
from global_networks import CHANNELS, pictures
from global_networks import loader as random_pictures
from helpers import batches, dense_network, raises_naming, train
from trainers import loader, make_module, make_trainer

from examples.baselines import GradualMagnitude
from lightning_wgsef import WGSEF, CubicRamp, Homotopy, WGSEFCallback

PROJECTING = {"lam": Homotopy(start=1.0, length=10)}


def ramp(least, total, taken, length):
    """Zhu and Gupta 2017, equation 1, in budgets: those after ``taken`` of ``length`` steps."""
    return least + (total - least) * (1 - min(1, taken / length)) ** 3


@pytest.mark.parametrize(
    ("k", "least"), [(2, [2, 2]), (0.5, [3, 3]), ({"2": 1, "3": 0.34}, [1, 2])]
)
@pytest.mark.parametrize("length", [10, 4, 0.5])
def test_groups_left_after_every_step(k, least, length):
    """Rounded up; a layer of 5 groups and one of 6."""
    model = dense_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    budget = CubicRamp(k, length)
    regularizer = WGSEF(model, budget, **PROJECTING, total_steps=20).attach(optimizer)
    (part,) = regularizer.attachments
    steps = length if isinstance(length, int) else 10
    for number, batch in enumerate(batches(12), start=1):
        wanted = [
            math.ceil(ramp(own, total, number, steps))
            for own, total in zip(least, (5, 6), strict=True)
        ]
        assert part.budgets().tolist() == (wanted if number <= 11 else least)
        train(model, optimizer, [batch])
        alive = [int((model[i].weight.norm(dim=0) > 0).sum()) for i in (2, 3)]
        assert alive == wanted
        assert regularizer.frozen == (number >= 10)
    assert alive == least


@pytest.mark.parametrize("grouping", ["filter", "channel", "element"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_is_gradual_magnitude_pruning(grouping, optimizer):
    """Bit for bit: under a homotopy that starts at its end, every step is the projection."""
    networks = []
    for ours in (True, False):
        model = make_module(optimizer=optimizer)
        if ours:
            schedule = Homotopy(start=1.0, length=0.5)
            callback = WGSEFCallback(k=CubicRamp(0.25, 0.5), lam=schedule, grouping=grouping)
        else:
            callback = GradualMagnitude(length=0.5, k=0.25, grouping=grouping)
        make_trainer([callback]).fit(model, loader())
        networks.append(model)
        if ours:
            assert callback.regularizer.frozen
            for layer in callback.regularizer.groups.layers:
                left = int(callback.regularizer.masks[layer.name].sum())
                assert left == layer.budget == int(0.25 * layer.count + 0.5)
    first, second = (network.state_dict() for network in networks)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_costs(scope):
    """Budgets are not rounded then; what is left never costs more."""
    model = dense_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    own = torch.tensor([3.0, 1.0, 2.0, 4.0, 2.0]), torch.tensor([1.0, 2.5, 1.0, 3.0, 1.0, 1.5])
    more = {"costs": torch.cat(own), "scope": scope, **PROJECTING}
    regularizer = WGSEF(model, CubicRamp(0.5, length=10), **more).attach(optimizer)
    (part,) = regularizer.attachments
    totals = [12.0, 10.0] if scope == "layer" else [22.0]
    for number, batch in enumerate(batches(12), start=1):
        wanted = [ramp(total / 2, total, number, 10) for total in totals]
        assert part.budgets().tolist() == pytest.approx(wanted, rel=1e-12)
        train(model, optimizer, [batch])
        spent = [
            float(costs[model[i].weight.detach().norm(dim=0) > 0].sum())
            for i, costs in zip((2, 3), own, strict=True)
        ]
        spent = spent if scope == "layer" else [sum(spent)]
        for least, cost, budget in zip([4.0, 3.0], spent, wanted, strict=False):
            assert budget - least < cost <= budget + 1e-9
    assert regularizer.frozen


def test_flops_of_a_model_under_a_trainer():
    model = pictures()
    ramped = CubicRamp(0.5, length=0.5)
    schedule = Homotopy(start=1.0, length=0.5)
    callback = WGSEFCallback(k=ramped, lam=schedule, costs="flops", scope="global")
    make_trainer([callback]).fit(model, random_pictures())
    groups, masks = callback.regularizer.groups, callback.regularizer.masks
    spent = float(groups.costs[torch.cat(list(masks.values()))].sum())
    assert float(groups.budgets) - float(groups.costs.max()) < spent <= float(groups.budgets)
    assert list(masks) == list(CHANNELS)


def test_with_a_constant_lam_the_mask_is_that_of_the_last_budget():
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    budget = CubicRamp(2, length=8)
    regularizer = WGSEF(model, budget, lam=20.0, freeze=12).attach(optimizer)
    (part,) = regularizer.attachments
    train(model, optimizer, batches(11))
    assert part.budgets().tolist() == [2, 2]
    train(model, optimizer, batches(12)[11:])
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [2, 2]
    assert regularizer.groups.budgets.tolist() == [2, 2]


def test_resume_goes_on_where_the_budget_was():
    def run(data, state=None):
        model = dense_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        regularizer = WGSEF(model, CubicRamp(2, length=10), **PROJECTING).attach(optimizer)
        if state is not None:
            model.load_state_dict(state[0])
            regularizer.load_state_dict(state[1])
        train(model, optimizer, data)
        return model, regularizer

    whole = run(batches(14))[0]
    half = run(batches(14)[:6])
    resumed, regularizer = run(batches(14)[6:], [part.state_dict() for part in half])
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert regularizer.frozen


@pytest.mark.parametrize("length", [0, -3, 1.5, 0.0, "x", True, None])
def test_lengths(length):
    with raises_naming("length must be a number of steps", repr(length)):
        CubicRamp(0.5, length=length)


@pytest.mark.parametrize(
    "make",
    [WGSEFCallback, lambda **more: WGSEF(dense_network(), **more)],
    ids=["callback", "plain"],
)
def test_budgets_that_are_none(make):
    for k in (0, 1.5, -2, "x", True, None):
        with raises_naming("k must be a number of groups", repr(k)):
            make(k=CubicRamp(k))
    with raises_naming("k is an empty mapping"):
        make(k=CubicRamp({}))
    with raises_naming("k['2'] must be a number of groups", "CubicRamp("):
        make(k={"2": CubicRamp(0.5)})
    with raises_naming("k must be one number with scope='global'"):
        make(k=CubicRamp({"2": 1}), scope="global")
    with raises_naming("k must be a number of groups", "CubicRamp"):
        make(k=CubicRamp)


def test_more_than_a_layer_has_and_shares_of_unknown_length():
    with raises_naming("k = 6", "5 groups of layer '2'"):
        WGSEF(dense_network(), CubicRamp(6))
    model = dense_network()
    regularizer = WGSEF(model, CubicRamp(2), lam=0.1, freeze=None)
    with raises_naming("CubicRamp(length=...) = 0.5 is a share of training"):
        regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1))

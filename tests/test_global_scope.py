"""All layers compete for one budget."""

import pytest
import pytorch_lightning as pl
import torch
from global_networks import (
    CHANNELS,
    COSTS,
    FLOPS,
    IMAGES,
    channel_norms,
    expected,
    loader,
    pictures,
    projected,
    still,
)
from helpers import batches, mlp, raises_naming, train
from trainers import make_trainer

from lightning_wgsef import (
    WGSEF,
    Homotopy,
    WGSEFCallback,
    sparsity_report,
)

TOTAL = sum(FLOPS.values())
SMALL = {"conv2": 1e-3}
NOW = {"lam": Homotopy(length=1), "scope": "global"}


def costs_of(costs):
    """The cost of every group by hand."""
    return {name: [COSTS[costs][name]] * count for name, count in CHANNELS.items()}


# --- what stays --------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [None, SMALL], ids=["equal", "small conv2"])
def test_the_model_keeps_its_share_of_operations(scales):
    model = pictures(scales)
    callback = WGSEFCallback(k=0.4, costs="flops", scope="global", lam=Homotopy(length=0.5))
    make_trainer([callback]).fit(model, loader())
    assert callback.regularizer.frozen
    report = sparsity_report(model, callback.regularizer.groups, IMAGES)
    layers = {layer.name: layer for layer in report.layers}
    assert {name: layer.flops for name, layer in layers.items()} == FLOPS
    left = sum(layer.flops_alive for layer in layers.values())
    assert 0.4 * TOTAL - max(COSTS["flops"].values()) < left <= 0.4 * TOTAL
    alive = {name: layers[name].groups_alive for name in CHANNELS}
    assert min(alive.values()) >= 1
    by_hand = FLOPS["conv1"] + sum(COSTS["flops"][name] * n for name, n in alive.items())
    assert left == by_hand
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("k", [0.25, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("scales", [None, SMALL], ids=["equal", "small conv2"])
def test_the_strongest_of_every_layer_and_then_of_all(costs, k, scales):
    """Against loops; norms of layers are comparable, whatever their scale."""
    model = pictures(scales).double()
    regularizer = WGSEF(model, k, costs=costs, example_input=IMAGES.double(), **NOW)
    by_hand = costs_of(costs)
    total = sum(map(sum, by_hand.values()))
    parameters = sum(p.numel() for p in model.parameters())
    rest = {None: 0, "params": parameters - total, "flops": TOTAL - total}[costs]
    budget = k * (total + rest) - rest
    budget = int(budget + 0.5) if costs is None else budget
    wanted = expected(channel_norms(model), by_hand, budget)
    assert projected(regularizer, model) == wanted
    assert all(map(any, wanted.values()))
    assert k == 1 or any(not all(mask) for mask in wanted.values())


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize("k", [0.5, 40])
def test_costs_of_ones_own(mapping, k):
    """Without a rest; within a layer the strongest is the one with the most norm^2 a cost."""
    model = pictures().double()
    by_hand = {name: [1 + (7 * j) % 4 for j in range(n)] for name, n in CHANNELS.items()}
    costs = {name: torch.tensor(own, dtype=torch.float64) for name, own in by_hand.items()}
    given = costs if mapping else torch.cat(list(costs.values()))
    budget = k if isinstance(k, int) else k * sum(map(sum, by_hand.values()))
    regularizer = WGSEF(model, k, costs=given, **NOW)
    assert projected(regularizer, model) == expected(channel_norms(model), by_hand, budget)


def test_the_scale_of_a_layer_does_not_matter():
    masks = []
    for scales in (None, SMALL, {"conv3": 100.0, "fc": 1e-3}):
        model = pictures(scales)
        regularizer = WGSEF(model, 0.4, costs="flops", example_input=IMAGES, **NOW)
        for layer, norms in channel_norms(model).items():
            squares = regularizer.groups.split(regularizer.groups.weights)[layer].double()
            mean = (squares * torch.tensor(norms).square()).mean()
            assert mean.item() == pytest.approx(1, rel=1e-5)
        masks.append(projected(regularizer, model))
    assert masks[0] == masks[1] == masks[2]


def test_latency():
    """Whatever the times are: they are positive, and what stays fits the budget."""
    model = pictures().double()
    images = IMAGES.double().expand(8, 1, 8, 8)
    regularizer = WGSEF(model, 0.99, costs="latency", example_input=images, **NOW)
    masks, groups = projected(regularizer, model), regularizer.groups
    kept = torch.cat([torch.tensor(mask) for mask in masks.values()])
    spent, (budget,) = float(groups.costs[kept].sum()), groups.budgets.tolist()
    assert (groups.costs > 0).all()
    assert budget - float(groups.costs.max()) < spent <= budget * (1 + 1e-9)
    assert all(map(any, masks.values()))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("k", "kept"), [(1.0, 10), (0.5, 5)])
def test_costs_without_a_binary_fraction_in_a_float32_model(scope, k, kept):
    """Ten groups of 0.1: rounded to float32 they would cost more than the budget."""
    torch.manual_seed(0)
    model = mlp(3, 10, 4)
    costs = torch.full((10,), 0.1, dtype=torch.float64)
    regularizer = WGSEF(model, k, Homotopy(length=1), scope=scope, costs=costs)
    assert sum(projected(regularizer, model)["2"]) == kept


@pytest.mark.parametrize("costs", COSTS)
def test_every_grouping(costs):
    """A projection keeps the budget, and leaves no layer empty."""
    for grouping in ("filter", "channel", "element"):
        model = pictures(SMALL).double()
        arguments = {"costs": costs, "example_input": IMAGES.double(), "grouping": grouping}
        regularizer = WGSEF(model, 0.4, **arguments, **NOW)
        masks, groups = projected(regularizer, model), regularizer.groups
        kept = torch.cat([torch.tensor(mask) for mask in masks.values()])
        price = torch.ones(len(groups)).double() if groups.costs is None else groups.costs
        spent, (budget,) = float(price[kept].sum()), groups.budgets.tolist()
        assert budget - float(price.max()) < spent <= budget * (1 + 1e-9)
        assert all(map(any, masks.values()))


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.3, 3.0])
@pytest.mark.parametrize("scales", [None, {"conv3": 1e-2}], ids=["equal", "small conv3"])
def test_a_constant_lam_keeps_the_strongest_of_every_layer(lam, scales):
    model = pictures(scales)
    norms = channel_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = WGSEF(model, 3, lam, scope="global", freeze=None).attach(optimizer)
    still(model, optimizer, 40)
    masks = regularizer.masks
    for name, own in norms.items():
        assert masks[name].any(), name
        assert masks[name][torch.tensor(own).argmax()], name


@pytest.mark.parametrize("metric", ["auto", "group"])
def test_a_constant_lam_has_no_metric(metric):
    """The layers' weights are a metric already."""
    with raises_naming("metric", metric, "global"):
        WGSEF(pictures(), 0.5, 0.1, metric=metric, scope="global")
    WGSEF(pictures(), 0.5, Homotopy(length=3), metric=metric, scope="global")


def test_the_end_of_a_constant_lam():
    """Frozen at a given step: exactly the budget, a group of every layer."""
    model = pictures()
    callback = WGSEFCallback(k=0.3, lam=1e-3, scope="global", freeze=0.5)
    make_trainer([callback], max_epochs=1).fit(model, loader())
    masks = callback.regularizer.masks
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.3 * 36 + 0.5)
    assert all(mask.any() for mask in masks.values())


class Metrics(pl.Callback):
    """What was logged after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def test_metrics():
    """Always of the same names; the gap closes with the freeze, and the value is the ridge's."""
    model, metrics = pictures(), Metrics()
    callback = WGSEFCallback(k=0.4, costs="params", scope="global", lam=Homotopy(length=0.5))
    make_trainer([callback, metrics], log_every_n_steps=1, max_epochs=2).fit(model, loader())
    names = {f"wgsef/{name}/group_sparsity" for name in CHANNELS}
    names |= {f"wgsef/{name}" for name in ("sparsity", "value", "gap", "step", "frozen")}
    assert len(metrics.seen) == 30
    assert all(set(seen) == names for seen in metrics.seen)
    assert [seen["wgsef/frozen"] for seen in metrics.seen] == [0.0] * 14 + [1.0] * 16
    assert all(seen["wgsef/gap"] > 0 for seen in metrics.seen[:5])
    assert all(seen["wgsef/gap"] == 0 for seen in metrics.seen[14:])
    groups = callback.regularizer.groups
    ridge = 0.5 * float((groups.weights * groups.norms().square()).sum())
    assert metrics.seen[-1]["wgsef/value"] == pytest.approx(ridge, rel=1e-5)
    assert callback.regularizer.gap().tolist() == [0]


def test_the_layer_that_grows_fastest_does_not_win():
    """Layers are compared as they are: neither growth nor shrinkage of a whole layer matters."""

    def alive(growth):
        torch.manual_seed(0)
        model = mlp(4, 8, 8, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        regularizer = WGSEF(model, 8, Homotopy(length=20), scope="global").attach(optimizer)
        for batch in batches(20):
            train(model, optimizer, [batch])
            if not regularizer.frozen:
                with torch.no_grad():
                    model[2].weight *= growth
        return {name: mask.tolist() for name, mask in regularizer.masks.items()}

    expected = alive(1.0)
    assert {name: 1 < sum(mask) < 8 for name, mask in expected.items()} == {"2": True, "4": True}
    assert alive(1.3) == alive(0.8) == expected

"""One budget for all layers: training in lockstep with slow twins."""

import io
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_wgsef import (
    WGSEF,
    Constant,
    GroupLasso,
    Groups,
    Homotopy,
    WGSEFCallback,
    group_parameters,
    slim,
)
from lightning_wgsef.network import latency
from lightning_wgsef.network.flops import layer_flops
from tests.helpers.groups import batches, dense_network, mlp, raises_naming, train
from tests.helpers.networks.scope import (
    CHANNELS,
    COSTS,
    FLOPS,
    IMAGES,
    SIZES,
    channel_norms,
    expected,
    expected_of_size,
    loader,
    pictures,
    projected,
    still,
)
from tests.helpers.oracles import envelope as oracle
from tests.helpers.products import every_pair
from tests.helpers.trainers import make_trainer

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
    regularizer = WGSEF(
        models[0],
        budget,
        Constant(lam) if isinstance(lam, float) else lam,
        scope="global",
        costs=costs,
        **more,
    )
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
        falling = budget + (prices.sum() - budget) * max(0, 1 - number / 13.5) ** 3
        left = falling - prices[first].sum()
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


TOTAL = sum(FLOPS.values())
SMALL = {"conv2": 1e-3}
NOW = {"lam": Homotopy(length=1), "scope": "global", "weights": "layer_norm"}


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
    alive = [int(mask.sum()) for mask in callback.regularizer.masks.values()]
    assert min(alive) >= 1
    left = layer_flops(slim(model, IMAGES), IMAGES)[1]
    assert left == SIZES["flops"](*alive)
    assert 0.4 * TOTAL - max(COSTS["flops"].values()) < left <= 0.4 * TOTAL
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("k", [0.25, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("scales", [None, SMALL], ids=["equal", "small conv2"])
def test_the_strongest_of_every_layer_and_then_of_all(costs, k, scales):
    """Against loops; norms of layers are comparable, whatever their scale."""
    model = pictures(scales).double()
    regularizer = WGSEF(model, k, costs=costs, example_input=IMAGES.double(), **NOW)
    norms, budget = channel_norms(model), k * SIZES[costs](*CHANNELS.values())
    if costs is None:
        wanted = expected(norms, costs_of(costs), int(budget + 0.5))
    else:
        wanted = expected_of_size(norms, costs, budget * (1 + 1e-12))
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


@pytest.fixture
def even_time(monkeypatch):
    """Time passes only where modules work, as long as they have weights."""
    now = [0.0]

    def passes(module, *_):
        now[0] += 1e-4 + 1e-7 * sum(x.numel() for x in module.parameters(recurse=False))

    hook = torch.nn.modules.module.register_module_forward_hook(passes)
    monkeypatch.setattr(latency, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency, "_MOST", 2)
    yield
    hook.remove()


def test_latency(even_time):
    """Times are positive, and what slim leaves fits, to within a group."""
    model = pictures().double()
    images = IMAGES.double().expand(8, 1, 8, 8)
    regularizer = WGSEF(model, 0.9, costs="latency", example_input=images, **NOW)
    masks, groups = projected(regularizer, model), regularizer.groups
    kept = torch.cat([torch.tensor(mask) for mask in masks.values()])
    left, (budget,) = float(groups.size.of(kept)), groups.budgets.tolist()
    dearest = float(groups.size.costs(torch.ones_like(kept)).max())
    assert (groups.costs > 0).all()
    assert budget - dearest < left <= budget * (1 + 1e-9)
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
    for grouping in ("filter", "channel", "structure", *["element"] * (costs is None)):
        model = pictures(SMALL).double()
        arguments = {"costs": costs, "example_input": IMAGES.double(), "grouping": grouping}
        regularizer = WGSEF(model, 0.4, **arguments, **NOW)
        masks, groups = projected(regularizer, model), regularizer.groups
        small = slim(model, IMAGES.double())
        spent = {
            None: sum(map(sum, masks.values())),
            "params": sum(p.numel() for p in small.parameters()),
            "flops": layer_flops(small, IMAGES.double())[1],
        }[costs]
        price = 1.0 if costs is None else max(float(x.costs.max()) for x in groups.layers)
        (budget,) = groups.budgets.tolist()
        assert budget - price < spent <= budget * (1 + 1e-9)
        assert all(map(any, masks.values()))


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.3, 3.0])
@pytest.mark.parametrize("scales", [None, {"conv3": 1e-2}], ids=["equal", "small conv3"])
def test_a_constant_lam_keeps_the_strongest_of_every_layer(lam, scales):
    model = pictures(scales)
    norms = channel_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = WGSEF(model, 3, Constant(lam), scope="global", freeze=None).attach(optimizer)
    still(model, optimizer, 40)
    masks = regularizer.masks
    for name, own in norms.items():
        assert masks[name].any(), name
        assert masks[name][torch.tensor(own).argmax()], name


@pytest.mark.parametrize("metric", ["auto", "group"])
def test_a_constant_lam_has_no_metric(metric):
    """The layers' weights are a metric already."""
    with raises_naming("metric", metric, "global"):
        WGSEF(pictures(), 0.5, Constant(0.1), metric=metric, scope="global")
    WGSEF(pictures(), 0.5, Homotopy(length=3), metric=metric, scope="global")


@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_the_end_of_a_constant_lam():
    """Frozen at a given step: exactly the budget, a group of every layer."""
    model = pictures()
    callback = WGSEFCallback(k=0.3, lam=Constant(1e-3), scope="global", freeze=0.5)
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


LEAST = SIZES["flops"](1, 1, 1)

# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [WGSEF, group_parameters])
def test_a_budget_below_one_group_of_every_layer(make):
    """What would be accepted is said in operations, and as a share."""
    arguments = {"scope": "global", "costs": "flops", "example_input": IMAGES}
    said = f"{LEAST:,} ({LEAST / TOTAL:.1%})", f"{TOTAL:,}"
    with raises_naming("k = 0.001", f"{0.001 * TOTAL:.0f} FLOPs", *said):
        make(pictures(), k=0.001, **arguments)
    with raises_naming("k = 2000", *said):
        make(pictures(), k=2000, **arguments)
    with raises_naming("k = '3 MFLOPs', 3,000,000 FLOPs", *said):
        make(pictures(), k="3 MFLOPs", **arguments)
    assert make(pictures(), k=LEAST, **arguments)
    with raises_naming("k = 2", "3", "36"):
        make(pictures(), k=2, scope="global")
    with raises_naming("k = 0.05", "leaves 1.8", "36", "3"):
        make(pictures(), k=0.05, scope="global")
    assert make(pictures(), k=3, scope="global")


@pytest.mark.parametrize("make", [WGSEFCallback, lambda **more: WGSEF(pictures(), **more)])
def test_bad_arguments(make):
    with raises_naming("k must be one number with scope='global'", "mapping", "'fc': 3"):
        make(k={"fc": 3, "*": 2}, scope="global")
    for scope in ("all", None, True):
        with raises_naming("scope must be 'layer' or 'global'", repr(scope)):
            make(scope=scope)
    with raises_naming("costs must be 'flops'", "'seconds'"):
        make(scope="global", costs="seconds")
    with raises_naming("costs must be a positive, finite tensor", "-1.0 at index 1"):
        make(scope="global", costs=torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_costs_that_do_not_fit(scope):
    with raises_naming("costs must have one entry for each of the 36 groups", "(35,)", "'fc': 12"):
        WGSEF(pictures(), scope=scope, costs=torch.ones(35))
    costs = {name: torch.ones(count) for name, count in CHANNELS.items()}
    with raises_naming("costs must have the groups of every layer", "'fc': (11,)"):
        WGSEF(pictures(), scope=scope, costs={**costs, "fc": torch.ones(11)})
    with raises_naming("costs must have the groups of every layer", "'conv2': 8"):
        WGSEF(pictures(), scope=scope, costs={"fc": torch.ones(12)})
    for name in ("flops", "latency"):
        with raises_naming(f"costs='{name}' needs an example_input"):
            WGSEF(pictures(), scope=scope, costs=name)


def test_the_callback_asks_for_an_example_input_before_training():
    model = pictures()
    model.example_input_array = None
    callback = WGSEFCallback(k=0.4, scope="global", costs="flops")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with raises_naming("costs='flops' needs an example_input"):
        make_trainer([callback]).fit(model, loader(2))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_an_example_input_of_the_callback_comes_first():
    """With four times the places every convolution costs four times as much; fc does not."""
    model = pictures()
    images = torch.ones(1, 1, 16, 16)
    callback = WGSEFCallback(k=0.4, scope="global", costs="flops", example_input=images)
    make_trainer([callback], max_epochs=4).fit(model, loader(2))
    costs = {x.name: x.costs.tolist() for x in callback.regularizer.groups.layers}
    by_hand = COSTS["flops"]
    assert costs == {
        "conv2": [4.0 * by_hand["conv2"]] * 8,
        "conv3": [4.0 * by_hand["conv3"]] * 16,
        "fc": [4.0 * (by_hand["fc"] - 20) + 20] * 12,
    }


def test_layers_in_two_optimizers():
    model = dense_network()
    first = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    second = torch.optim.SGD(model[3].parameters(), lr=0.1)
    regularizer = WGSEF(model, 0.5, Constant(0.1), scope="global")
    with raises_naming("scope='global'", "one optimizer", "['2']"):
        regularizer.attach(first, second)
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    assert regularizer.attach(both).waiting() == []


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("length", [1, 30])
def test_the_smallest_budget_is_one_group_of_every_layer(costs, length):
    """Nothing is left to compete for."""
    model = pictures().double()
    norms = channel_norms(model)
    arguments = {"scope": "global", "costs": costs, "example_input": IMAGES.double()}
    budget = SIZES[costs](1, 1, 1)
    regularizer = WGSEF(model, budget, Homotopy(length=length), **arguments)
    masks = projected(regularizer, model)
    assert {name: mask.index(True) for name, mask in masks.items()} == {
        name: own.index(max(own)) for name, own in norms.items()
    }
    assert sum(map(sum, masks.values())) == 3
    assert regularizer.gap().tolist() == [0]


# --- value and gap -----------------------------------------------------------------------------


@pytest.mark.parametrize("costs", [None, torch.tensor([1.0, 2.0, 1.5, 3.0, 1.0, 2.5, 0.5])])
def test_value_and_gap_while_groups_compete(costs):
    """The strongest of every layer counts with half its square; the envelope sees the others."""
    torch.manual_seed(0)
    model = mlp(2, 3, 4, 2).double()
    regularizer = WGSEF(model, 4 if costs is None else 8, 0.1, scope="global", costs=costs)
    norms = [model[i].weight.detach().norm(dim=0) for i in (2, 4)]
    weights = torch.cat([1 / own.square().mean().expand(len(own)) for own in norms]).numpy()
    prices = np.ones(7) if costs is None else costs.double().numpy()
    norms = torch.cat(norms).numpy()
    strengths = norms**2 / prices
    first = [int(strengths[:3].argmax()), 3 + int(strengths[3:].argmax())]
    squares, others = weights * norms**2 / 2, norms.copy()
    others[first] = 0
    left = (4 if costs is None else 8) - prices[first].sum()
    value = oracle.value(others, left, weights, prices) + squares[first].sum()
    assert regularizer.value().tolist() == pytest.approx([float(value)], rel=1e-9)
    assert regularizer.gap().tolist() == pytest.approx([float(value) - squares.sum()], rel=1e-9)
    assert regularizer.gap().item() > 0


def test_the_gap_stays_closed_while_the_network_goes_on_training():
    model = dense_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    costs = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 2.0, 1.0, 4.0, 1.0, 3.0, 2.0])
    more = {"scope": "global", "costs": costs, "lam": Homotopy(length=10)}
    regularizer = WGSEF(model, 0.6, **more).attach(optimizer)
    for number, batch in enumerate(batches(60), start=1):
        train(model, optimizer, [batch])
        assert regularizer.frozen == (number >= 10)
        if regularizer.frozen:
            groups = regularizer.groups
            ridge = 0.5 * (groups.weights * groups.norms().square()).sum()
            assert regularizer.gap().tolist() == [0]
            torch.testing.assert_close(regularizer.value(), ridge.view(1))


# --- resuming ----------------------------------------------------------------------------------


@every_pair(costs=("flops", "latency"), metric=("identity", "auto"), stop=(4, 14, 22))
def test_resume_is_bit_identical(tmp_path, even_time, costs, metric, stop):
    """Times were measured at the start of the run; the checkpoint has others."""

    def fit(**arguments):
        model = pictures({"conv2": 1e-3})
        saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)
        more = {"scope": "global", "costs": costs, "metric": metric, "lam": Homotopy(length=0.5)}
        callback = WGSEFCallback(k=0.99, **more)
        trainer = make_trainer([callback, saver], enable_checkpointing=True)
        trainer.fit(model, loader(), **arguments)
        return model, callback.regularizer

    whole, first = fit()
    path = next(tmp_path.glob(f"*step={stop}.ckpt"))
    resumed, second = fit(ckpt_path=path, weights_only=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    (state,) = torch.load(path, weights_only=True)["callbacks"]["WGSEFCallback"]["attachments"]
    for name in ("costs", "budgets", *["latency"] * (costs == "latency")):
        assert torch.equal(getattr(first.groups, name), state[name])
        assert torch.equal(getattr(second.groups, name), state[name])
    assert torch.equal(first.groups.weights, second.groups.weights)
    assert {name: mask.tolist() for name, mask in first.masks.items()} == {
        name: mask.tolist() for name, mask in second.masks.items()
    }


def test_a_state_of_a_plain_loop_brings_weights_and_budgets():
    def made(scale):
        model = dense_network()
        with torch.no_grad():
            model[2].weight *= scale
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        example = torch.ones(1, 4, dtype=torch.float64)
        more = {"scope": "global", "costs": "params", "lam": Homotopy(length=20)}
        more |= {"weights": "layer_norm", "example_input": example}
        return model, optimizer, WGSEF(model, 0.6, **more).attach(optimizer)

    first, second = made(1.0), made(30.0)
    assert not torch.equal(first[2].groups.weights, second[2].groups.weights)
    train(*first[:2], batches(30)[:8])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for part in (first, second):
        train(*part[:2], batches(30)[8:])
    assert torch.equal(
        nn.utils.parameters_to_vector(first[0].parameters()),
        nn.utils.parameters_to_vector(second[0].parameters()),
    )
    assert first[2].value().tolist() == second[2].value().tolist()


def test_what_is_foretold_changes_nothing_that_is_saved():
    """Weights by layer norms are those of the last step, whoever asked what would be cut since."""
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    regularizer = WGSEF(model, 0.5, Homotopy(length=20), scope="global").attach(optimizer)
    train(model, optimizer, batches(5))
    (pruner,) = regularizer.pruners
    before = pruner.state_dict()["weights"].clone()
    assert pruner.progress() == pruner.progress()
    assert torch.equal(pruner.state_dict()["weights"], before)

"""Training in the optimizer's metric: homotopy, debiased steps, and resuming."""

import io
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, Constant, Groups, Homotopy, group_parameters, prox_multipliers
from tests.helpers.oracles.preconditioned_training import (
    OPTIMIZERS,
    averaged,
    batches,
    difference,
    exact,
    laid_out,
    layer_step,
    network,
    prox,
    same,
    train,
    wide_network,
)
from tests.helpers.products import every_pair, every_value

METRICS = ("auto", "group")
GROUPINGS = ("filter", "channel", "element")
NAMES = tuple(OPTIMIZERS)
every_metric = pytest.mark.parametrize("metric", METRICS)
every_grouping = pytest.mark.parametrize("grouping", GROUPINGS)


def strongest(groups, optimizer, by_group):
    """For every layer the groups with the largest sum of D theta^2, as many as its budget."""
    kept = {}
    for layer in groups.layers:
        values, metric, index, _ = laid_out(layer, optimizer)
        if by_group:
            metric = averaged(metric, index, layer.count)
        sums = torch.zeros(layer.count).double().index_add(0, index, metric * values.square())
        kept[layer.name] = torch.zeros(layer.count, dtype=torch.bool)
        kept[layer.name][sums.topk(int(layer.budget)).indices] = True
    return kept


@every_pair(name=NAMES, metric=METRICS, grouping=GROUPINGS)
def test_homotopy_keeps_the_strongest_in_the_metric(name, metric, grouping):
    """At every step those that would be kept now are left as they are, bit for bit."""
    model, last = network(), 20
    optimizer, seen = OPTIMIZERS[name](model.parameters()), []
    groups = group_parameters(model, grouping, k=0.4)
    layers = [[member.parameter for member in layer.members] for layer in groups.layers]

    def before_the_step(*_):
        kept = strongest(groups, optimizer, metric == "group")
        seen.append((kept, [[p.detach().clone() for p in layer] for layer in layers]))

    optimizer.register_step_post_hook(before_the_step)
    more = {"lam": Homotopy(length=last), "metric": metric}
    regularizer = WGSEF(model, 0.4, grouping=grouping, **more).attach(optimizer)
    for batch in batches(last):
        assert not regularizer.frozen
        train(model, optimizer, batch)
        kept, before = seen[-1]
        for layer, old in zip(groups.layers, before, strict=True):
            for member, was in zip(layer.members, old, strict=True):
                now = member.parameter.detach()
                untouched = member.along(kept[layer.name], False).expand(now.shape)
                assert torch.equal(now[untouched], was[untouched])
    assert regularizer.frozen
    for layer, mask in regularizer.masks.items():
        assert torch.equal(mask, seen[-1][0][layer]), layer
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == groups.budgets.tolist()


@every_value("name, metric, grouping", itertools.product(NAMES, METRICS, GROUPINGS))
def test_homotopy_arrives_without_a_jump(name, metric, grouping):
    """Weights that nothing moves: those that are cut have faded before, the freeze changes none."""
    model, last = network(), 150
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.0)
    more = {"lam": Homotopy(length=last), "metric": metric}
    regularizer = WGSEF(model, 0.4, grouping=grouping, **more).attach(optimizer)
    for batch in batches(last - 1):
        train(model, optimizer, batch)
    assert not regularizer.frozen
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches(1)[0])
    assert regularizer.frozen
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [
        layer.budget for layer in regularizer.groups.layers
    ]


@pytest.mark.parametrize(
    ("metric", "kept"), [("identity", [2, 3]), *((metric, [0, 1]) for metric in METRICS)]
)
def test_weights_that_are_dear_stay_though_they_are_small(metric, kept):
    """Norms rise from 1 to 4; gradients of Adam's first step, and D with them, fall by powers."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)).double()
    weight = model[1].weight
    with torch.no_grad():
        weight.copy_(torch.arange(1.0, 5.0).expand(3, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    WGSEF(model, 2, Homotopy(length=1), metric=metric).attach(optimizer)
    weight.grad = torch.tensor([1e4, 1e2, 1.0, 1e-2]).double().expand(3, 4).clone()
    optimizer.step()
    assert weight.detach().norm(dim=0).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("metric", ["identity", *METRICS])
@pytest.mark.parametrize("name", ["Adam", "SGD"])
@pytest.mark.parametrize("lam", [1e-3, 1e3])
def test_fully_debiased_nothing_fades_within_the_budget(name, metric, lam):
    """Envelope and ridge cancel there: whatever the size of the step, it changes nothing."""
    models = network(), network()
    first, second = (OPTIMIZERS[name](model.parameters()) for model in models)
    WGSEF(models[0], 1.0, Constant(lam), metric=metric, debias=1.0, freeze=None).attach(first)
    for batch in batches(10):
        train(models[0], first, batch)
        train(models[1], second, batch)
    for ours, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@every_metric
@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lam", [3.0, 300.0])
def test_where_d_is_1_it_is_the_identity(metric, debias, lam):
    """Adam with gradients of 1; the second lam is beyond the largest convex step, 1 / debias."""
    weights = []
    for chosen in (metric, "identity"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 3)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0)
        WGSEF(model, 3, Constant(lam), metric=chosen, debias=debias).attach(optimizer)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        weights.append(model[1].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-9)


@every_metric
def test_half_debiased_steps_beyond_the_convex_ones_stay_finite(metric):
    """Behind a norm a bias has no gradient and D = eps, which no step is small for."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = WGSEF(model, 0.4, Constant(10.0), "filter", metric=metric, debias=0.5).attach(
        optimizer
    )
    for batch in batches(10):
        train(model, optimizer, batch)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(
        (regularizer.groups.split(regularizer.groups.norms())[n] > 0).any()
        for n in ("conv1", "conv2")
    )


def restored(state):
    """As from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_pair(
    name=NAMES,
    metric=METRICS,
    lam=(Constant(0.1), Homotopy(length=14)),
    where=((1, "filter"), (7, "element"), (13, "channel")),
)
def test_resume_is_bit_identical(name, metric, lam, where):
    data = batches(18)
    stop, grouping = where

    def run(batches, *states):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        more = {
            "lam": lam,
            "metric": metric,
            "freeze": 16 if isinstance(lam, Constant) else "converged",
        }
        if states:  # the weights first: what is measured of them comes from the state
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        regularizer = WGSEF(model, 0.4, grouping=grouping, **more).attach(optimizer)
        if states:
            regularizer.load_state_dict(states[2])
        for batch in batches:
            train(model, optimizer, batch)
        return model, optimizer, regularizer

    whole = run(data)
    parts = run(data[:stop])
    resumed = run(data[stop:], *restored([part.state_dict() for part in parts]))
    assert same(whole[0], resumed[0])
    assert whole[2].frozen
    assert resumed[2].frozen
    for name, mask in whole[2].masks.items():
        assert torch.equal(mask, resumed[2].masks[name])


# Shares are found to 1e-6; in weights that was 5e-7 of the largest one at worst.
CLOSE = 1e-6


def pair(make=network, name="Adam", params=nn.Module.parameters, **more):
    """Two equal networks with an optimizer each."""
    models = make(), make()
    return models, tuple(OPTIMIZERS[name](params(model), **more) for model in models)


def lockstep(models, optimizers, steps, lam, data=None, **arguments):
    """The differences after 1, 5, and all steps; and the groups that have died in the end."""
    ours, twin = models
    regularizer = WGSEF(ours, lam=Constant(lam), freeze=None, **arguments).attach(optimizers[0])
    debias, by_group = arguments.get("debias", 0.0), arguments["metric"] == "group"
    more = {key: arguments[key] for key in ("k", "costs") if key in arguments}
    groups = group_parameters(twin, arguments["grouping"], **more)
    seen = []
    for batch in data or batches(steps):
        train(ours, optimizers[0], batch)
        train(twin, optimizers[1], batch)
        prox(groups, optimizers[1], lam, debias, by_group)
        seen.append(difference(ours, twin))
    assert torch.equal(regularizer.groups.norms() == 0, groups.norms() == 0)
    assert all(torch.isfinite(p).all() for p in ours.parameters())
    return [seen[0], seen[4], seen[-1]], int((groups.norms() == 0).sum())


def eps(name, debias):
    """Debiased, D must stay above a share of lr lam; behind a norm a bias has D = eps."""
    return {"eps": 0.1} if debias and name != "SGD" else {}


@every_value("name, grouping, debias", itertools.product(NAMES, GROUPINGS, (0.0, 0.5)))
def test_lockstep(name, grouping, debias):
    """D of a bias in front of a norm is eps: within a group D spans seven orders of magnitude."""
    more = {"grouping": grouping, "k": 0.4, "metric": "auto", "debias": debias}
    worst, _ = lockstep(*pair(name=name, **eps(name, debias)), 30, 0.1, **more)
    assert max(worst) <= CLOSE


@every_grouping
def test_groups_die_where_the_twin_kills_them(grouping):
    more = {"grouping": grouping, "k": 0.4, "metric": "auto", "debias": 0.5}
    worst, dead = lockstep(*pair(eps=0.1), 30, 1.0, **more)
    assert max(worst) <= CLOSE
    assert dead > 0


@pytest.mark.parametrize("name", ["Adam", "amsgrad", "RMSprop", "Adagrad"])
@every_grouping
def test_shares_are_found_to_a_millionth(name, grouping):
    """u = theta t / (v D - theta D), best read from the weight of a group that shrinks most."""
    model, lam = network(), 0.1
    optimizer, expected = OPTIMIZERS[name](model.parameters()), []
    groups = group_parameters(model, grouping, k=0.4)

    @torch.no_grad()
    def before_the_step(*_):
        expected.clear()
        for layer in groups.layers:
            values, metric, index, _ = laid_out(layer, optimizer)
            after, step = exact(layer, optimizer, lam, 0.0), layer_step(layer, optimizer, lam)
            shares = (after * step / (metric * (values - after))).nan_to_num(0)
            shrunk = (1 - after / values).nan_to_num(0)
            order = shrunk.argsort()  # the last one that is written stays
            expected.append(torch.zeros(layer.count).double())
            for place in order.tolist():
                expected[-1][index[place]] = shares[place]

    optimizer.register_step_post_hook(before_the_step)
    regularizer = WGSEF(model, 0.4, Constant(lam), grouping, metric="auto").attach(optimizer)
    for batch in batches(12):
        train(model, optimizer, batch)
        shares = regularizer.state_dict()["attachments"][0]["shares"]
        live = groups.norms() > 0
        assert (shares - torch.cat(expected))[live].abs().max() <= 1e-6


@every_grouping
@pytest.mark.parametrize("metric", ["auto", "group"])
def test_a_layer_of_several_blocks(grouping, metric):
    more = {"grouping": grouping, "k": 0.4, "metric": metric}
    worst, _ = lockstep(*pair(wide_network), 6, 0.1, batches(6, 2), **more)
    assert max(worst) <= CLOSE


@every_value("name, grouping, debias", itertools.product(NAMES, GROUPINGS, (0.0, 0.5)))
def test_the_mean_over_each_group(name, grouping, debias):
    """One tangent is exact: nothing is iterated."""
    more = {"grouping": grouping, "k": 0.4, "metric": "group", "debias": debias}
    worst, _ = lockstep(*pair(name=name, **eps(name, debias)), 30, 0.1, **more)
    assert max(worst) <= 1e-9


LAYOUTS = {
    "channels last": lambda: network().to(memory_format=torch.channels_last),
    "grouped": lambda: network(lambda: nn.Conv2d(6, 8, 3, groups=2)),
    "transposed": lambda: network(lambda: nn.ConvTranspose2d(6, 8, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouping", ["filter", "channel"])
@pytest.mark.parametrize("metric", ["auto", "group"])
def test_layouts(layout, grouping, metric):
    more = {"grouping": grouping, "k": 0.4, "metric": metric}
    worst, _ = lockstep(*pair(LAYOUTS[layout]), 10, 0.1, **more)
    assert max(worst) <= CLOSE


def rates(model):
    """Three learning rates, and a bias that no optimizer moves: its D is 1."""
    model.conv1.bias.requires_grad_(False)
    own = [model.conv1, model.norm1], [model.conv2], [model.fc]
    return [
        {"params": [p for module in some for p in module.parameters()], "lr": rate}
        for some, rate in zip(own, (0.01, 0.03, 0.005), strict=True)
    ]


def weighted(model):
    """Filters with penalty weights and costs of their own."""
    layers = []
    for layer in group_parameters(model, "filter").layers:
        numbers = torch.arange(layer.count).double()
        layers.append(replace(layer, weights=0.5 + numbers / 4, costs=1 + (3 * numbers) % 4))
    return Groups(layers)


@pytest.mark.parametrize("grouping", ["filter", weighted])
@pytest.mark.parametrize("metric", ["auto", "group"])
def test_rates_weights_and_costs(grouping, metric):
    costs = {"costs": {"conv1": torch.arange(6) % 3 + 1.0, "conv2": torch.arange(8) % 4 + 0.5}}
    more = {"grouping": grouping, "k": 0.5, "metric": metric, **costs}
    worst, _ = lockstep(*pair(params=rates), 20, 0.1, **more)
    assert max(worst) <= CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_the_identity_is_the_default_and_knows_no_metric(name):
    models, optimizers = pair(name=name)
    third = network()
    last = OPTIMIZERS[name](third.parameters())
    WGSEF(models[0], 0.4, Constant(0.1)).attach(optimizers[0])
    WGSEF(models[1], 0.4, Constant(0.1), metric="identity").attach(optimizers[1])
    groups, lr = group_parameters(third, k=0.4), last.param_groups[0]["lr"]
    for batch in batches(20):
        for model, optimizer in zip((*models, third), (*optimizers, last), strict=True):
            train(model, optimizer, batch)
        groups.scale_(
            prox_multipliers(groups.norms(), lr * 0.1, groups.budgets, **groups.competition)
        )
    assert same(*models)
    assert same(models[0], third)


@pytest.mark.parametrize("metric", ["auto", "group"])
@pytest.mark.parametrize("lam", [Constant(0.3), Homotopy(length=15)])
def test_the_metric_of_plain_gradient_steps_is_the_identity(metric, lam):
    models, optimizers = pair(name="SGD")
    for model, optimizer, chosen in zip(models, optimizers, ("identity", metric), strict=True):
        WGSEF(model, 0.4, lam, metric=chosen).attach(optimizer)
    for batch in batches(20):
        train(models[0], optimizers[0], batch)
        train(models[1], optimizers[1], batch)
    assert same(*models)


def test_an_unknown_optimizer_warns_once_and_trains_in_the_identity():
    class Halving(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.05})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.sub_(p.grad, alpha=self.param_groups[0]["lr"] / 2)

    models = network(), network()
    optimizers = [Halving(model.parameters()) for model in models]
    first = WGSEF(models[0], 0.4, Constant(0.3), metric="auto")
    with pytest.warns(UserWarning, match=r"Halving scales its .* not known.*register_") as seen:
        first.attach(optimizers[0])
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = network()
        WGSEF(third, 0.4, Constant(0.3), metric="group").attach(Halving(third.parameters()))
        WGSEF(models[1], 0.4, Constant(0.3)).attach(optimizers[1])
        before = models[0].conv2.weight.detach().clone()
        for batch in batches(10):
            train(models[0], optimizers[0], batch)
            train(models[1], optimizers[1], batch)
    assert same(*models)
    assert not torch.equal(models[0].conv2.weight, before)


@pytest.mark.parametrize("metric", ["auto", "group"])
@pytest.mark.parametrize("seed", range(5))
def test_groups_that_stay_are_untouched_without_bias(metric, seed):
    """Their factor is exactly 1, not 1 up to rounding."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    arguments = {"k": 6, "lam": Constant(10.0), "debias": 1.0, "metric": metric, "include": "1"}
    regularizer = WGSEF(model, **arguments)
    weight, before, touched = model[1].weight, {}, []
    optimizer.register_step_post_hook(lambda *_: before.update(w=weight.detach().clone()))
    regularizer.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        assert bool((weight.abs() <= before["w"].abs()).all())
        touched.append(int((weight != before["w"]).any(0).sum()))
    assert max(touched) > 0
    assert min(touched) <= 2

"""Training in the optimizer's metric: homotopy, debiased steps, and resuming."""

import io

import pytest
import torch
from metric_twin import OPTIMIZERS, averaged, batches, laid_out, network, same, train
from torch import nn

from lightning_wgsef import WGSEF, Homotopy, group_parameters

METRICS = ("auto", "group")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_metric = pytest.mark.parametrize("metric", METRICS)
every_grouping = pytest.mark.parametrize("grouping", ["filter", "channel", "element"])


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


@every_optimizer
@every_metric
@every_grouping
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


@every_optimizer
@every_metric
@every_grouping
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
    WGSEF(models[0], 1.0, lam, metric=metric, debias=1.0, freeze=None).attach(first)
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
        WGSEF(model, 3, lam, metric=chosen, debias=debias).attach(optimizer)
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
    regularizer = WGSEF(model, 0.4, 10.0, "filter", metric=metric, debias=0.5).attach(optimizer)
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


@every_optimizer
@every_metric
@pytest.mark.parametrize("lam", [0.1, Homotopy(length=14)], ids=["constant", "homotopy"])
@pytest.mark.parametrize(("stop", "grouping"), [(1, "filter"), (7, "element"), (13, "channel")])
def test_resume_is_bit_identical(name, metric, grouping, lam, stop):
    data = batches(18)

    def run(batches, *states):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        more = {"lam": lam, "metric": metric, "freeze": 16 if lam == 0.1 else "converged"}
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

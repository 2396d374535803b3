"""One budget for all layers: what is refused, value and gap, and resuming."""

import io

import numpy as np
import oracle
import pytest
import pytorch_lightning as pl
import torch
from global_networks import (
    CHANNELS,
    COSTS,
    FLOPS,
    IMAGES,
    channel_norms,
    loader,
    pictures,
    projected,
)
from helpers import batches, dense_network, mlp, raises_naming, train
from torch import nn
from trainers import make_trainer

from lightning_wgsef import WGSEF, Homotopy, WGSEFCallback, group_parameters

TOTAL, GROUPED = sum(FLOPS.values()), sum(FLOPS[name] for name in CHANNELS)
REST, LEAST = TOTAL - GROUPED, sum(COSTS["flops"].values())

# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [WGSEF, group_parameters])
def test_a_budget_below_one_group_of_every_layer(make):
    """A hundredth of everything is less than what is not grouped costs."""
    arguments = {"scope": "global", "costs": "flops", "example_input": IMAGES}
    left = f"{0.01 * TOTAL - REST:g}"
    with raises_naming("k = 0.01", f"{TOTAL:g}", f"{REST:g}", left, f"{LEAST:g}", f"{GROUPED:g}"):
        make(pictures(), k=0.01, **arguments)
    with raises_naming("k = 20000", f"{LEAST:g}", f"{GROUPED:g}"):
        make(pictures(), k=20000, **arguments)
    with raises_naming("k = 300000", f"{LEAST:g}", f"{GROUPED:g}"):
        make(pictures(), k=300000, **arguments)
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
    """With four times the places every convolution costs four times as much."""
    model = pictures()
    images = torch.ones(1, 1, 16, 16)
    callback = WGSEFCallback(k=0.4, scope="global", costs="flops", example_input=images)
    make_trainer([callback], max_epochs=4).fit(model, loader(2))
    costs = callback.regularizer.groups.costs
    assert costs.tolist() == [4 * 18432.0] * 8 + [4 * 3456.0] * 16 + [20.0] * 12


def test_layers_in_two_optimizers():
    model = dense_network()
    first = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    second = torch.optim.SGD(model[3].parameters(), lr=0.1)
    regularizer = WGSEF(model, 0.5, 0.1, scope="global")
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
    budget = int(sum(COSTS[costs].values()))
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("costs", ["flops", "latency"])
@pytest.mark.parametrize("metric", ["identity", "auto"])
@pytest.mark.parametrize("stop", [4, 14, 22])
def test_resume_is_bit_identical(tmp_path, costs, metric, stop):
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
    for name in ("costs", "budgets"):
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
        more = {"scope": "global", "costs": "params", "lam": Homotopy(length=20)}
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

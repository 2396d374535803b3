"""Multiples, floors and ceilings of widths: in budgets, in training, and in what slim makes."""

import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, Homotopy, WGSEFCallback, group_parameters, slim
from lightning_wgsef.network.flops import layer_flops
from tests.helpers.groups import mlp, raises_naming
from tests.helpers.networks.scope import still

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 20, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(180, 5),
    )


def trained(model, steps=12, **arguments):
    """Widths of the slim network after a short training with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    more = {"grouping": "structure", "example_input": EXAMPLE, "lam": Homotopy(length=10)}
    regularizer = WGSEF(model, **{**more, **arguments}).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(EXAMPLE).square().mean().backward()
        optimizer.step()
    assert regularizer.frozen
    small = slim(model, EXAMPLE)
    return [small[i].out_channels for i in (0, 3, 5)], small, regularizer


@pytest.mark.parametrize("k", [0.9, 0.6, 0.35])
@pytest.mark.parametrize("costs", [None, "flops", "params"])
def test_multiples_keep_the_budget_of_all(k, costs):
    widths, small, regularizer = trained(network(), k=k, scope="global", costs=costs, multiple_of=4)
    assert all(width % 4 == 0 and width for width in widths)
    groups = regularizer.groups
    left = {
        None: sum(widths),
        "flops": layer_flops(small, EXAMPLE)[1] / 2,
        "params": sum(p.numel() for p in small.parameters()),
    }[costs]
    dearest = max(1.0 if x.costs is None else float(x.costs.max()) for x in groups.layers)
    assert groups.limit - 4 * dearest < left <= groups.limit * (1 + 1e-9)


def test_every_layer_for_itself():
    """A share is rounded down to a multiple, and at least one multiple stays."""
    assert trained(network(), k=0.6, multiple_of=4)[0] == [8, 12, 12]
    assert trained(network(), k=0.2, multiple_of=8)[0] == [8, 8, 8]
    assert trained(network(), k=1.0, multiple_of=8)[0] == [16, 24, 16]
    assert trained(network(), k=0.5, multiple_of={"3": 8, "5": 5})[0] == [8, 8, 10]
    assert trained(network(), k=0.1, at_least={"0": 0.5, "5": 7}, at_most=1.0)[0] == [8, 2, 7]
    assert trained(network(), k=1.0, at_most={"0": 0.5, "3": 5})[0] == [8, 5, 20]
    alike = trained(network(), k="60 kFLOPs", multiple_of=4)
    assert all(width % 4 == 0 for width in alike[0])
    assert layer_flops(alike[1], EXAMPLE)[1] / 2 <= 60e3


def test_floors_and_ceilings_of_one_competition():
    """Those of a layer that would lose stay; those of one that would win go."""
    model = network()
    with torch.no_grad():
        model[0].weight[:2] *= 100
    free = trained(model, k=0.4, scope="global", costs="flops")[0]
    model = network()
    bound = {"at_least": {"0": 0.75, "*": 0.25}, "at_most": {"5": 8, "3": 0.5}}
    widths, small, regularizer = trained(model, k=0.4, scope="global", costs="flops", **bound)
    assert widths != free
    assert widths[0] >= 12
    assert 6 <= widths[1] <= 12
    assert 5 <= widths[2] <= 8
    assert layer_flops(small, EXAMPLE)[1] / 2 <= regularizer.groups.limit


def test_a_width_is_one_of_channels():
    """Bundles of two channels come in twos, for a multiple of four; heads by their width."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 4, 1))
    groups = group_parameters(model, "structure", example_input=EXAMPLE, multiple_of=4)
    assert groups.layers[0].count == 8
    assert [layer.multiple for layer in groups.layers] == [2] * len(groups.layers)
    encoder = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    kinds = {"*attn": "head", "*linear1": "hidden"}
    groups = group_parameters(encoder, kinds, example_input=torch.ones(1, 3, 16), multiple_of=8)
    assert {x.name: x.multiple for x in groups.layers} == {"self_attn": 2, "linear1": 8}


def test_exactly_the_numbers_are_kept_where_groups_are_equal():
    model = mlp(4, 16, 16, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    more = {"scope": "global", "lam": Homotopy(length=1), "multiple_of": 8, "grouping": "filter"}
    regularizer = WGSEF(model, 24, **more).attach(optimizer)
    still(model, optimizer)
    assert sorted(int(mask.sum()) for mask in regularizer.masks.values()) == [8, 16]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [WGSEFCallback, lambda **more: group_parameters(mlp(3, 9, 2), **more)]
)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"multiple_of": 0}, ["multiple_of must be a number of channels (int >= 1)", "got 0"]),
        ({"multiple_of": 2.0}, ["multiple_of must be a number of channels", "got 2.0"]),
        ({"multiple_of": True}, ["multiple_of must be", "got True"]),
        ({"multiple_of": {"2": "8"}}, ["multiple_of['2'] must be", "got '8'"]),
        ({"multiple_of": {}}, ["multiple_of is an empty mapping"]),
        ({"at_least": 0}, ["at_least must be a number of groups", "got 0"]),
        ({"at_most": 1.5}, ["at_most must be a number of groups", "got 1.5"]),
        ({"at_most": {"2": -1}}, ["at_most['2'] must be a number of groups", "got -1"]),
    ],
)
def test_limits_that_are_none(make, arguments, words):
    with raises_naming(*words):
        make(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"multiple_of": 16}, ["multiple_of = 16", "layer '2' (channel)", "9 groups", "{'2': 9"]),
        ({"multiple_of": {"x": 2}}, ["multiple_of: the pattern 'x' matches no layer", "2"]),
        ({"at_least": {"x": 2}}, ["at_least: the pattern 'x' matches no layer"]),
        ({"at_least": 10}, ["at_least = 10 is more than layer '2' (channel)", "9 groups"]),
        (
            {"at_least": 0.9, "at_most": 0.5},
            ["at_least = 0.9, 9 groups", "above at_most = 0.5, 4 groups", "layer '2'"],
        ),
        (
            {"at_least": 5, "at_most": 7, "multiple_of": 4},
            ["at_least = 5, 8 groups in steps of 4", "at_most = 7, 4 groups in steps of 4"],
        ),
        ({"k": 2, "at_least": 4, "scope": "global"}, ["k = 2", "4", "at_least, multiple_of"]),
    ],
)
def test_limits_beyond_a_layer(arguments, words):
    with raises_naming(*words):
        group_parameters(mlp(3, 9, 2), **arguments)


def test_a_size_that_the_floors_do_not_allow():
    with raises_naming("k = 0.1", "must lie between", "(at_least, multiple_of) may leave"):
        group_parameters(
            network(),
            "structure",
            0.1,
            scope="global",
            costs="flops",
            example_input=EXAMPLE,
            at_least=0.5,
        )

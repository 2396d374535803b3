"""Budgets, groupings of one's own, and models in which nothing can be grouped."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_wgsef import GroupedLayer, Groups, Member, group_parameters, prox_multipliers
from lightning_wgsef.groupings.budget import check_budget
from lightning_wgsef.groupings.per_layer import channel_groups, filter_groups
from lightning_wgsef.groupings.registry import check_grouping
from tests.helpers.groups import OF_ANY_LAYER, mlp, names, raises_naming, stages, without

# --- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "kept"),
    [
        (1, 1),
        (6, 6),
        (0.1, 1),  # 0.6 rounds to 1
        (0.01, 1),  # at least one
        (0.25, 2),  # 1.5 rounds up
        (0.24, 1),
        (0.5, 3),
        (0.75, 5),  # 4.5 rounds up, not to the even number
        (0.99, 6),
        (1.0, 6),
        (Fraction(1, 3), 2),
        (np.int64(4), 4),
        (np.uint8(4), 4),
        (np.float32(0.5), 3),
        (np.float64(0.5), 3),
        (np.float16(0.5), 3),
    ],
)
def test_budget_of_six_groups(k, kept):
    groups = group_parameters(mlp(3, 6, 2), "channel", k)
    assert groups.budgets.tolist() == [kept]


@pytest.mark.parametrize("kind", [float, np.float16, np.float32, np.float64])
def test_budget_of_many_groups(kind):
    """Half of 90 000 and 0.5 are exact in every type; the product is not in half precision."""
    groups = group_parameters(nn.Linear(300, 300), "element", kind(0.5))
    assert groups.budgets.tolist() == [45_000]


def test_every_layer_has_its_own_budget():
    groups = group_parameters(mlp(3, 4, 10, 20, 2), "channel", 0.3)
    assert groups.budgets.tolist() == [1, 3, 6]
    assert groups.counts == [4, 10, 20]


def test_a_mapping_of_budgets():
    k = {"b.0": 2, "b": 0.5, "head": np.float64(0.1)}
    groups = group_parameters(stages(), "channel", k)
    assert names(groups) == ["b.0", "b.2", "head"]
    # The first pattern that matches counts: "b" stands for b.0 as well, but comes second.
    assert groups.budgets.tolist() == [2, 3, 1]
    assert groups.left_out["a.2"] == "no pattern of k matches it"
    swapped = group_parameters(stages(), "channel", {"b": 0.5, "b.0": 2})
    assert swapped.budgets.tolist() == [3, 3]


def test_a_mapping_does_not_override_the_rules():
    groups = group_parameters(stages(), "channel", {"a.0": 1, "*": 2})
    assert names(groups) == ["a.2", "b.0", "b.2", "head"]
    assert "first layer" in groups.left_out["a.0"]
    named = group_parameters(stages(), "channel", {"a.0": 1, "*": 2}, include=["a.0", "head"])
    assert named.budgets.tolist() == [1, 2]


BAD_BUDGETS = [0, -1, 1.5, 0.0, -0.5, math.nan, math.inf, True, False, "a", "0.5", None, 1j]
BAD_BUDGETS += [np.int64(0), np.float64("nan"), np.bool_(True), np.float32(1.5), [0.5], (1,)]
ACCEPTED = "must be a number of groups (int >= 1) or a share (float in (0, 1])"


@pytest.mark.parametrize("k", BAD_BUDGETS, ids=repr)
def test_bad_budgets(k):
    with raises_naming(f"k {ACCEPTED}", f"got {k!r}"):
        group_parameters(mlp(3, 6, 2), "channel", k)
    with raises_naming(f"k['2'] {ACCEPTED}", f"got {k!r}"):
        group_parameters(mlp(3, 6, 2), "channel", {"2": k})
    with raises_naming(f"k['x*'] {ACCEPTED}", f"got {k!r}"):
        check_budget({"2": 0.5, "x*": k})


def test_an_empty_mapping():
    with raises_naming("k is an empty mapping", "at least one pattern"):
        group_parameters(mlp(3, 6, 2), "channel", {})


@pytest.mark.parametrize("k", [7, np.int64(7), {"2": 0.5, "4": 7}])
def test_more_than_there_are(k):
    with raises_naming("k = 7", "the 4 groups of layer '4'", "(channel)"):
        group_parameters(mlp(3, 8, 4, 2), "channel", k)


def test_good_budgets_pass_the_check():
    for k in (1, 10**9, 1e-9, 1.0, {"a": 1, "b": 0.5}, np.float32(0.5)):
        assert check_budget(k) is None


# --- groupings of one's own --------------------------------------------------------------------


def scales(model, costs=None):
    """Compete with the scales of norms."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            member = Member(f"{name}.weight", module.weight, (0,))
            count = len(module.weight)
            layers.append(GroupedLayer(name, "scale", count, (member,), costs=costs))
    return Groups(layers, {"the rest": "no norm"})


def test_a_function():
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
    groups = group_parameters(network, scales, 0.5)
    assert names(groups) == ["1"]
    assert groups.budgets.tolist() == [3]
    assert groups.left_out == {"the rest": "no norm"}
    without(groups, 2)
    assert network[1].weight.tolist() == [1, 1, 0, 1, 1, 1]


def test_budgets_in_units_of_cost():
    network = nn.Sequential(nn.BatchNorm2d(4))
    costs = torch.tensor([1.0, 2.0, 3.0, 4.0])
    half = group_parameters(network, lambda model: scales(model, costs), 0.5)
    assert half.budgets.tolist() == [5]
    assert half.costs.tolist() == [1, 2, 3, 4]
    counted = group_parameters(network, lambda model: scales(model, costs), 7)
    assert counted.budgets.tolist() == [7]
    with raises_naming("k = 11", "layer '0'"):
        group_parameters(network, lambda model: scales(model, costs), 11)


def test_a_share_that_no_group_fits_is_refused():
    """A tenth of 30 is less than any group costs: the projection would kill the whole layer."""
    costs = torch.tensor([10.0, 10.0, 10.0])
    network = nn.Sequential(nn.BatchNorm2d(3))
    with raises_naming("k = 0.1", "30", "10", "layer '0'"):
        group_parameters(network, lambda model: scales(model, costs), 0.1)


def test_the_strongest_group_fits_a_small_share_of_uneven_costs():
    """Projection goes by strength: if the first does not fit, none is kept."""
    costs, network = torch.tensor([10.0, 1.0]), nn.Sequential(nn.BatchNorm2d(2))
    network[0].weight.data = torch.tensor([30.0, 1.0])
    groups = group_parameters(network, lambda model: scales(model, costs), 0.1)
    factors = prox_multipliers(groups.norms(), 1.0, groups.budgets, costs=groups.costs, debias=1.0)
    assert factors.count_nonzero() >= 1


def test_overlapping_groups_are_refused():
    def rows_and_columns(model):
        rows, columns = filter_groups(model).layers[1], channel_groups(model).layers[1]
        return Groups([rows, replace(columns, name="columns")])

    with raises_naming("overlap", "'2.weight'", "(filter)", "(channel)"):
        group_parameters(mlp(3, 4, 5, 2), rows_and_columns)


@pytest.mark.parametrize("returned", [None, [], {}, 3])
def test_a_function_that_returns_something_else(returned):
    def mine(model):
        return returned

    with raises_naming("grouping", "must return Groups", "mine", type(returned).__name__):
        group_parameters(mlp(3, 4, 2), mine)


@pytest.mark.parametrize("grouping", ["chanel", "", "Channel", None, 3, ["channel"], {"channel"}])
def test_unknown_groupings(grouping):
    with raises_naming("grouping must be 'channel', 'element', 'expert',", f"got {grouping!r}"):
        group_parameters(mlp(3, 4, 2), grouping)


@pytest.mark.parametrize("grouping", [*OF_ANY_LAYER, scales, filter_groups])
def test_known_groupings_pass_the_check(grouping):
    assert check_grouping(grouping) is None


# --- models without groups ---------------------------------------------------------------------


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
def test_a_model_without_weights(grouping):
    with raises_naming("Sequential has no layer", repr(grouping), "no weights"):
        group_parameters(nn.Sequential(nn.ReLU()), grouping)


def test_a_model_without_groupable_layers():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(3, 2))
    with raises_naming("Sequential has no layer", "'channel'", "0: Embedding", "1: first layer"):
        group_parameters(network, "channel")


def test_nothing_is_left():
    with raises_naming("has no layer", "'channel'", "2: named in exclude", "0: first layer"):
        group_parameters(mlp(3, 4, 2), "channel", exclude="2")
    with raises_naming("has no layer", "'channel'", "2: not named in include"):
        group_parameters(mlp(3, 4, 2), "channel", include=[])


def test_a_function_without_groups_is_named():
    with raises_naming("has no layer", "'scales'", "the rest: no norm"):
        group_parameters(mlp(3, 4, 2), scales)
    with raises_naming("has no layer", "'custom'"):  # a partial function has no name
        group_parameters(mlp(3, 4, 2), partial(scales, costs=None))

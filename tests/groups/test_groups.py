"""Groups of several layers, of parameters without weights, and of weights in two groups."""

import math

import pytest
import torch
from torch import nn

from lightning_wgsef import GroupedLayer, Groups, Member
from tests.helpers.groups import (
    dense_columns,
    dense_rows,
    layer_of,
    parameter,
    raises_naming,
    slow_norms,
    slow_scaled,
    some_in_no_group,
)

# --- parameters without weights ----------------------------------------------------------------


def test_groups_of_no_weights():
    weight = nn.Parameter(torch.zeros(3, 0))
    groups = Groups([GroupedLayer("a", "mine", 3, (Member("w", weight, (0,)),))])
    assert groups.norms().tolist() == [0, 0, 0]
    assert groups.sizes.tolist() == [0, 0, 0]
    groups.scale_(torch.zeros(3))
    assert weight.shape == (3, 0)


@pytest.mark.parametrize("axes", [(0,), (0, 1), (0, 1, 2)])
def test_no_groups(axes):
    weight = nn.Parameter(torch.zeros(0, 3, 2))
    groups = Groups([GroupedLayer("a", "mine", 0, (Member("w", weight, axes),))])
    assert len(groups) == 0
    assert groups.norms().shape == (0,)
    groups.scale_(torch.zeros(0))
    assert groups.split(torch.zeros(0))["a"].shape == (0,)


def test_no_groups_can_be_printed():
    weight = nn.Parameter(torch.zeros(0, 3))
    groups = Groups([GroupedLayer("a", "mine", 0, (Member("w", weight, (0,)),))])
    assert "a" in str(groups)


def test_empty_index():
    """No slice is in a group: all groups are empty."""
    weight = nn.Parameter(torch.zeros(0, 3))
    index = torch.zeros(0, dtype=torch.long)
    groups = Groups([GroupedLayer("a", "mine", 2, (Member("w", weight, (0,), index),))])
    assert groups.norms().tolist() == [0, 0]


# --- Groups ------------------------------------------------------------------------------------


@pytest.fixture
def three():
    """Layers of 3, 5 and 2 groups."""
    return Groups(
        [
            layer_of(dense_rows, budget=2),
            layer_of(dense_columns, costs=torch.arange(1.0, 6.0), removable=True),
            layer_of(some_in_no_group, weights=torch.tensor([2.0, 4.0]), budget=0.5),
        ],
        {"head": "named in exclude"},
    )


def test_vectors_over_all_groups(three):
    assert len(three) == 10
    assert three.counts == [3, 5, 2]
    assert three.starts.tolist() == [0, 3, 8]
    assert three.segments.labels().tolist() == [0] * 3 + [1] * 5 + [2] * 2
    assert three.weights.tolist() == [1] * 8 + [2, 4]
    assert three.costs.tolist() == [1] * 3 + [1, 2, 3, 4, 5] + [1] * 2
    assert three.sizes.tolist() == [6] * 3 + [3] * 5 + [3] * 2
    assert three.budgets[[0, 2]].tolist() == [2, 0.5]
    assert 1e299 < three.budgets[1] < math.inf  # no budget: more than there can be groups
    assert three.budgets.dtype == torch.float64


def test_a_list_of_groups_is_not_laid_out(three):
    assert str(three)
    assert three.split(three.sizes).keys() == {layer.name for layer in three.layers}
    three.check_disjoint()
    three.only(["dense_rows"])
    assert "layout" not in vars(three)
    assert three.norms().shape == (10,)
    assert "layout" in vars(three)


def test_arguments_for_the_envelope(three):
    wanted = {"weights": three.weights, "costs": three.costs, "segments": three.segments}
    assert three.competition.keys() == wanted.keys()
    assert all(three.competition[name] is value for name, value in wanted.items())


def test_weights_and_costs_of_one_are_none():
    groups = Groups([layer_of(dense_rows), layer_of(dense_columns)])
    assert groups.weights is None
    assert groups.costs is None


def test_all_layers_at_once(three):
    factors = torch.linspace(0.1, 1, 10)
    wanted = [
        slow_scaled(layer, part.tolist())
        for layer, part in zip(three.layers, factors.split([3, 5, 2]), strict=True)
    ]
    slow = [norm for layer in three.layers for norm in slow_norms(layer)]
    assert three.norms().tolist() == pytest.approx(slow, rel=1e-6)
    three.scale_(factors)
    for layer, want in zip(three.layers, wanted, strict=True):
        got = {member.name: member.parameter.detach().double() for member in layer.members}
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_split(three):
    vector = torch.arange(10)
    parts = three.split(vector)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "dense_rows": [0, 1, 2],
        "dense_columns": [3, 4, 5, 6, 7],
        "some_in_no_group": [8, 9],
    }
    assert list(parts) == [layer.name for layer in three.layers]


def test_layers_of_one_name_are_refused(three):
    with raises_naming("names of layers must differ", "dense_rows"):
        Groups([*three.layers, three.layers[0]])


def test_only(three):
    some = three.only(["some_in_no_group", "dense_rows", "no such layer"])
    assert [layer.name for layer in some.layers] == ["dense_rows", "some_in_no_group"]
    assert some.segments.labels().tolist() == [0, 0, 0, 1, 1]
    assert some.budgets.tolist() == [2, 0.5]
    assert torch.equal(some.norms(), three.norms()[[0, 1, 2, 8, 9]])


def test_no_layers():
    groups = Groups([])
    assert len(groups) == 0
    assert groups.norms().shape == groups.sizes.shape == groups.segments.labels().shape == (0,)
    assert groups.split(torch.zeros(0)) == {}
    groups.check_disjoint()
    assert str(groups) == "layer  grouping  groups  weights each  budget  removable"


def test_the_mapping_given_is_not_kept():
    reasons = {"head": "named in exclude"}
    groups = Groups([], reasons)
    reasons["other"] = "later"
    assert groups.left_out == {"head": "named in exclude"}


def test_table():
    uneven = Member("fc.weight", parameter(3, 2), (0,), torch.tensor([0, 1, 1]))
    groups = Groups(
        [
            GroupedLayer("conv", "filter", 3, layer_of(dense_rows).members, True, budget=1.0),
            GroupedLayer("fc", "mine", 2, (uneven,)),
            GroupedLayer("head", "mine", 5, layer_of(dense_columns).members, budget=2.5),
        ],
        {"first": "the network's input", "emb": "an embedding"},
    )
    assert str(groups).splitlines() == [
        "layer  grouping  groups  weights each  budget  removable",
        "conv     filter       3             6       1        yes",
        "fc         mine       2           2-4       -         no",
        "head       mine       5             3     2.5         no",
        "left out: first: the network's input",
        "left out: emb: an embedding",
    ]


# --- one weight, one group ---------------------------------------------------------------------


def halves(weight, *, of):
    first, second = torch.tensor([0, 1, -1, -1]), torch.tensor([-1, -1, 0, 1])
    index = first if of == "upper" else second
    return GroupedLayer(of, "half", 2, (Member("fc.weight", weight, (0,), index),))


def rows(weight, name="rows"):
    return GroupedLayer(name, "row", 4, (Member("fc.weight", weight, (0,)),))


def columns(weight):
    return GroupedLayer("columns", "column", 3, (Member("fc.weight", weight, (1,)),))


def test_a_row_and_a_column_share_a_weight():
    weight = parameter(4, 3)
    with raises_naming("'fc.weight'", "'rows' (row)", "'columns' (column)"):
        Groups([rows(weight), columns(weight)]).check_disjoint()
    with raises_naming("'fc.weight'", "'rows' (row)", "'columns' (column)"):
        Groups([rows(weight)]).check_disjoint(Groups([columns(weight)]))


def test_a_row_may_miss_a_column():
    """Row 0 without its last weight, and the last column: disjoint, though rows meet columns."""
    weight = parameter(2, 3)
    entries = Member("fc.weight", weight, (0, 1), torch.tensor([0, 0, -1, -1, -1, -1]))
    column = Member("fc.weight", weight, (1,), torch.tensor([-1, -1, 0]))
    one, other = (GroupedLayer(str(m.axes), "mine", 1, (m,)) for m in (entries, column))
    Groups([one, other]).check_disjoint()
    crossing = Member("fc.weight", weight, (1,), torch.tensor([-1, 0, -1]))
    with raises_naming("'fc.weight'"):
        Groups([one, GroupedLayer("other", "mine", 1, (crossing,))]).check_disjoint()


def test_disjoint_halves():
    weight = parameter(4, 3)
    upper, lower = halves(weight, of="upper"), halves(weight, of="lower")
    Groups([upper, lower]).check_disjoint()
    Groups([upper]).check_disjoint(Groups([lower]))
    with raises_naming("'fc.weight'", "'upper' (half)", "'rows' (row)"):
        Groups([upper, lower, rows(weight)]).check_disjoint()


def test_the_same_weight_twice_in_a_layer():
    weight = parameter(4, 3)
    member = Member("fc.weight", weight, (0,))
    with raises_naming("'fc.weight'", "'fc' (row)"):
        Groups([GroupedLayer("fc", "row", 4, (member, member))]).check_disjoint()


def test_equal_values_are_not_the_same_weight():
    groups = Groups([rows(parameter(4, 3)), rows(parameter(4, 3), name="twin")])
    groups.check_disjoint()
    with raises_naming("'fc.weight'"):
        groups.check_disjoint(groups)
    assert len(groups) == 8

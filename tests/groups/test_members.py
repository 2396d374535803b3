"""Members and grouped layers: their slices, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from lightning_wgsef import GroupedLayer, Member
from tests.helpers.groups import filters_with_norm, layer_of, parameter, raises_naming


def test_slices():
    member = Member("w", parameter(4, 3, 2), (0, 2))
    assert (member.slices, member.slice_size) == (8, 3)
    assert Member("w", nn.Parameter(torch.zeros(0, 3)), (0,)).slices == 0


def test_along_broadcasts_with_the_parameter():
    per_group = torch.tensor([10.0, 20.0, 30.0])
    member = Member("w", parameter(4, 3, 2), (1,))
    assert member.along(per_group, 1.0).tolist() == [[[10], [20], [30]]]
    member = Member("w", parameter(4, 3), (0,), torch.tensor([2, -1, 0, 2]))
    assert member.along(per_group, 1.0).tolist() == [[30], [1], [10], [30]]
    assert member.along(per_group > 15, False).tolist() == [[True], [False], [False], [True]]


def test_largest_member():
    layer = layer_of(filters_with_norm)
    assert layer.largest_member.name == "conv.weight"


@pytest.mark.parametrize("axes", [(), (1, 0), (0, 0), (2,), (-1,), (0, 1, 2)])
def test_axes_are_checked(axes):
    with raises_naming("'fc.weight'", "axes", "(4, 3)", f"got {axes}"):
        Member("fc.weight", parameter(4, 3), axes)


def test_a_number_has_no_axes():
    with raises_naming("'scale'", "axes", "shape ()"):
        Member("scale", nn.Parameter(torch.tensor(1.0)), (0,))


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_the_shape_of_the_index_is_checked(shape):
    with raises_naming("'fc.weight'", "index", "4 slices", f"got shape {shape}"):
        Member("fc.weight", parameter(4, 3), (0,), torch.zeros(shape, dtype=torch.long))


def test_the_index_stays_within_the_groups():
    member = Member("fc.weight", parameter(4, 3), (0,), torch.tensor([0, 1, 3, -1]))
    assert GroupedLayer("fc", "mine", 4, (member,)).count == 4
    with raises_naming("'fc.weight'", "group 3", "'fc'", "3 groups"):
        GroupedLayer("fc", "mine", 3, (member,))


def test_an_index_below_minus_one_is_refused():
    with raises_naming("'fc.weight'", "-2"):
        member = Member("fc.weight", parameter(4, 3), (0,), torch.tensor([0, 1, -2, 0]))
        GroupedLayer("fc", "mine", 2, (member,))


@pytest.mark.parametrize("count", [3, 5])
def test_without_an_index_slices_are_groups(count):
    member = Member("fc.weight", parameter(4, 3), (0,))
    with raises_naming("'fc.weight'", "group 3", "'fc'", f"{count} groups"):
        GroupedLayer("fc", "mine", count, (member,))


BAD_WEIGHTS = [
    ([1.0, 2.0, 3.0], "(3,)"),
    ([[1.0, 2.0, 3.0, 4.0]], "(1, 4)"),
    ([1.0, 0.0, 1.0, 1.0], "0.0"),
    ([1.0, 1.0, -2.5, 1.0], "-2.5"),
    ([1.0, math.nan, 1.0, 1.0], "nan"),
]


@pytest.mark.parametrize("name", ["weights", "costs"])
@pytest.mark.parametrize("values", [values for values, _ in BAD_WEIGHTS])
def test_weights_and_costs_are_checked(name, values):
    member = Member("fc.weight", parameter(4, 3), (0,))
    with raises_naming(name, "'fc'", "positive", "(4,)"):
        GroupedLayer("fc", "mine", 4, (member,), **{name: torch.tensor(values)})


@pytest.mark.parametrize("name", ["weights", "costs"])
@pytest.mark.parametrize(("values", "given"), BAD_WEIGHTS)
def test_bad_weights_and_costs_are_shown(name, values, given):
    member = Member("fc.weight", parameter(4, 3), (0,))
    with raises_naming("got", given):
        GroupedLayer("fc", "mine", 4, (member,), **{name: torch.tensor(values)})

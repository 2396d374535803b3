"""Norms, sizes and scaling of slices against slow loops over single weights in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_wgsef import GroupedLayer, Groups, Member
from lightning_wgsef.groupings.per_layer import channel_groups, filter_groups
from lightning_wgsef.groups.grouped_layer import with_values
from tests.helpers.groups import (
    dense_columns,
    dense_rows,
    filters_with_norm,
    layer_of,
    owners,
    parameter,
    slow_norms,
    slow_scaled,
    some_in_no_group,
)


def slow_sizes(layer):
    groups = np.concatenate([owners(member).ravel() for member in layer.members])
    return [int((groups == group).sum()) for group in range(layer.count)]


def channels(dtype):
    return 3, (Member("conv.weight", parameter(4, 3, 2, 2, dtype=dtype), (1,)),)


def filter_shape(dtype):
    return 12, (Member("conv.weight", parameter(4, 3, 2, 2, dtype=dtype), (1, 2, 3)),)


def single_weights(dtype):
    return 12, (Member("conv.weight", parameter(2, 3, 2, dtype=dtype), (0, 1, 2)),)


def last_axis(dtype):
    return 2, (Member("conv.weight", parameter(4, 3, 2, dtype=dtype), (2,)),)


def channels_of_grouped_convolution(dtype):
    weight = parameter(4, 2, 3, dtype=dtype)  # 2 parts of 2 filters, each reading 2 of 4 channels
    return 4, (Member("conv.weight", weight, (0, 1), torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])),)


def filters_of_grouped_transposed_convolution(dtype):
    weight, bias = parameter(4, 3, 2, dtype=dtype), parameter(6, dtype=dtype, seed=1)
    index = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    return 6, (Member("up.weight", weight, (0, 1), index), Member("up.bias", bias, (0,)))


def several_slices_each(dtype):
    index = torch.tensor([2, 0, 2, -1, 0, 2])
    return 3, (Member("fc.weight", parameter(6, 2, dtype=dtype), (0,), index),)  # group 1: none


def same_parameter_twice(dtype):
    weight = parameter(4, 2, dtype=dtype)
    first, second = torch.tensor([0, 1, -1, -1]), torch.tensor([-1, -1, 1, 0])
    return 2, (
        Member("fc.weight", weight, (0,), first),
        Member("fc.weight", weight, (0,), second),
    )


def one_dimension(dtype):
    return 5, (Member("scale", parameter(5, dtype=dtype), (0,)),)


LAYOUTS = [
    dense_rows,
    dense_columns,
    filters_with_norm,
    channels,
    filter_shape,
    single_weights,
    last_axis,
    channels_of_grouped_convolution,
    filters_of_grouped_transposed_convolution,
    some_in_no_group,
    several_slices_each,
    same_parameter_twice,
    one_dimension,
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# --- norms, sizes and scaling ------------------------------------------------------------------


@every_layout
@every_dtype
def test_norms(layout, dtype):
    layer = layer_of(layout, dtype)
    norms = Groups([layer]).norms()
    wide = dtype == torch.float64
    assert norms.dtype == (torch.float64 if wide else torch.float32)
    assert norms.shape == (layer.count,)
    assert not norms.requires_grad
    # 24 squares at most, accumulated in the norms' type: well under ten units in the last place.
    bound = 10 * torch.finfo(norms.dtype).eps
    assert norms.tolist() == pytest.approx(slow_norms(layer), rel=bound)


@every_layout
@every_dtype
def test_alive(layout, dtype):
    """One weight left in a group, wherever it is, keeps the group alive."""
    layer = layer_of(layout, dtype)
    groups, sizes = Groups([layer]), slow_sizes(layer)
    assert groups.alive().dtype == torch.bool
    assert groups.alive().tolist() == [size > 0 for size in sizes]
    with torch.no_grad():
        for member in layer.members:
            member.parameter.zero_()
    assert not groups.alive().any()
    for member in layer.members:
        same = [owners(other) for other in layer.members if other.parameter is member.parameter]
        for place in np.ndindex(*member.parameter.shape):
            member.parameter.data[place] = torch.finfo(dtype).tiny
            claims = {int(groups_of[place]) for groups_of in same} - {-1}
            assert set(groups.alive().nonzero().flatten().tolist()) == claims
            member.parameter.data[place] = -0.0
            assert not groups.alive().any()


def test_alive_in_other_values():
    layer = layer_of(dense_rows)
    values = {"fc.weight": torch.zeros(3, 5), "fc.bias": torch.tensor([0.0, 1e-30, math.nan])}
    assert Groups(with_values([layer], values)).alive().tolist() == [False, True, True]


@every_layout
def test_sizes(layout):
    layer = layer_of(layout)
    assert layer.sizes().dtype == torch.float64
    assert layer.sizes().tolist() == slow_sizes(layer)
    assert Groups([layer]).sizes.tolist() == slow_sizes(layer)


@every_layout
@every_dtype
def test_scale(layout, dtype):
    layer = layer_of(layout, dtype)
    groups = Groups([layer])
    factors = torch.rand(layer.count, generator=torch.Generator().manual_seed(7))
    wanted = slow_scaled(layer, factors.tolist())
    groups.scale_(factors)
    for member in layer.members:
        # The factor is rounded to the weight's type, then the product: half a unit each.
        bound = 1.01 * torch.finfo(dtype).eps
        got = member.parameter.detach().double()
        torch.testing.assert_close(got, wanted[member.name], rtol=bound, atol=0)


@every_layout
@every_dtype
def test_scale_by_one_changes_no_bit_and_by_zero_kills(layout, dtype):
    layer = layer_of(layout, dtype)
    groups = Groups([layer])
    before = [member.parameter.detach().clone() for member in layer.members]
    groups.scale_(torch.ones(layer.count))
    for member, old in zip(layer.members, before, strict=True):
        assert torch.equal(member.parameter, old)
    groups.scale_(torch.zeros(layer.count))
    assert groups.norms().tolist() == [0] * layer.count
    for member, old in zip(layer.members, before, strict=True):
        outside = torch.as_tensor(owners(member) < 0)
        if layout is not same_parameter_twice:
            assert torch.equal(member.parameter[outside], old[outside])


@pytest.mark.parametrize("seed", range(20))
def test_random_groups(seed):
    """Any shape, any axes, any index: norms, sizes and scaling agree with the loops."""
    rng = np.random.default_rng(seed)
    count, members = int(rng.integers(1, 6)), []
    for number in range(rng.integers(1, 4)):
        shape = rng.integers(1, 4, size=rng.integers(1, 5)).tolist()
        length = rng.integers(1, len(shape) + 1)
        axes = sorted(rng.choice(len(shape), size=length, replace=False).tolist())
        slices = math.prod(shape[axis] for axis in axes)
        index = torch.as_tensor(rng.integers(-1, count, size=slices))
        weights = nn.Parameter(torch.as_tensor(rng.normal(size=shape)))
        members.append(Member(f"p{number}", weights, tuple(axes), index))
    layer = GroupedLayer("random", "mine", count, tuple(members))
    groups = Groups([layer])
    assert layer.sizes().tolist() == slow_sizes(layer)
    assert groups.norms().tolist() == pytest.approx(slow_norms(layer), rel=1e-14)
    factors = rng.uniform(size=count)
    wanted = slow_scaled(layer, factors)
    groups.scale_(torch.as_tensor(factors))
    for member in members:
        assert torch.equal(member.parameter.detach(), wanted[member.name])


def test_int32_index():
    weight = parameter(4, 3)
    layers = [
        GroupedLayer("a", "mine", 2, (Member("w", weight, (0,), index),))
        for index in (torch.tensor([1, -1, 0, 1]), torch.tensor([1, -1, 0, 1], dtype=torch.int32))
    ]
    long, short = (Groups([layer]) for layer in layers)
    assert torch.equal(long.norms(), short.norms())
    before = weight.detach().clone()
    short.scale_(torch.tensor([0.0, 0.5]))
    assert torch.equal(weight, before * torch.tensor([0.5, 1, 0, 0.5])[:, None])


def test_what_is_in_no_group_has_no_say():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [math.nan, math.inf], [1.0, 0.0]]))
    member = Member("w", weight, (0,), torch.tensor([0, -1, 1]))
    groups = Groups([GroupedLayer("a", "mine", 2, (member,))])
    assert groups.norms().tolist() == [5, 1]
    assert groups.sizes.tolist() == [2, 2]
    groups.scale_(torch.zeros(2))
    assert weight[[0, 2]].count_nonzero() == 0
    assert weight[1].isnan().tolist() == [True, False]
    assert weight[1].isinf().tolist() == [False, True]


def test_scale_edits_in_place():
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    weight = layer.weight
    layer(torch.ones(1, 4, 5, 5)).sum().backward()
    gradient, address, strides = weight.grad.clone(), weight.data_ptr(), weight.stride()
    groups = channel_groups(layer)
    groups.scale_(torch.tensor([1.0, 0.0, 0.5, 1.0]))
    assert layer.weight is weight
    assert (weight.data_ptr(), weight.stride()) == (address, strides)
    assert weight.requires_grad
    assert weight.is_leaf
    assert torch.equal(weight.grad, gradient)
    assert weight[:, 1].count_nonzero() == 0


def test_all_zero_groups():
    weight = nn.Parameter(torch.zeros(3, 4))
    groups = Groups([GroupedLayer("a", "mine", 3, (Member("w", weight, (0,)),))])
    assert groups.norms().tolist() == [0, 0, 0]
    groups.scale_(torch.tensor([0.0, 0.5, 1.0]))
    assert weight.count_nonzero() == 0


def test_float64_anywhere_makes_all_norms_float64():
    wide, narrow = layer_of(dense_rows, torch.float64), layer_of(dense_columns, torch.bfloat16)
    groups = Groups([wide, narrow])
    assert groups.norms().dtype == torch.float64
    wanted = slow_norms(wide) + slow_norms(narrow)
    assert groups.norms().tolist() == pytest.approx(wanted, rel=1e-14)


def test_bfloat16_norms_are_accumulated_in_float32():
    weight = nn.Parameter(torch.ones(1, 4096, dtype=torch.bfloat16))
    groups = Groups([GroupedLayer("a", "mine", 1, (Member("w", weight, (0,)),))])
    assert groups.norms().item() == 64  # a sum in bfloat16 stops at 256


@pytest.mark.parametrize("bias", [True, False])
def test_a_missing_bias_is_no_member(bias):
    network = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Linear(4, 2))
    layer = filter_groups(network).layers[0]
    assert [member.name for member in layer.members] == ["0.weight", "0.bias"][: 1 + bias]
    assert layer.sizes().tolist() == [3 + bias] * 4

"""Groups of slices against slow loops over single weights in float64."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from lightning_wgsef import GroupedLayer, Groups, Member
from lightning_wgsef.groupings.channels import channel_groups
from lightning_wgsef.groupings.filters import filter_groups


@contextmanager
def refused(*words):
    """The block raises a plain ValueError whose message has all these words."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        yield
    assert caught.type is ValueError
    missing = [word for word in words if word not in str(caught.value)]
    assert missing == [], str(caught.value)


def parameter(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter(values.to(dtype))


def owners(member):
    """The group of every single weight, -1 for none."""
    shape = member.parameter.shape
    groups = np.empty(shape, dtype=int)
    sizes = [shape[axis] for axis in member.axes]
    for place in np.ndindex(*shape):
        number = int(np.ravel_multi_index([place[axis] for axis in member.axes], sizes))
        groups[place] = number if member.index is None else int(member.index[number])
    return groups


def slow_norms(layer, values=None):
    squares = [0.0] * layer.count
    for member in layer.members:
        tensor = member.parameter if values is None else values[member.name]
        weights = tensor.detach().double().numpy()
        for place, group in np.ndenumerate(owners(member)):
            if group >= 0:
                squares[group] += float(weights[place]) ** 2
    return [math.sqrt(square) for square in squares]


def slow_sizes(layer):
    groups = np.concatenate([owners(member).ravel() for member in layer.members])
    return [int((groups == group).sum()) for group in range(layer.count)]


def slow_scaled(layer, factors):
    """Every parameter of the layer by its name, with each of its weights scaled."""
    scaled = {m.name: m.parameter.detach().double().numpy().copy() for m in layer.members}
    for member in layer.members:
        for place, group in np.ndenumerate(owners(member)):
            if group >= 0:
                scaled[member.name][place] *= factors[group]
    return {name: torch.as_tensor(weights) for name, weights in scaled.items()}


def dense_rows(dtype):
    weight, bias = parameter(3, 5, dtype=dtype), parameter(3, dtype=dtype, seed=1)
    return 3, (Member("fc.weight", weight, (0,)), Member("fc.bias", bias, (0,)))


def dense_columns(dtype):
    return 5, (Member("fc.weight", parameter(3, 5, dtype=dtype), (1,)),)


def filters_with_norm(dtype):
    vectors = [
        Member(name, parameter(4, dtype=dtype, seed=seed), (0,))
        for seed, name in enumerate(("conv.bias", "norm.weight", "norm.bias"), start=1)
    ]
    return 4, (Member("conv.weight", parameter(4, 3, 2, 2, dtype=dtype), (0,)), *vectors)


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


def some_in_no_group(dtype):
    index = torch.tensor([1, -1, 0, -1])
    return 2, (Member("fc.weight", parameter(4, 3, dtype=dtype), (0,), index),)


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


def layer_of(layout, dtype=torch.float32, **more):
    count, members = layout(dtype)
    return GroupedLayer(layout.__name__, "mine", count, members, **more)


# --- norms, sizes and scaling -----------------------------------------------------------------


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
def test_norms_of_other_values(layout):
    layer = layer_of(layout)
    values = {member.name: 2 * member.parameter.detach() + 1 for member in layer.members}
    norms = Groups([layer]).norms(values)
    assert norms.tolist() == pytest.approx(slow_norms(layer, values), rel=1e-6)


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
    assert Groups([layer]).alive(values).tolist() == [False, True, True]


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


# --- Member and GroupedLayer -------------------------------------------------------------------


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
    with refused("'fc.weight'", "axes", "(4, 3)", f"got {axes}"):
        Member("fc.weight", parameter(4, 3), axes)


def test_a_number_has_no_axes():
    with refused("'scale'", "axes", "shape ()"):
        Member("scale", nn.Parameter(torch.tensor(1.0)), (0,))


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_the_shape_of_the_index_is_checked(shape):
    with refused("'fc.weight'", "index", "4 slices", f"got shape {shape}"):
        Member("fc.weight", parameter(4, 3), (0,), torch.zeros(shape, dtype=torch.long))


def test_the_index_stays_within_the_groups():
    member = Member("fc.weight", parameter(4, 3), (0,), torch.tensor([0, 1, 3, -1]))
    assert GroupedLayer("fc", "mine", 4, (member,)).count == 4
    with refused("'fc.weight'", "group 3", "'fc'", "3 groups"):
        GroupedLayer("fc", "mine", 3, (member,))


def test_an_index_below_minus_one_is_refused():
    with refused("'fc.weight'", "-2"):
        member = Member("fc.weight", parameter(4, 3), (0,), torch.tensor([0, 1, -2, 0]))
        GroupedLayer("fc", "mine", 2, (member,))


@pytest.mark.parametrize("count", [3, 5])
def test_without_an_index_slices_are_groups(count):
    member = Member("fc.weight", parameter(4, 3), (0,))
    with refused("'fc.weight'", "group 3", "'fc'", f"{count} groups"):
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
    with refused(name, "'fc'", "positive", "(4,)"):
        GroupedLayer("fc", "mine", 4, (member,), **{name: torch.tensor(values)})


@pytest.mark.parametrize("name", ["weights", "costs"])
@pytest.mark.parametrize(("values", "given"), BAD_WEIGHTS)
def test_bad_weights_and_costs_are_shown(name, values, given):
    member = Member("fc.weight", parameter(4, 3), (0,))
    with refused("got", given):
        GroupedLayer("fc", "mine", 4, (member,), **{name: torch.tensor(values)})


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
    assert three.segments.tolist() == [0] * 3 + [1] * 5 + [2] * 2
    assert three.weights.tolist() == [1] * 8 + [2, 4]
    assert three.costs.tolist() == [1] * 3 + [1, 2, 3, 4, 5] + [1] * 2
    assert three.sizes.tolist() == [6] * 3 + [3] * 5 + [3] * 2
    assert three.budgets[[0, 2]].tolist() == [2, 0.5]
    assert 1e299 < three.budgets[1] < math.inf  # no budget: more than there can be groups
    assert three.budgets.dtype == torch.float64


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
    with refused("names of layers must differ", "dense_rows"):
        Groups([*three.layers, three.layers[0]])


def test_only(three):
    some = three.only(["some_in_no_group", "dense_rows", "no such layer"])
    assert [layer.name for layer in some.layers] == ["dense_rows", "some_in_no_group"]
    assert some.segments.tolist() == [0, 0, 0, 1, 1]
    assert some.budgets.tolist() == [2, 0.5]
    assert torch.equal(some.norms(), three.norms()[[0, 1, 2, 8, 9]])


def test_no_layers():
    groups = Groups([])
    assert len(groups) == 0
    assert groups.norms().shape == groups.sizes.shape == groups.segments.shape == (0,)
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
    with refused("'fc.weight'", "'rows' (row)", "'columns' (column)"):
        Groups([rows(weight), columns(weight)]).check_disjoint()
    with refused("'fc.weight'", "'rows' (row)", "'columns' (column)"):
        Groups([rows(weight)]).check_disjoint(Groups([columns(weight)]))


def test_a_row_may_miss_a_column():
    """Row 0 without its last weight, and the last column: disjoint, though rows meet columns."""
    weight = parameter(2, 3)
    entries = Member("fc.weight", weight, (0, 1), torch.tensor([0, 0, -1, -1, -1, -1]))
    column = Member("fc.weight", weight, (1,), torch.tensor([-1, -1, 0]))
    one, other = (GroupedLayer(str(m.axes), "mine", 1, (m,)) for m in (entries, column))
    Groups([one, other]).check_disjoint()
    crossing = Member("fc.weight", weight, (1,), torch.tensor([-1, 0, -1]))
    with refused("'fc.weight'"):
        Groups([one, GroupedLayer("other", "mine", 1, (crossing,))]).check_disjoint()


def test_disjoint_halves():
    weight = parameter(4, 3)
    upper, lower = halves(weight, of="upper"), halves(weight, of="lower")
    Groups([upper, lower]).check_disjoint()
    Groups([upper]).check_disjoint(Groups([lower]))
    with refused("'fc.weight'", "'upper' (half)", "'rows' (row)"):
        Groups([upper, lower, rows(weight)]).check_disjoint()


def test_the_same_weight_twice_in_a_layer():
    weight = parameter(4, 3)
    member = Member("fc.weight", weight, (0,))
    with refused("'fc.weight'", "'fc' (row)"):
        Groups([GroupedLayer("fc", "row", 4, (member, member))]).check_disjoint()


def test_equal_values_are_not_the_same_weight():
    groups = Groups([rows(parameter(4, 3)), rows(parameter(4, 3), name="twin")])
    groups.check_disjoint()
    with refused("'fc.weight'"):
        groups.check_disjoint(groups)
    assert len(groups) == 8

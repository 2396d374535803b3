"""What the names of groupings promise, shown on the networks' outputs; and which layers they take.

A group is zeroed with `Groups.scale_`, as the proximal step does, and the network is run.
"""

import copy
import itertools
import math
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from test_groups import refused
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wgsef import GroupedLayer, Groups, Member, group_parameters, prox_multipliers
from lightning_wgsef.groupings.channels import channel_groups
from lightning_wgsef.groupings.elements import element_groups
from lightning_wgsef.groupings.filters import filter_groups
from lightning_wgsef.groupings.layers import canonical_name, weighted_layers
from lightning_wgsef.groupings.registry import GROUPINGS, check_budget, check_grouping

# Every kind of layer with 4 inputs and 8 outputs (depthwise: as many as inputs), and an input.
LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 6, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 2), (2, 4, 3, 4, 3)),
    "Conv1d, 2 parts": (lambda: nn.Conv1d(4, 8, 3, groups=2), (2, 4, 7)),
    "Conv2d, 2 parts": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "Conv3d, 2 parts": (lambda: nn.Conv3d(4, 8, 2, groups=2), (2, 4, 3, 3, 3)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "Conv2d, depthwise, two each": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 8, 3), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2), (2, 4, 3, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 8, 2), (2, 4, 2, 3, 2)),
    "ConvTranspose1d, 2 parts": (lambda: nn.ConvTranspose1d(4, 8, 3, groups=2), (2, 4, 5)),
    "ConvTranspose2d, 2 parts": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), (2, 4, 3, 3)),
    "ConvTranspose3d, 2 parts": (lambda: nn.ConvTranspose3d(4, 8, 2, groups=2), (2, 4, 2, 2, 2)),
    "ConvTranspose2d, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 3, 3)),
    "Linear": (lambda: nn.Linear(4, 8), (6, 4)),
    "Linear, no bias": (lambda: nn.Linear(4, 8, bias=False), (6, 4)),
}
NORMS = {
    "batch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "instance": {
        n: lambda width, kind=kind: kind(width, affine=True)
        for n, kind in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), start=1)
    },
    "group": dict.fromkeys((1, 2, 3), lambda width: nn.GroupNorm(2, width)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
in_both_modes = pytest.mark.parametrize("training", [True, False])


def made(kind, norm=None, seed=0):
    """A network of one layer, with its norm if named, and an input."""
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    modules = [make()]
    if norm is not None:
        width = modules[0](torch.ones(shape)).shape[1]
        modules.append(NORMS[norm][max(len(shape) - 2, 1)](width))
    network = nn.Sequential(*modules)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        # Of both signs, so that nothing vanishes or lasts by chance.
        network[0].weight.sub_(1)
    return network, torch.randn(shape)


def without(groups, number):
    """Zero one group."""
    factors = torch.ones(len(groups))
    factors[number] = 0
    groups.scale_(factors)


def mlp(*widths):
    """Dense layers "0", "2", .. with ReLU between them."""
    modules = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def names(groups):
    return [layer.name for layer in groups.layers]


def members(groups, layer):
    return [m.name for x in groups.layers if x.name == layer for m in x.members]


# --- filter ------------------------------------------------------------------------------------


@every_layer
def test_a_zero_filter_gives_zero(kind):
    network, inputs = made(kind)
    dense = network(inputs)
    width = dense.shape[1]
    assert (dense != 0).flatten(2).any(-1).all() if dense.dim() > 2 else (dense != 0).all()
    for number in range(width):
        pruned = copy.deepcopy(network)
        groups = group_parameters(pruned, "filter", 1.0, include="0")
        assert groups.counts == [width]
        without(groups, number)
        outputs = pruned(inputs)
        assert outputs[:, number].count_nonzero() == 0
        others = [other for other in range(width) if other != number]
        torch.testing.assert_close(outputs[:, others], dense[:, others])


@pytest.mark.parametrize(
    ("kind", "norm"),
    # An InstanceNorm needs a spatial dimension.
    [
        pair
        for pair in itertools.product(LAYERS, NORMS)
        if not (pair[0].startswith("Linear") and pair[1] == "instance")
    ],
)
@in_both_modes
def test_a_zero_filter_gives_zero_behind_its_norm(kind, norm, training):
    network, inputs = made(kind, norm)
    network.train(training)
    width = copy.deepcopy(network)(inputs).shape[1]
    for number in range(width):
        pruned = copy.deepcopy(network)
        assert pruned(inputs)[:, number].count_nonzero() > 0
        groups = group_parameters(pruned, "filter", 1.0, include="0")
        assert members(groups, "0")[-2:] == ["1.weight", "1.bias"]
        without(groups, number)
        assert pruned(inputs)[:, number].count_nonzero() == 0


@every_layer
def test_filters_own_weight_bias_and_norm(kind):
    network, _ = made(kind, "batch")
    layer = filter_groups(network).layers[0]
    total = sum(parameter.numel() for parameter in network.parameters())
    assert layer.sizes().tolist() == [total / layer.count] * layer.count
    assert layer.removable
    assert layer.grouping == "filter"


# --- channel -----------------------------------------------------------------------------------


@every_layer
def test_a_zero_channel_is_not_read(kind):
    network, inputs = made(kind)
    for number in range(4):
        changed = inputs.clone()
        changed[:, number] = torch.randn_like(changed[:, number])
        pruned = copy.deepcopy(network)
        assert not torch.equal(pruned(inputs), pruned(changed))
        groups = group_parameters(pruned, "channel", 1.0, include="0")
        assert groups.counts == [4]
        without(groups, number)
        assert torch.equal(pruned(inputs), pruned(changed))
        for other in set(range(4)) - {number}:  # the others still are
            changed = inputs.clone()
            changed[:, other] = torch.randn_like(changed[:, other])
            assert not torch.equal(pruned(inputs), pruned(changed))


@every_layer
def test_channels_own_the_weight_alone(kind):
    network, _ = made(kind, "batch")
    groups = channel_groups(network)
    assert members(groups, "0") == ["0.weight"]
    assert groups.sizes.tolist() == [network[0].weight.numel() / 4] * 4
    assert groups.layers[0].removable


# --- element -----------------------------------------------------------------------------------


@every_layer
def test_a_zero_element_is_one_weight(kind):
    network, _ = made(kind, "batch")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    groups = element_groups(network)
    assert members(groups, "0") == ["0.weight"]
    assert groups.counts == [network[0].weight.numel()]
    assert set(groups.sizes.tolist()) == {1}
    number = groups.counts[0] // 2
    without(groups, number)
    before["0.weight"].view(-1)[number] = 0
    after = network.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not groups.layers[0].removable


def test_elements_reserve_nothing():
    groups = group_parameters(mlp(3, 4, 2), "element", 0.5)
    assert names(groups) == ["0", "2"]
    assert groups.left_out == {}


# --- the norm that follows ---------------------------------------------------------------------


class Numbered(nn.Module):
    """conv1, bn1, .. in the given order, all eight wide unless named here."""

    def __init__(self, *order, **other):
        super().__init__()
        for name in order:
            kind = nn.Conv2d(8, 8, 3) if name.startswith("conv") else nn.BatchNorm2d(8)
            setattr(self, name, other.get(name, kind))


def norm_of(network, layer):
    found = {x.name: x.norm for x in weighted_layers(network)}[layer]
    return None if found is None else found[0]


def test_norms_in_sequentials():
    def stage(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())

    network = nn.Sequential(stage(3, 8), stage(8, 8), nn.Conv2d(8, 4, 1))
    assert [norm_of(network, name) for name in ("0.0", "1.0", "2")] == ["0.1", "1.1", None]
    groups = filter_groups(network)
    assert members(groups, "1.0") == ["1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]


def test_modules_without_parameters_do_not_separate():
    modules = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.BatchNorm2d(8)]
    assert norm_of(nn.Sequential(*modules), "0") == "4"


@pytest.mark.parametrize(
    "order",
    [
        ("conv1", "bn1", "conv2", "bn2"),
        ("conv1", "conv2", "bn1", "bn2"),
        ("conv1", "conv2", "bn2", "bn1"),
    ],
)
def test_norms_of_numbered_layers(order):
    network = Numbered(*order)
    assert [norm_of(network, name) for name in ("conv1", "conv2")] == ["bn1", "bn2"]


def test_the_right_norm_dies_with_the_filter():
    """conv1, conv2, bn1, bn2 of equal width: by position conv2 would take bn1."""
    network = Numbered("conv1", "conv2", "bn1", "bn2")
    nn.init.ones_(network.bn1.bias)
    nn.init.ones_(network.bn2.bias)
    without(filter_groups(network), 3)
    dead = [name for name, p in network.named_parameters() if p[3].count_nonzero() == 0]
    assert dead == ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"]
    assert network.conv2.weight.flatten(1).any(1).all()
    assert network.bn2.weight.count_nonzero() == 8


def test_a_norm_before_its_layer_is_not_taken():
    """Pre-activation order: bn2 follows conv1 but belongs to conv2."""
    network = Numbered("bn1", "conv1", "bn2", "conv2")
    assert [norm_of(network, name) for name in ("conv1", "conv2")] == [None, None]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(8, affine=False),
        nn.InstanceNorm2d(8),
        nn.GroupNorm(2, 8, affine=False),
        nn.LayerNorm(8),
        nn.PReLU(8),
    ],
    ids=str,
)
def test_what_is_no_following_norm(norm):
    """Another width, nothing to scale with, or normalised over something else than channels."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    assert norm_of(network, "0") is None
    assert members(filter_groups(network), "0") == ["0.weight", "0.bias"]
    assert norm_of(Numbered("conv1", "bn1", bn1=norm), "conv1") is None


def test_a_norm_behind_another_layer_is_not_taken():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    assert [norm_of(network, name) for name in ("0", "1")] == [None, "2"]


def test_what_has_parameters_separates():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.BatchNorm2d(8))
    assert norm_of(network, "0") is None


def test_one_norm_for_one_layer():
    """Of two layers with its number the nearer takes it; of two norms the nearer is taken."""
    network = Numbered("conv1", "convb1", "bn1")
    assert [norm_of(network, name) for name in ("conv1", "convb1")] == [None, "bn1"]
    assert norm_of(Numbered("conv1", "bn1", "bnb1"), "conv1") == "bn1"


def test_a_norm_shared_by_two_layers():
    """Both claim it: refused, until one of them is left out as the message says."""
    norm = nn.BatchNorm2d(4)
    first, second = nn.Sequential(nn.Conv2d(1, 4, 3), norm), nn.Sequential(nn.Conv2d(4, 4, 3), norm)
    network = nn.Sequential(first, second, nn.Conv2d(4, 2, 1))
    with refused("groups overlap", "'0.1.weight'", "'0.0'", "'1.0'", "exclude"):
        group_parameters(network, "filter")
    assert names(group_parameters(network, "filter", exclude="1.0")) == ["0.0"]


# --- layers left out by rule -------------------------------------------------------------------


def test_the_first_layer_keeps_its_channels_and_the_last_its_filters():
    network = mlp(3, 4, 5, 2)
    groups = group_parameters(network, "channel")
    assert names(groups) == ["2", "4"]
    assert groups.left_out == {"0": "first layer: its channels are the network's input"}
    groups = group_parameters(network, "filter")
    assert names(groups) == ["0", "2"]
    assert groups.left_out == {"4": "last layer: its filters are the network's outputs"}


def test_depthwise():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1, groups=2)
    )
    groups = group_parameters(network, "channel")
    assert names(groups) == ["2"]
    assert groups.left_out["1"] == "depthwise: every filter reads one channel only"
    assert names(group_parameters(network, "filter")) == ["0", "1"]


def test_one_channel_is_not_depthwise():
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1))
    assert names(group_parameters(network, "channel")) == ["1"]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_frozen(grouping):
    network = mlp(3, 4, 5, 6, 2)
    network[2].weight.requires_grad_(False)
    groups = group_parameters(network, grouping)
    assert "2" not in names(groups)
    assert "4" in names(groups)
    assert groups.left_out["2"] == "frozen: 2.weight has no gradient"


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_tied_weights(grouping):
    network = mlp(4, 4, 4, 4, 4)
    network[4].weight = network[2].weight
    groups = group_parameters(network, grouping)
    assert "2" in names(groups)
    assert groups.left_out["4"] == "its weight is that of '2' (tied)"


def test_a_layer_used_twice_is_one_layer():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(nn.Linear(3, 4), shared, shared, nn.Linear(4, 2))
    groups = group_parameters(network, "channel")
    assert names(groups) == ["1", "3"]
    assert groups.left_out.keys() == {"0"}


def test_a_layer_tied_to_an_embedding():
    """A language model's head: its columns are the embedding's, too."""
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    groups = group_parameters(nn.Sequential(embedding, mlp(4, 6, 4), head), "channel")
    assert names(groups) == ["1.2"]
    assert "tied" in groups.left_out["2"]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_parametrised(grouping):
    network = mlp(3, 4, 5, 6, 2)
    parametrizations.weight_norm(network[2])
    groups = group_parameters(network, grouping)
    assert "2" not in names(groups)
    assert "4" in names(groups)
    assert "parametrisation" in groups.left_out["2"]


def test_first_and_last_are_so_whether_they_can_be_grouped_or_not():
    network = mlp(3, 4, 5, 6, 2)
    parametrizations.weight_norm(network[0])
    parametrizations.weight_norm(network[6])
    assert names(group_parameters(network, "channel")) == ["2", "4"]
    assert names(group_parameters(network, "filter")) == ["2", "4"]


def test_the_parts_of_a_parametrisation_are_no_layers():
    network = mlp(3, 4, 5, 2)
    parametrizations.weight_norm(network[2])
    assert group_parameters(network).left_out.keys() == {"0", "2"}


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_lazy(grouping):
    network = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5), nn.Linear(5, 6), nn.Linear(6, 2))
    groups = group_parameters(network, grouping)
    assert "1" not in names(groups)
    assert "2" in names(groups)
    assert "lazy" in groups.left_out["1"]
    network(torch.ones(1, 3))
    assert "1" in names(group_parameters(network, grouping))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_lazy_norm(grouping):
    """Its width is not known yet: it follows no layer, or the layer says why it is left out."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LazyBatchNorm2d(), nn.Conv2d(4, 4, 3))
    groups = group_parameters(network, grouping, include=["0", "2"])
    assert "2" in names(groups)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_other_modules(grouping):
    modules = OrderedDict(
        words=nn.Embedding(5, 3),
        memory=nn.LSTM(3, 4),
        first=nn.Linear(4, 4),
        second=nn.Linear(4, 4),
        third=nn.Linear(4, 2),
        pairs=nn.Bilinear(2, 2, 2),
    )
    groups = group_parameters(nn.Sequential(modules), grouping)
    assert "second" in names(groups)
    kinds = "is none of Conv1d/2d/3d, ConvTranspose1d/2d/3d and Linear"
    assert groups.left_out["words"] == f"Embedding {kinds}"
    assert groups.left_out["memory"] == f"LSTM {kinds}"
    assert groups.left_out["pairs"] == f"Bilinear {kinds}"


def test_odd_weights():
    network = mlp(3, 4, 4, 2)
    network[2].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert group_parameters(network).left_out["2"] == "its weight is torch.int8"
    network[2] = nn.Linear(4, 4)
    network[2].weight = nn.Parameter(torch.zeros(4, 0))
    assert group_parameters(network).left_out["2"] == "its weight is empty"


# --- include and exclude -----------------------------------------------------------------------


def stages():
    """Layers a.0, a.2, b.0, b.2 and head, of 3, 4, 5, 6 and 7 channels."""
    return nn.Sequential(OrderedDict(a=mlp(3, 4, 5), b=mlp(5, 6, 7), head=nn.Linear(7, 2)))


@pytest.mark.parametrize(
    ("include", "kept"),
    [
        (None, ["a.2", "b.0", "b.2", "head"]),
        ("b.0", ["b.0"]),
        (["b.0", "head"], ["b.0", "head"]),
        (("head", "b.0"), ["b.0", "head"]),  # in the order of the network
        ("b", ["b.0", "b.2"]),  # a prefix stands for what is inside
        ("*.2", ["a.2", "b.2"]),
        ("?.2", ["a.2", "b.2"]),
        ("[ab].2", ["a.2", "b.2"]),
        ("*", ["a.2", "b.0", "b.2", "head"]),  # a wildcard does not override the rules
        ("a", ["a.2"]),
        ("a.0", ["a.0"]),  # a name does
        (["*", "a.0"], ["a.0", "a.2", "b.0", "b.2", "head"]),
    ],
)
def test_include(include, kept):
    groups = group_parameters(stages(), "channel", include=include)
    assert names(groups) == kept
    assert set(groups.left_out) == {"a.0", "a.2", "b.0", "b.2", "head"} - set(kept)


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        ("b.0", ["a.2", "b.2", "head"]),
        ("b", ["a.2", "head"]),
        (["a", "head"], ["b.0", "b.2"]),
        ("*.2", ["b.0", "head"]),
        ([], ["a.2", "b.0", "b.2", "head"]),
    ],
)
def test_exclude(exclude, kept):
    groups = group_parameters(stages(), "channel", exclude=exclude)
    assert names(groups) == kept
    wanted = set(kept) | {"a.0"}
    reasons = {r for name, r in groups.left_out.items() if name not in wanted}
    assert reasons <= {"named in exclude"}


def test_exclude_wins_over_include():
    groups = group_parameters(stages(), "channel", include=["b", "head"], exclude="b.2")
    assert names(groups) == ["b.0", "head"]
    assert groups.left_out["b.2"] == "named in exclude"
    assert groups.left_out["a.2"] == "not named in include"


def test_a_prefix_ends_at_a_dot():
    network = nn.Sequential(OrderedDict(first=mlp(2, 3), fc=mlp(3, 3), fc1=mlp(3, 3)))
    assert names(group_parameters(network, "channel", include="fc")) == ["fc.0"]


def test_a_frozen_layer_can_be_named():
    network = mlp(3, 4, 5, 2)
    network[2].weight.requires_grad_(False)
    assert names(group_parameters(network, "channel", include="2")) == ["2"]


def test_a_tied_layer_cannot_be_named():
    network = mlp(4, 4, 4, 4)
    network[4].weight = network[2].weight
    with refused("include", "'4'", "matches no layer"):
        group_parameters(network, "channel", include="4")


@pytest.mark.parametrize("argument", ["include", "exclude", "k"])
@pytest.mark.parametrize("pattern", ["conv", "A.2", "", "a.", "b.0.weight"])
def test_a_pattern_without_a_layer(argument, pattern):
    value = {pattern: 0.5} if argument == "k" else ["head", pattern]
    with refused(f"{argument}:", f"{pattern!r} matches no layer", "a.0, a.2, b.0, b.2, head"):
        group_parameters(stages(), "channel", **{argument: value})


@pytest.mark.parametrize("arguments", [{"k": {2: 0.5}}, {"include": 2}, {"exclude": [2]}])
def test_a_pattern_that_is_no_string(arguments):
    """The layers of a Sequential have numbers for names: easily written without quotes."""
    with refused(next(iter(arguments)), "2"):
        group_parameters(mlp(3, 4, 5), "channel", **arguments)


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
    with refused(f"k {ACCEPTED}", f"got {k!r}"):
        group_parameters(mlp(3, 6, 2), "channel", k)
    with refused(f"k['2'] {ACCEPTED}", f"got {k!r}"):
        group_parameters(mlp(3, 6, 2), "channel", {"2": k})
    with refused(f"k['x*'] {ACCEPTED}", f"got {k!r}"):
        check_budget({"2": 0.5, "x*": k})


def test_an_empty_mapping():
    with refused("k is an empty mapping", "at least one pattern"):
        group_parameters(mlp(3, 6, 2), "channel", {})


@pytest.mark.parametrize("k", [7, np.int64(7), {"2": 0.5, "4": 7}])
def test_more_than_there_are(k):
    with refused("k = 7", "the 4 groups of layer '4'", "(channel)"):
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
    with refused("k = 11", "layer '0'"):
        group_parameters(network, lambda model: scales(model, costs), 11)


def test_a_share_of_the_costs_keeps_at_least_one_group():
    """A tenth of 30 is less than any group costs: the projection would kill the whole layer."""
    costs = torch.tensor([10.0, 10.0, 10.0])
    network = nn.Sequential(nn.BatchNorm2d(3))
    groups = group_parameters(network, lambda model: scales(model, costs), 0.1)
    assert groups.budgets.item() >= 10


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

    with refused("overlap", "'2.weight'", "(filter)", "(channel)"):
        group_parameters(mlp(3, 4, 5, 2), rows_and_columns)


@pytest.mark.parametrize("returned", [None, [], {}, 3])
def test_a_function_that_returns_something_else(returned):
    def mine(model):
        return returned

    with refused("grouping", "must return Groups", "mine", type(returned).__name__):
        group_parameters(mlp(3, 4, 2), mine)


@pytest.mark.parametrize("grouping", ["chanel", "", "Channel", None, 3, ["channel"], {"channel"}])
def test_unknown_groupings(grouping):
    with refused("grouping must be 'channel', 'element', 'filter'", f"got {grouping!r}"):
        group_parameters(mlp(3, 4, 2), grouping)


@pytest.mark.parametrize("grouping", [*GROUPINGS, scales, filter_groups])
def test_known_groupings_pass_the_check(grouping):
    assert check_grouping(grouping) is None


# --- models without groups ---------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_model_without_weights(grouping):
    with refused("Sequential has no layer", repr(grouping), "no weights"):
        group_parameters(nn.Sequential(nn.ReLU()), grouping)


def test_a_model_without_groupable_layers():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with refused("Sequential has no layer", "'channel'", "0: Embedding", "1: first layer"):
        group_parameters(network, "channel")


def test_nothing_is_left():
    with refused("has no layer", "'channel'", "2: named in exclude", "0: first layer"):
        group_parameters(mlp(3, 4, 2), "channel", exclude="2")
    with refused("has no layer", "'channel'", "2: not named in include"):
        group_parameters(mlp(3, 4, 2), "channel", include=[])


def test_a_function_without_groups_is_named():
    with refused("has no layer", "'scales'", "the rest: no norm"):
        group_parameters(mlp(3, 4, 2), scales)
    with refused("has no layer", "'custom'"):  # a partial function has no name
        group_parameters(mlp(3, 4, 2), partial(scales, costs=None))


# --- names under wrappers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("", ""),
        ("conv1.weight", "conv1.weight"),
        ("_orig_mod", ""),
        ("_orig_mod.conv1", "conv1"),
        ("a._orig_mod.conv1", "a.conv1"),
        ("a._orig_mod", "a"),
        ("_orig_mod._orig_mod.a", "a"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b"),
        ("my_orig_mod.a", "my_orig_mod.a"),  # only whole names
        ("a._orig_mod_of_mine.b", "a._orig_mod_of_mine.b"),
        ("a._checkpoint_wrapped_module.b", "a.b"),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical


@pytest.mark.parametrize("make", GROUPINGS.values())
def test_a_model_that_is_a_layer(make):
    """Its parameters are called "weight" and "bias", as in its state_dict."""
    layer = nn.Linear(3, 2)
    assert {m.name for m in make(layer).layers[0].members} <= set(layer.state_dict())


def conv_net():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(1, 4, 3), block=block, head=nn.Conv2d(4, 2, 1)))


def compiled(module):
    return torch.compile(module, backend="eager")


def described(groups):
    return [(x.name, x.count, [m.name for m in x.members]) for x in groups.layers], groups.left_out


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("part", ["", "block", "stem", "head", "block.0"])
def test_compiled_modules(grouping, part):
    """The same groups under the same names, whichever part is compiled."""
    plain = group_parameters(conv_net(), grouping)
    network = conv_net()
    if part == "":
        network = compiled(network)
    else:
        network.set_submodule(part, compiled(network.get_submodule(part)))
    assert described(group_parameters(network, grouping)) == described(plain)


def test_a_compiled_module_keeps_its_parameters():
    network = conv_net()
    network.block = compiled(network.block)
    groups = group_parameters(network, "channel", include="block.0")
    without(groups, 1)
    assert network.block._orig_mod[0].weight[:, 1].count_nonzero() == 0

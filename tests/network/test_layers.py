"""Which norm belongs to a layer, and which layers the groupings leave out by rule."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wgsef import group_parameters
from lightning_wgsef.groupings.per_layer import filter_groups
from lightning_wgsef.network.layers import weighted_layers
from tests.helpers.groups import OF_ANY_LAYER, members, mlp, names, raises_naming, without

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
    with raises_naming("groups overlap", "'0.1.weight'", "'0.0'", "'1.0'", "exclude"):
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


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
def test_frozen(grouping):
    network = mlp(3, 4, 5, 6, 2)
    network[2].weight.requires_grad_(False)
    groups = group_parameters(network, grouping)
    assert "2" not in names(groups)
    assert "4" in names(groups)
    assert groups.left_out["2"] == "frozen: 2.weight has no gradient"


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
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
    assert names(groups) == ["1.0", "1.2"]
    assert "tied" in groups.left_out["2"]


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
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


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
def test_lazy(grouping):
    network = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5), nn.Linear(5, 6), nn.Linear(6, 2))
    groups = group_parameters(network, grouping)
    assert "1" not in names(groups)
    assert "2" in names(groups)
    assert "lazy" in groups.left_out["1"]
    network(torch.ones(1, 3))
    assert "1" in names(group_parameters(network, grouping))


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
def test_a_lazy_norm(grouping):
    """Its width is not known yet: it follows no layer, or the layer says why it is left out."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LazyBatchNorm2d(), nn.Conv2d(4, 4, 3))
    groups = group_parameters(network, grouping, include=["0", "2"])
    assert "2" in names(groups)


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
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

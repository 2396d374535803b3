"""What the names of groupings promise, shown on the networks' outputs.

A group is zeroed with `Groups.scale_`, as the proximal step does, and the network is run.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, Homotopy, group_parameters, masks_from_zeros
from lightning_wgsef.groupings.per_layer import channel_groups, element_groups, filter_groups
from tests.helpers.groups import members, mlp, names, without

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


@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_of_a_convolution(channels_last):
    layer = nn.Conv2d(6, 4, 3)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    groups = group_parameters(layer, "block:2x3")
    weight = layer.weight.detach().clone().double()
    wanted = [
        weight[row : row + 2, column : column + 3].norm() for row in (0, 2) for column in (0, 3)
    ]
    torch.testing.assert_close(groups.norms().double(), torch.stack(wanted), rtol=1e-6, atol=0)
    groups.scale_(torch.tensor([1.0, 0.0, 2.0, 1.0]))
    weight[0:2, 3:6] = 0
    weight[2:4, 0:3] *= 2
    torch.testing.assert_close(layer.weight.detach().double(), weight)
    assert groups.alive().tolist() == [True, False, True, True]
    assert groups.sizes.tolist() == [54] * 4


def test_tiles_of_a_dense_and_a_transposed_layer():
    dense, transposed = nn.Linear(4, 6), nn.ConvTranspose1d(4, 6, 2)
    for layer, outputs in ((dense, 0), (transposed, 1)):
        groups = group_parameters(layer, "block:3x2")
        weight = layer.weight.detach().movedim(outputs, 0)
        wanted = {
            round(float(weight[row : row + 3, column : column + 2].norm()), 5)
            for row in (0, 3)
            for column in (0, 2)
        }
        assert {round(x, 5) for x in groups.norms().tolist()} == wanted


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support")
def test_trained_tiles_are_whole_blocks_of_a_sparse_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    regularizer = WGSEF(model, k=0.25, grouping="block:8x4", lam=Homotopy(length=30))
    regularizer.attach(optimizer)
    for _ in range(40):
        inputs = torch.randn(32, 32)
        optimizer.zero_grad()
        (model(inputs) - inputs).square().mean().backward()
        optimizer.step()
    for layer in (model[0], model[2]):
        sparse = layer.weight.detach().to_sparse_bsr((8, 4))
        assert sparse.values().shape == (8, 8, 4)  # a quarter of 32 tiles
        assert torch.equal(sparse.to_dense(), layer.weight.detach())
    found = masks_from_zeros(group_parameters(model, "block:8x4"))
    assert all(torch.equal(found[name], mask) for name, mask in regularizer.masks.items())


def test_layers_that_tiles_do_not_divide():
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 4), nn.Conv2d(8, 8, 3, groups=2))
    groups = group_parameters(model, "block:4x2")
    assert [layer.name for layer in groups.layers] == ["1"]
    assert groups.left_out == {
        "0": "its 10 outputs and 8 inputs cannot be cut into tiles of 4 x 2",
        "2": "grouped convolution: its filters read different channels",
    }
    for argument in ({"include": "0"}, {"k": {"0": 0.5}}):
        with pytest.raises(ValueError, match=r"layer '0' cannot be grouped: its 10 outputs and 8"):
            group_parameters(model, "block:4x2", **argument)


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("channels_last", [False, True])
def test_filter_shapes(make, channels_last):
    layer = make(3, 8, 5)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    groups = group_parameters(layer, "filter_shape", k=10)
    outputs = 1 if make is nn.ConvTranspose2d else 0
    before = layer.weight.detach().clone()
    columns = before.movedim(outputs, 0).reshape(8, -1)
    assert len(groups) == 75
    torch.testing.assert_close(groups.norms(), columns.norm(dim=0))
    factors = torch.tensor(np.random.default_rng(0).random(75), dtype=torch.float32)
    groups.scale_(factors)
    after = layer.weight.detach().movedim(outputs, 0).reshape(8, -1)
    torch.testing.assert_close(after, columns * factors)


def test_filter_shapes_of_grouped_convolutions_are_left_out():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 2))
    groups = group_parameters(model, "filter_shape")
    assert list(groups.left_out) == ["0"]
    assert [len(part) for part in groups.split(groups.norms()).values()] == [4]

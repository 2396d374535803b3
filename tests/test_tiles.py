"""`block:RxC` and `filter_shape`: which weights they group, against their definition."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, Homotopy, group_parameters, masks_from_zeros


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

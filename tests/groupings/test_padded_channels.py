"""Channels to which zeros are padded, as in the shortcuts of ResNets for CIFAR (option A)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_wgsef import group_parameters, prune
from lightning_wgsef.groupings.slim_size import counted_size
from tests.helpers.removal import drawn, removal

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """He et al., 2015: where the width doubles, the shortcut has zeros on both sides."""

    def __init__(self, width, out):
        super().__init__()
        self.pad, self.stride = (out - width) // 2, out // width
        self.conv1 = nn.Conv2d(width, out, 3, self.stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + short)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16), Block(16, 32), Block(32, 32))
        self.out = nn.Linear(32, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.out(F.avg_pool2d(x, x.size(3)).flatten(1))


def test_channels_of_the_first_stage_are_followed_through_all():
    found = removal(ResNet(), IMAGES, "structure")
    counts = {layer.name: layer.count for layer in found.groups.layers}
    inner = {f"blocks.{n}.conv1": width for n, width in enumerate((8, 16, 32, 32))}
    assert counts == {"stem": 8, **inner}
    assert not found.obstacles
    for stays in ("blocks.1.conv2", "blocks.2.conv2", "blocks.3.conv2"):
        assert "zeros are padded beside other channels" in found.groups.left_out[stays]
    widths = [found.small.blocks[n].conv2.out_channels for n in range(4)]
    assert (found.small.stem.out_channels, widths) == (4, [4, 12, 28, 28])
    assert found.small.out.in_features == 28


def test_the_size_that_is_named_comes_out():
    network = drawn(ResNet())
    small = prune(network, [(IMAGES, torch.tensor([0, 1]))], k=0.5)
    dense, left = (counted_size(x, "FLOPs", IMAGES) for x in (network, small))
    assert 0.4 * dense < left <= 0.5 * dense


JOINED = {
    # How the shortcut gets twice as many channels, and the sets that can be taken out.
    "left": (lambda x: F.pad(x, (0, 0, 0, 0, 8, 0)), {"a"}),
    "right, ones": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 8), value=1.0), {"a"}),
    "number": (lambda x: torch.cat([x, torch.zeros(2, 8, *x.shape[2:])], 1), {"a"}),
    "multiplied": (lambda x: torch.cat([x, x.mul(0)], 1), {"a"}),
    "as many": (lambda x: torch.cat([x, torch.zeros_like(x)], 1), set()),
    "image": (lambda x: F.pad(torch.cat([x, x], 1), (1, 1, 1, 1))[:, :, 1:-1, 1:-1], {"a"}),
    "batch": (lambda x: F.pad(torch.cat([x, x], 1), (0,) * 7 + (1,))[:-1], {"a"}),
    "cropped": (lambda x: torch.cat([x, F.pad(x, (0, 0, 0, 0, 4, -4))], 1), set()),
}


class Joined(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 12, 1)
        self.d, self.join = nn.Conv2d(12, 4, 1), join

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.d(F.relu(self.c(F.relu(self.b(x) + self.join(x)))))


@pytest.mark.parametrize("name", JOINED)
def test_twice_as_many(name):
    join, sets = JOINED[name]
    found = removal(Joined(join), IMAGES, "structure")
    assert {layer.name for layer in found.groups.layers} == {*sets, "c"}
    assert not found.obstacles


def test_a_layer_reads_them_with_the_zeros():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(9, 2, 1)

        def forward(self, x):
            return self.b(F.pad(F.relu(self.a(x)), (0, 0, 0, 0, 1, 2)))

    found = removal(Read(), IMAGES, "structure")
    assert found.small.b.in_channels == 6


@pytest.mark.parametrize("grouping", ["filter", "channel"])
def test_other_groupings(grouping):
    found = removal(ResNet(), IMAGES, grouping)  # what is called removable is gone
    assert all(layer.removable != bool(layer.obstacle) for layer in found.groups.layers)


def test_steps():
    """The channels of three axes are the second or the last."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.c(F.relu(self.b(x) + F.pad(x, (4, 4))))

    groups = group_parameters(Steps(), "structure", k=0.5, example_input=torch.randn(2, 5, 3))
    assert {layer.name for layer in groups.layers} == {"a"}
    removal(Steps(), torch.randn(2, 5, 3), "structure")

"""Depthwise convolutions that make several channels of each, which go with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_wgsef import load_slim, prune, save_slim, slim
from lightning_wgsef.groupings.slim_size import UNITS, counted_size
from tests.helpers.removal import difference, drawn, removal

TRIALS = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class EEGNet(nn.Module):
    """Lawhern et al., 2018: filters along time, and for each two over the electrodes."""

    def __init__(self):
        super().__init__()
        self.temporal = nn.Conv2d(1, 8, (1, 9), padding=(0, 4), bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.spatial = nn.Conv2d(8, 16, (6, 1), groups=8, bias=False)
        self.norm2, self.act, self.pool = nn.BatchNorm2d(16), nn.ELU(), nn.AvgPool2d((1, 4))
        self.depthwise = nn.Conv2d(16, 16, (1, 5), padding=(0, 2), groups=16, bias=False)
        self.pointwise = nn.Conv2d(16, 12, 1, bias=False)
        self.norm3, self.out = nn.BatchNorm2d(12), nn.Linear(12 * 8, 4)

    def forward(self, x):
        x = self.pool(self.act(self.norm2(self.spatial(self.norm1(self.temporal(x))))))
        return self.out(self.act(self.norm3(self.pointwise(self.depthwise(x)))).flatten(1))


class Separable(nn.Module):
    """Of PNASNet: a stream of which a separable layer makes twice as many channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.twice = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8)
        self.beside = nn.Conv2d(8, 16, 1, stride=2)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.same(x))
        return self.out(torch.relu(self.twice(x) + self.beside(x)).mean((2, 3)))


def in_steps():
    return nn.Sequential(
        nn.Conv1d(6, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv1d(4, 12, 3, groups=4),
        nn.ReLU(),
        nn.Conv1d(12, 5, 1),
    )


class Flattened(nn.Module):
    """Several channels of each, flattened to columns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, groups=4)
        self.small, self.out = nn.AdaptiveAvgPool2d(2), nn.Linear(12 * 4, 3)

    def forward(self, x):
        return self.out(self.small(torch.relu(self.b(torch.relu(self.a(x))))).flatten(1))


class Own(nn.Module):
    """What makes the channels cannot be cut: of each, the same of what is made of it goes."""

    def __init__(self):
        super().__init__()
        self.bank = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.b, self.c = nn.Conv2d(4, 12, 1, groups=4), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.conv2d(x, self.bank))))


class Chained(nn.Module):
    """Three channels of each, and of each of these three more."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b, self.c = nn.Conv2d(4, 12, 1, groups=4), nn.Conv2d(12, 36, 1, groups=12)
        self.d = nn.Conv2d(36, 2, 1)

    def forward(self, x):
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


NETWORKS = {
    # The sets with their numbers of groups, and the widths that are left.
    "EEGNet": (
        EEGNet,
        TRIALS,
        {"temporal": 8, "pointwise": 12},
        {"temporal": 4, "spatial": 8, "depthwise": 8, "pointwise": 6},
    ),
    "PNASNet": (Separable, IMAGES, {"stem": 8}, {"stem": 4, "twice": 8, "beside": 8}),
    "steps": (in_steps, torch.randn(2, 6, 9), {"0": 4}, {"0": 2, "2": 6}),
    "flattened": (Flattened, IMAGES, {"a": 4}, {"a": 2, "b": 6}),
    "own": (Own, IMAGES, {"b": 3}, {"b": 8}),
    "chained": (Chained, IMAGES, {"a": 4}, {"a": 2, "b": 6, "c": 18}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_they_go_together(name, tmp_path):
    make, example, sets, widths = NETWORKS[name]
    found = removal(make(), example, "structure")
    assert {layer.name: layer.count for layer in found.groups.layers} == sets
    assert not found.obstacles
    modules = dict(found.small.named_modules())
    assert {path: modules[path].out_channels for path in widths} == widths
    assert all(
        m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
        for m in modules.values()
        if isinstance(m, nn.Conv1d | nn.Conv2d)
    )
    save_slim(found.small, tmp_path / "slim.safetensors")
    loaded = load_slim(tmp_path / "slim.safetensors", make)
    assert difference(found.small, loaded, example) == 0


@pytest.mark.parametrize("costs", ["params", "flops"])
def test_the_size_that_is_named_comes_out(costs):
    network = drawn(EEGNet())
    small = prune(network, [(TRIALS, torch.tensor([0, 1]))], k=0.6, costs=costs)
    dense, left = (counted_size(x, UNITS[costs], TRIALS) for x in (network, small))
    assert 0.5 * dense < left <= 0.6 * dense


def test_a_channel_that_nothing_reads_goes_with_what_is_made_of_it():
    """The depthwise layer reads it, but for nobody."""
    network = drawn(EEGNet())
    with torch.no_grad():
        network.pointwise.weight[:, :4] = 0
    small = slim(network, TRIALS)
    assert (small.temporal.out_channels, small.spatial.groups, small.pointwise.in_channels) == (
        6,
        6,
        12,
    )
    assert difference(network, small, TRIALS) < 1e-9


def test_half_of_what_is_made_of_a_channel_stays():
    network = drawn(EEGNet())
    with torch.no_grad():
        network.pointwise.weight[:, ::2] = 0
    small = slim(network, TRIALS)
    assert small.spatial.out_channels == 16


@pytest.mark.parametrize("grouping", ["filter", "channel"])
def test_other_groupings_say_what_is_so(grouping):
    found = removal(EEGNet(), TRIALS, grouping)  # what is called removable is gone
    assert all(layer.removable != bool(layer.obstacle) for layer in found.groups.layers)

"""Numbers with which modules check how wide their inputs are: lowered with the channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_wgsef import group_parameters, load_slim, prune, save_slim
from lightning_wgsef.groupings.slim_size import counted_size
from tests.helpers.groups import raises_naming
from tests.helpers.removal import difference, drawn, removal

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Resample(nn.Module):
    """Of diffusers: what it is given must be as wide as it was made for."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x)


class Refusing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.sizes = (width, 4)
        self.conv = nn.Conv2d(width, 6, 1)

    def forward(self, x):
        _, width, height, _ = x.shape
        if width != self.sizes[0]:
            raise ValueError(f"expected {self.sizes[0]} channels, got {width}")
        if height // 2 != self.sizes[1]:
            raise ValueError("wrong height")
        return self.conv(x)


class After(nn.Module):
    """It checks what it has made itself."""

    def __init__(self, width):
        super().__init__()
        self.made = width
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = self.conv(torch.relu(x))
        assert self.made == x.size(1)
        return torch.relu(x)


class Halves(nn.Module):
    """The number is that of a split, too, and is lowered once."""

    def __init__(self, width):
        super().__init__()
        self.half = width // 2
        self.conv = nn.Conv2d(self.half, 6, 1)

    def forward(self, x):
        one, other = x.split((self.half, self.half), 1)
        assert one.shape[1] == self.half
        return self.conv(one * torch.sigmoid(other))


class Joined(nn.Module):
    """Given are two tensors, each as wide as the other."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(2 * width, 6, 1)

    def forward(self, x, skip):
        assert x.shape[1] == self.width
        return self.conv(torch.cat([x, skip], 1))


class Square(nn.Module):
    """What is checked is the height, which happens to be the number of channels."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        assert x.shape[2] == self.size
        return self.conv(x)


class Normalised(nn.Module):
    """The number is for more than a check: with another the outputs are others."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(width, 6, 1)

    def forward(self, x):
        assert x.shape[1] == self.width
        return self.conv(x / self.width)


class Network(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.first, self.part, self.last = nn.Conv2d(3, 8, 1), part(8), nn.Conv2d(6, 2, 1)
        self.widen = nn.Conv2d(8, 6, 1) if part in (Resample, After) else nn.Identity()

    def forward(self, x):
        return self.last(torch.relu(self.widen(self.part(torch.relu(self.first(x))))))


class TwoGiven(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.skip = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.part, self.last = Joined(8), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.part(self.first(x), self.skip(x))))


CHECKED = {
    Resample: {"channels": 4},
    Refusing: {"sizes": (4, 4)},
    Halves: {"half": 2},
    Square: {"size": 8},
}


@pytest.mark.parametrize("part", CHECKED)
def test_they_are_lowered(part, tmp_path):
    found = removal(Network(part), IMAGES, "structure")
    assert not found.obstacles
    assert found.small.first.out_channels == 4
    own = {name: getattr(found.small.part, name) for name in CHECKED[part]}
    assert own == CHECKED[part]
    save_slim(found.small, tmp_path / "slim.safetensors")
    loaded = load_slim(tmp_path / "slim.safetensors", lambda: Network(part))
    assert difference(found.small, loaded, IMAGES) == 0


def test_the_size_that_is_named_comes_out():
    network = drawn(Network(Resample))
    small = prune(network, [(IMAGES, torch.zeros(2, 4, 4).long())], k=0.5, costs="params")
    dense, left = (counted_size(x, "parameters", IMAGES) for x in (network, small))
    assert 0.35 * dense < left <= 0.5 * dense


@pytest.mark.parametrize("make", [TwoGiven, lambda: Network(After)])
def test_two_of_the_same_width_stay(make):
    """Which of the two is checked is not known, and they may lose other numbers of channels."""
    with raises_naming("can group", "first: the network does not run without them"):
        group_parameters(make(), "structure", example_input=IMAGES)


def test_what_is_for_more_than_a_check_stays():
    found = removal(Network(Normalised), IMAGES, "structure", include=["first", "part.conv"])
    assert set(found.obstacles) == {"first"}
    assert "does not run without them" in found.obstacles["first"]
    assert found.small.part.width == 8

"""Modules that nothing runs: what may be given to them stays; all else goes, as announced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_wgsef import group_parameters
from lightning_wgsef.groupings.structure import structure_groups
from tests.helpers.removal import removal


class Squeeze(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x):
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Expanding(nn.Module):
    """Of an EfficientNet: without expansion, its first convolution is made and never run."""

    def __init__(self, width, expansion, out):
        super().__init__()
        inner = width * expansion
        self.expansion = expansion
        self.grow = nn.Conv2d(width, inner, 1)
        self.norm = nn.BatchNorm2d(inner)
        self.squeeze = Squeeze(inner)
        self.shrink = nn.Conv2d(inner, out, 1)

    def forward(self, x):
        x = x if self.expansion == 1 else F.relu(self.norm(self.grow(x)))
        return self.shrink(self.squeeze(x))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Expanding(16, 1, 12), Expanding(12, 3, 20))
        self.out = nn.Linear(20, 4)

    def forward(self, x):
        return self.out(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Fit(nn.Module):
    """Of a NASNet: it has ways to fit what comes to the width of a cell, of which one is taken."""

    def __init__(self, before, width):
        super().__init__()
        self.before, self.width = before, width
        self.halved, self.same = nn.Conv2d(before, width, 1), nn.Conv2d(before, width, 1)

    def forward(self, x):
        return self.same(F.relu(x)) if self.before != self.width else F.relu(x)


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.fits = nn.ModuleList([Fit(12, 12), Fit(12, 16)])
        self.cells = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, n, 1))
            for n in (12, 16)
        )
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        for fit, cell in zip(self.fits, self.cells, strict=True):
            x = fit(x)
            x = x + cell(x)
        return self.out(x.mean((2, 3)))


class Gate(nn.Module):
    """A part without layers that run, which is handed what may need a projection."""

    def __init__(self, width):
        super().__init__()
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.project(x) if float(x.detach().sum()) > 1e6 else x


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1))
        self.gate, self.out = Gate(8), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out(self.c(F.relu(self.gate(self.b(x)))).mean((2, 3)))


class Bare(nn.Module):
    """A layer that is asked for its output only where a number is large, by the whole network."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.exit = nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.exit(h) if float(x.detach().sum()) > 1e6 else self.out(F.relu(self.b(h)))


class Reused(nn.Module):
    """A layer that two modules call, of which the second has a part that is not run."""

    def __init__(self):
        super().__init__()
        self.a, shared = nn.Linear(6, 8), nn.Linear(8, 8)
        self.first, self.second = User(shared, 8), User(shared, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.second(self.first(F.relu(self.a(x)))))


class User(nn.Module):
    def __init__(self, shared, width):
        super().__init__()
        self.shared, self.idle = shared, nn.Linear(width, width)

    def forward(self, x):
        x = F.relu(self.shared(x))
        return self.idle(x) if float(x.detach().sum()) > 1e6 else x


NETWORKS = {
    # What stays, by the names of the sets; all others go.
    "scaled": (Scaled, torch.randn(2, 3, 6, 6), {"stem"}),
    "cells": (Cells, torch.randn(2, 3, 6, 6), {"stem", "fits.1.same"}),
    "gated": (Gated, torch.randn(2, 3, 6, 6), {"b"}),
    "bare": (Bare, torch.randn(2, 6), {"a"}),
    "reused": (Reused, torch.randn(2, 6), {"a"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_may_be_given_to_them_stays_and_no_more(name):
    make, x, stays = NETWORKS[name]
    torch.manual_seed(0)
    every = [layer.name for layer in structure_groups(make(), x).layers if not layer.reserved]
    found = removal(make(), x, "structure", include=every)  # by name, whatever stands against it
    reasons = found.small.slimming.kept
    assert set(found.obstacles) == stays
    assert {n for n, why in reasons.items() if "may read its channels" in why} == stays
    large = torch.full_like(x, 1e8)
    one, other = (network(large) for network in (found.small, found.zeroed))
    assert torch.allclose(one, other, rtol=1e-4, atol=1.0)


def test_without_include_they_are_left_out_with_the_reason():
    groups = group_parameters(Scaled(), "structure", k=0.5, example_input=torch.randn(2, 3, 6, 6))
    assert "'blocks.0.grow', which ran on no variation" in groups.left_out["stem"]
    assert "blocks.0.squeeze.down" in {layer.name for layer in groups.layers}


def test_a_part_of_training_runs():
    class Auxiliary(Bare):
        def forward(self, x):
            h = F.relu(self.a(x))
            end = self.out(F.relu(self.b(h)))
            return (end, self.exit(h)) if self.training else (end,)

    groups = group_parameters(Auxiliary(), "structure", k=0.5, example_input=torch.randn(2, 6))
    assert {layer.name: layer.obstacle for layer in groups.layers} == {"a": "", "b": ""}
    assert "may read" not in " ".join(groups.left_out.values())

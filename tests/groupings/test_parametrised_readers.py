"""Layers that read channels with a weight that is computed, as of a norm that is bounded."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from lightning_wgsef import group_parameters
from tests.helpers.removal import removal

ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Bounded(nn.Module):
    """Rows of a norm of at most 1: what was set cannot be found again."""

    def forward(self, weight):
        return torch.renorm(weight, p=2, dim=0, maxnorm=1.0)


class Settable(Bounded):
    def right_inverse(self, weight):
        return weight


def network(parametrisation):
    reader = nn.Linear(8, 3)
    if parametrisation is weight_norm:
        weight_norm(reader)
    else:
        register_parametrization(reader, "weight", parametrisation())
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), reader)


def test_one_that_cannot_be_set_stays_and_others_go():
    found = removal(network(Bounded), ROWS, "structure", include=["0", "2"])
    assert set(found.obstacles) == {"2"}
    assert "right_inverse" in found.obstacles["2"]
    assert found.small[0].out_features == 5


def test_trials_leave_no_trace():
    """A weight that is set in one trial is as it was in the next."""
    for parametrisation in (Settable, weight_norm):
        made = network(parametrisation)
        before = {name: x.clone() for name, x in made.state_dict().items()}
        groups = group_parameters(made, "structure", k=0.5, example_input=ROWS)
        assert "0" in {layer.name for layer in groups.layers if not layer.obstacle}
        after = made.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_weight_norm_is_computed_anew():
    """In float64: what it is made of is rounded anew."""
    doubled = network(weight_norm).double()
    found = removal(doubled, ROWS.double(), "structure", include=["0", "2"])
    assert not found.obstacles
    widths = [found.small[0].out_features, found.small[2].out_features]
    assert (widths, found.small[4].weight.shape) == ([5, 4], (3, 4))

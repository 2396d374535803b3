"""Channels that are constants: folded where that is exact, else kept and reported."""

import pytest
import torch
from torch import nn

from lightning_wgsef.slimming.slim import slim
from tests.helpers.networks.slim import IMAGE, VECTOR, check, convolutions, drawn, pruned, silent


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [nn.Sigmoid(), nn.ReLU(), nn.Softplus()])
def test_constants_are_folded_into_dense_layers(function, bias):
    layers = nn.Linear(6, 5), function, nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3)
    network = silent(drawn(nn.Sequential(*layers)), 0, 3)
    small = slim(network, VECTOR)
    assert (small[0].out_features, small[2].in_features) == (3, 3)
    assert small[2].bias is not None
    assert (network[2].bias is not None) == bias
    check(network, VECTOR, small)


def test_constants_are_folded_into_convolutions_without_border():
    network = silent(convolutions(nn.Sigmoid(), last=nn.Conv2d(8, 4, 3)), 2)
    small = slim(network, IMAGE)
    assert small[0].out_channels == 7
    check(network, IMAGE, small)


def test_constants_that_meet_a_border_stay_and_are_reported():
    network = silent(convolutions(nn.Sigmoid(), last=nn.Conv2d(8, 4, 3, padding=1)), 2)
    small = slim(network, IMAGE)
    assert small[0].out_channels == 8
    assert small.slimming.kept == {
        "0": "a constant that is not zero meets the zeros of its padding in '2'"
    }
    check(network, IMAGE, small)
    circular = nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")
    assert slim(silent(convolutions(nn.Sigmoid(), last=circular), 2), IMAGE)[0].out_channels == 7


def test_shifts_of_a_norm_that_depend_on_the_mode_stay():
    """In training, a norm takes the constant off; in evaluation, its running mean."""
    network = silent(convolutions(nn.BatchNorm2d(8), nn.ReLU()), 2)
    small = slim(network, IMAGE)
    assert small[0].out_channels == 8
    assert "not constant" in small.slimming.kept["0"]
    check(network, IMAGE, small)
    with torch.no_grad():
        network[1].weight[2] = 0  # now its shift is all that is left
        network[1].bias[2] = 0.7
    small = slim(network, IMAGE)
    assert small[0].out_channels == 7
    check(network, IMAGE, small)


def test_a_norm_over_the_channels_keeps_them():
    layers = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)
    network = pruned(drawn(nn.Sequential(*layers)), "filter", 1)
    with torch.no_grad():
        network[1].weight[1] = network[1].bias[1] = 0
    small = slim(network, VECTOR)
    assert small[0].out_features == 5
    assert "differ" in small.slimming.kept["0"]


def test_a_layer_keeps_one_channel():
    network = convolutions(nn.ReLU())
    pruned(network, "filter", *range(8))
    small = slim(network, IMAGE)
    assert small[0].out_channels == 1
    check(network, IMAGE, small)


def test_nothing_to_take_out():
    network = convolutions(nn.ReLU())
    small = slim(network, IMAGE)
    assert small.slimming.plans == []
    assert small.slimming.parameters[0] == small.slimming.parameters[1]
    assert "100.0%" in str(small.slimming)

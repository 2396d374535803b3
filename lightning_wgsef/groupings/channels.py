"""`channel`: one input channel of a convolution, one column of a dense layer."""

from __future__ import annotations

from torch import nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.layers import WeightedLayer, usable_layers, weighted_layers
from lightning_wgsef.groups import Groups
from lightning_wgsef.members import Member


def channel_groups(model: nn.Module) -> Groups:
    """Group the weights W[:, c] that read input channel c.

    The first layer is reserved (its channels are the network's input), and so are depthwise
    convolutions, whose filters read one channel each.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> groups = channel_groups(network)
    >>> [(layer.name, layer.count, layer.reserved) for layer in groups.layers]
    [('0', 3, "first layer: its channels are the network's input"), ('2', 8, '')]
    """
    layers, left_out = usable_layers(model)
    first = next(weighted_layers(model), None)
    grouped = [_channels(x, first=first is not None and x.name == first.name) for x in layers]
    return Groups(grouped, left_out)


def _channels(layer: WeightedLayer, *, first: bool) -> GroupedLayer:
    axes, index = layer.input_slices()
    reserved = ""
    if first:
        reserved = "first layer: its channels are the network's input"
    elif layer.split == layer.inputs > 1:
        reserved = "depthwise: every filter reads one channel only"
    member = Member(layer.path("weight"), layer.weight, axes, index)
    return GroupedLayer(
        layer.name, "channel", layer.inputs, (member,), removable=True, reserved=reserved
    )

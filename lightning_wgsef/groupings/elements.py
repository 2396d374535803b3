"""`element`: every single weight is a group."""

from __future__ import annotations

from torch import nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.layers import usable_layers
from lightning_wgsef.groups import Groups
from lightning_wgsef.members import Member


def element_groups(model: nn.Module) -> Groups:
    """Group nothing: every entry of a layer's weight stands for itself (biases are left alone).

    >>> [layer.count for layer in element_groups(nn.Linear(3, 2)).layers]
    [6]
    """
    layers, left_out = usable_layers(model)
    grouped = []
    for layer in layers:
        axes = tuple(range(layer.weight.dim()))
        member = Member(layer.path("weight"), layer.weight, axes)
        grouped.append(GroupedLayer(layer.name, "element", layer.weight.numel(), (member,)))
    return Groups(grouped, left_out)

"""`filter_shape`: one position of the kernels, in all filters of a convolution."""

from __future__ import annotations

from torch import nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.layers import usable_layers
from lightning_wgsef.groups import Groups
from lightning_wgsef.members import Member


def filter_shape_groups(model: nn.Module) -> Groups:
    """Group W[:, c, i, j], one column of the matrix that a convolution multiplies by.

    In a dense layer that is a column. Grouped convolutions are left out: their filters read
    different channels.

    >>> groups = filter_shape_groups(nn.Conv2d(3, 8, 5))
    >>> [(layer.count, layer.members[0].slice_size) for layer in groups.layers]
    [(75, 8)]
    """
    layers, left_out = usable_layers(model)
    grouped = []
    for layer in layers:
        if layer.split > 1:
            left_out[layer.name] = "grouped convolution: its filters read different channels"
            continue
        outputs = 1 if layer.transposed else 0
        axes = tuple(axis for axis in range(layer.weight.dim()) if axis != outputs)
        member = Member(layer.path("weight"), layer.weight, axes)
        grouped.append(GroupedLayer(layer.name, "filter_shape", member.slices, (member,)))
    return Groups(grouped, left_out)

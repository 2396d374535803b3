"""`block:RxC`: tiles of a weight matrix."""

from __future__ import annotations

from torch import nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.layers import WeightedLayer, usable_layers
from lightning_wgsef.groups import Groups
from lightning_wgsef.members import Member


def tile_groups(model: nn.Module, rows: int, columns: int) -> Groups:
    """Group R outputs by C inputs of every weight; of a convolution with the whole kernels.

    They are the tiles of a block sparse layout (BSR) of tiles R x C, or R x (C times the kernel's
    size) for the matrix that a convolution multiplies by. Layers that tiles do not divide are left
    out.

    >>> groups = tile_groups(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)), 2, 4)
    >>> [(layer.name, layer.count) for layer in groups.layers], groups.left_out
    ([('0', 4)], {'1': 'its 3 outputs and 4 inputs cannot be cut into tiles of 2 x 4'})
    """
    layers, left_out = usable_layers(model)
    grouped = []
    for layer in layers:
        outputs, inputs = layer.outputs, layer.inputs
        if layer.split > 1:
            left_out[layer.name] = "grouped convolution: its filters read different channels"
        elif outputs % rows or inputs % columns:
            left_out[layer.name] = (
                f"its {outputs} outputs and {inputs} inputs cannot be cut into tiles of "
                f"{rows} x {columns}"
            )
        else:
            grouped.append(_tiles(layer, rows, columns))
    return Groups(grouped, left_out)


def _tiles(layer: WeightedLayer, rows: int, columns: int) -> GroupedLayer:
    first, second = (columns, rows) if layer.transposed else (rows, columns)
    shape = layer.weight.shape
    seen = (shape[0] // first, first, shape[1] // second, second, *shape[2:])
    member = Member(layer.path("weight"), layer.weight, axes=(0, 2), shape=seen)
    return GroupedLayer(layer.name, f"block:{rows}x{columns}", member.slices, (member,))

"""Groupings of one layer's weight by itself: channel, filter, filter_shape, element, n:m, block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.groups.norm_statistics import NormStatistics, has_statistics
from lightning_wgsef.network.interface import Interface, interface_by_order
from lightning_wgsef.network.layers import WeightedLayer, usable_layers


def channel_groups(model: nn.Module, interface: Interface | None = None) -> Groups:
    """Group the weights W[:, c] that read input channel c.

    Reserved are the layers that read the network's inputs, and depthwise convolutions, whose
    filters read one channel each.

    Args:
        model: any module.
        interface: which layers read the network's inputs; None: as `interface_by_order` takes it.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> groups = channel_groups(network)
    >>> [(layer.name, layer.count, layer.reserved) for layer in groups.layers]
    [('0', 3, "first layer: its channels are the network's input"), ('2', 8, '')]
    """
    layers, left_out = usable_layers(model)
    inputs = (interface or interface_by_order(model)).inputs
    return Groups([_channels(layer, inputs.get(layer.name, "")) for layer in layers], left_out)


def _channels(layer: WeightedLayer, reserved: str) -> GroupedLayer:
    axes, index = layer.input_slices()
    if not reserved and layer.split == layer.inputs > 1:
        reserved = "depthwise: every filter reads one channel only"
    member = Member(layer.path("weight"), layer.weight, axes, index)
    return GroupedLayer(
        layer.name, "channel", layer.inputs, (member,), removable=True, reserved=reserved
    )


def filter_groups(model: nn.Module, interface: Interface | None = None) -> Groups:
    """Group every output filter W[o] with its bias and its following norm's scale and shift.

    A filter that is zero with all of these gives an output of exactly zero. Reserved are the layers
    that make the network's outputs.

    Args:
        model: any module.
        interface: which layers make the outputs; None: as `interface_by_order` takes it.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    >>> groups = filter_groups(network)
    >>> [member.name for member in groups.layers[0].members]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> groups.layers[1].reserved
    "last layer: its filters are the network's outputs"
    """
    layers, left_out = usable_layers(model)
    outputs = (interface or interface_by_order(model)).outputs
    return Groups([_filters(layer, outputs.get(layer.name, "")) for layer in layers], left_out)


def _filters(layer: WeightedLayer, reserved: str) -> GroupedLayer:
    axes, index = layer.output_slices()
    members = [Member(layer.path("weight"), layer.weight, axes, index)]
    vectors = [(layer.path("bias"), getattr(layer.module, "bias", None))]
    if layer.norm is not None:
        norm, module = layer.norm
        vectors += [(f"{norm}.{name}", getattr(module, name, None)) for name in ("weight", "bias")]
    for name, parameter in vectors:
        if isinstance(parameter, nn.Parameter):
            members.append(Member(name, parameter, axes=(0,)))
    follows = layer.norm is not None and has_statistics(layer.norm[1])
    return GroupedLayer(
        layer.name,
        "filter",
        layer.outputs,
        tuple(members),
        removable=True,
        reserved=reserved,
        statistics=(NormStatistics(*layer.norm),) if follows and layer.norm is not None else (),
    )


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


def n_of_m_groups(model: nn.Module, n: int, m: int) -> Groups:
    """Group nothing: single weights, of which every m along the inputs compete for n places.

    In a dense layer these are m columns of a row, as NVIDIA's 2:4 has it; in a convolution m input
    channels at one position of a kernel. The name is the budget: k is not used. Layers whose inputs
    m does not divide are left out.

    >>> groups = n_of_m_groups(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 3)), 2, 4)
    >>> [(layer.name, layer.count, layer.m, layer.budget) for layer in groups.layers]
    [('0', 16, 4, 2.0)]
    >>> groups.left_out
    {'1': '2:4 needs inputs that 4 divides, its weight has 2 (shape (3, 2))'}
    """
    layers, left_out = usable_layers(model)
    grouped = []
    for layer in layers:
        inputs = layer.inputs // layer.split
        if inputs % m:
            left_out[layer.name] = (
                f"{n}:{m} needs inputs that {m} divides, its weight has {inputs} "
                f"(shape {tuple(layer.weight.shape)})"
            )
            continue
        axes = tuple(range(layer.weight.dim()))
        member = Member(layer.path("weight"), layer.weight, axes, _inputs_last(layer))
        grouped.append(
            GroupedLayer(layer.name, f"{n}:{m}", member.slices, (member,), budget=float(n), m=m)
        )
    return Groups(grouped, left_out)


def _inputs_last(layer: WeightedLayer) -> Tensor | None:
    """Number the weights with inputs counted first; None: they are as they lie."""
    weight = layer.weight
    number = torch.arange(weight.numel()).view(weight.shape)
    order = number.movedim(0 if layer.transposed else 1, -1).flatten()
    if torch.equal(order, number.flatten()):
        return None
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))


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

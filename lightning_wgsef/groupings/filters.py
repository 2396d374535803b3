"""`filter`: one output filter of a convolution, one row of a dense layer."""

from __future__ import annotations

from torch import nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.layers import WeightedLayer, usable_layers, weighted_layers
from lightning_wgsef.groups import Groups
from lightning_wgsef.members import Member


def filter_groups(model: nn.Module) -> Groups:
    """Group every output filter W[o] with its bias and its following norm's scale and shift.

    A filter that is zero with all of these gives an output of exactly zero. The last layer is
    reserved: its filters are the network's outputs.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    >>> groups = filter_groups(network)
    >>> [member.name for member in groups.layers[0].members]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> groups.layers[1].reserved
    "last layer: its filters are the network's outputs"
    """
    layers, left_out = usable_layers(model)
    last = [layer.name for layer in weighted_layers(model)][-1:]
    return Groups([_filters(layer, last=layer.name in last) for layer in layers], left_out)


def _filters(layer: WeightedLayer, *, last: bool) -> GroupedLayer:
    axes, index = layer.output_slices()
    members = [Member(layer.path("weight"), layer.weight, axes, index)]
    vectors = [(layer.path("bias"), getattr(layer.module, "bias", None))]
    if layer.norm is not None:
        norm, module = layer.norm
        vectors += [(f"{norm}.{name}", getattr(module, name, None)) for name in ("weight", "bias")]
    for name, parameter in vectors:
        if isinstance(parameter, nn.Parameter):
            members.append(Member(name, parameter, axes=(0,)))
    reserved = "last layer: its filters are the network's outputs" if last else ""
    return GroupedLayer(
        layer.name, "filter", layer.outputs, tuple(members), removable=True, reserved=reserved
    )

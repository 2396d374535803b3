"""`n:m`: of every m weights that are multiplied by neighbouring inputs, n stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.layers import WeightedLayer, usable_layers
from lightning_wgsef.groups import Groups
from lightning_wgsef.members import Member


def n_of_m_groups(model: nn.Module, n: int, m: int) -> Groups:
    """Group nothing: single weights, of which every m along the inputs compete for n places.

    In a dense layer these are m columns of a row, as NVIDIA's 2:4 has it; in a convolution m input
    channels at one position of a kernel. The name is the budget: k is not used. Layers whose inputs
    m does not divide are left out.

    >>> groups = n_of_m_groups(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 3)), 2, 4)
    >>> [(layer.name, layer.count, layer.contest, layer.budget) for layer in groups.layers]
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
            GroupedLayer(
                layer.name, f"{n}:{m}", member.slices, (member,), budget=float(n), contest=m
            )
        )
    return Groups(grouped, left_out)


def _inputs_last(layer: WeightedLayer) -> Tensor | None:
    """The number of every weight when inputs are counted first; None: they are."""
    weight = layer.weight
    number = torch.arange(weight.numel()).view(weight.shape)
    order = number.movedim(0 if layer.transposed else 1, -1).flatten()
    if torch.equal(order, number.flatten()):
        return None
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))

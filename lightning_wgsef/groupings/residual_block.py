"""Residual blocks as groups, which compete for the depth of a network: the grouping `layer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.layers import canonical_name
from lightning_wgsef.network.residual import layer_names, residual_blocks

NAME = "branches"

_OUTSIDE = "it belongs to no residual block that returns its input when all its weights are 0"


def branch_groups(model: nn.Module, example_input: Any) -> Groups:
    """Group all weights of each residual block that hands its input on when they are zero.

    All compete for one budget, k blocks, as the layer "branches", in the order of
    `residual_blocks`. A network without its weakest blocks is less deep.

    Args:
        model: a network with residual blocks.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    Raises:
        ValueError: the forward pass fails.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + torch.relu(self.fc(x))
    >>> network = nn.Sequential(nn.Linear(2, 4), Block(), Block())
    >>> groups = branch_groups(network, torch.ones(1, 2))
    >>> groups.layers[0].count, list(groups.left_out)
    (2, ['0'])
    """
    names = residual_blocks(model, example_input)
    numbers = {name: number for number, name in enumerate(names)}
    left_out = {
        layer: _OUTSIDE
        for layer in layer_names(model)
        if not any(layer == name or layer.startswith(f"{name}.") for name in names)
    }
    if not names:
        return Groups([], left_out)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    members = [
        Member(
            name,
            parameter,
            axes=(0,),
            index=torch.tensor([numbers[block]]),
            shape=(1, *parameter.shape),
        )
        for block in names
        for name, parameter in parameters.items()
        if name.startswith(f"{block}.")
    ]
    return Groups([GroupedLayer(NAME, "layer", len(names), tuple(members), True)], left_out)

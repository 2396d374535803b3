"""Heads of attention and hidden units of an MLP that nothing reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups


@dataclass(frozen=True, eq=False)
class DeadUnits:
    """Groups of a layer that nothing reads.

    Attributes:
        layer: its groups, of which the last member is what reads them.
        dead: for every group, whether its columns in that are zero, of experts whether all of them
            are; never all of them.
    """

    layer: GroupedLayer
    dead: Tensor


def dead_units(groups: Groups) -> list[DeadUnits]:
    """Find the heads or hidden units that nothing reads, those that have to stay included.

    >>> from torch import nn
    >>> from lightning_wgsef.groupings.hidden import hidden_groups
    >>> network = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    >>> _ = network[2].weight.data[:, 1:3].zero_()
    >>> dead_units(hidden_groups(network))[0].dead.tolist()
    [False, True, True, False, False, False]
    """
    found = []
    for layer in (layer for layer in groups.layers if layer.has_reader):
        own = layer.members if layer.grouping == "expert" else layer.members[-1:]
        dead = ~Groups([replace(layer, members=own)]).alive().cpu()
        if int((~dead).sum()) < layer.least:
            dead[: layer.least] = False  # a layer cannot be empty
        if (layer.removable or layer.obstacle) and bool(dead.any()):
            found.append(DeadUnits(layer, dead))
    return found

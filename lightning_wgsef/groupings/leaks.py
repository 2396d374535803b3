"""Why channels cannot be taken out of a network, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.channel_slices import PRODUCERS, Slices, normalises_width, slices
from lightning_wgsef.groupings.graph import Graph, Tied
from lightning_wgsef.groupings.layers import canonical_name
from lightning_wgsef.groupings.operations import OPTYPE

_CENTRED = (OPTYPE.BN, OPTYPE.IN)


@dataclass(frozen=True, eq=False)
class Removable:
    """The groups of a layer as channels of the graph.

    Attributes:
        layer: the groups.
        tied: its channels, and everything that is tied to them.
        groups: the group of every bundle of channels.
        obstacle: why they cannot be taken out whatever their weights are; "" otherwise.
    """

    layer: GroupedLayer
    tied: Tied
    groups: dict[int, int]
    obstacle: str

    def bundles(self, dead: Tensor) -> set[int]:
        """The bundles of channels of some groups."""
        numbers = set(dead.tolist())
        return {bundle for bundle, group in self.groups.items() if group in numbers}


def as_channels(graph: Graph, layer: GroupedLayer) -> Removable:
    """Find the channels that the groups of a layer produce.

    >>> from lightning_wgsef.groupings.filters import filter_groups
    >>> from lightning_wgsef.groupings.graph import build_graph
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> first, last = filter_groups(network).layers
    >>> graph = build_graph(network, torch.ones(1, 4))
    >>> as_channels(graph, first).obstacle, as_channels(graph, last).obstacle
    ('', "its channels are the network's outputs")
    """
    modules = {name: module for module, name in graph.names.items()}
    for member in layer.members:
        path, _, tensor = member.name.rpartition(".")
        node = graph.engine.module2node.get(modules.get(path))
        axis = int(getattr(modules.get(path), "transposed", False) and node.type == OPTYPE.CONV)
        if node and node.type in PRODUCERS and tensor == "weight" and member.axes == (axis,):
            break
    else:
        return Removable(layer, Tied(), {}, "its groups are not the channels that a layer makes")
    index = range(member.slices) if member.index is None else member.index.tolist()
    owner = {channel: group for channel, group in enumerate(index) if group >= 0}
    tied = graph.tied(node.module, owner)
    groups: dict[int, int] = {}
    obstacle = tied.obstacle
    for channel, bundle in tied.bundle.items():
        other = groups.setdefault(bundle, owner[channel])
        if other != owner[channel]:
            obstacle = obstacle or f"groups {other} and {owner[channel]} can only go together"
    found = Removable(layer, tied, groups, obstacle)
    if not obstacle:
        found = Removable(layer, tied, groups, _never(graph, found))
    return found


def cause_of_leak(graph: Graph, found: Removable) -> str:
    """What keeps zero channels from being nothing; "" if it is not known.

    Looked for in this order: norms over the channels, norms without scale and shift, shifts that
    are in no group, activations that turn zero into something else.
    """
    passed = graph.modules(found.tied)
    for module in passed:
        name, kind = graph.names[module], type(module).__name__
        node = graph.engine.module2node.get(module)
        if node is not None and node.type in _CENTRED and not getattr(module, "affine", True):
            return f"{kind} '{name}' has no scale and shift: it turns 0 into a constant"
        if normalises_width(module) or isinstance(module, nn.GroupNorm):
            return f"{kind} '{name}' normalises over these channels"
    missing = list(_missing(graph, found))
    for name, tensor in sorted(missing, key=lambda place: place[1] != "bias"):
        return f"the {tensor} of '{name}' is in no group"
    for module in passed:
        if not list(module.parameters()):
            value = _of_zero(module)
            if value:
                name, kind = graph.names[module], type(module).__name__
                return f"'{name}' ({kind}) turns 0 into {value:.3g}"
    operations = {
        type(node.grad_fn).__name__.removesuffix("Backward0")
        for node, _ in found.tied.positions
        if node.type == OPTYPE.ELEMENTWISE and node.grad_fn is not None
    }
    return (
        f"zero does not stay zero in one of {', '.join(sorted(operations))}" if operations else ""
    )


def _never(graph: Graph, found: Removable) -> str:
    for side in found.tied.positions:
        if side[0] in graph.outputs and graph.outward(side):
            return "its channels are the network's outputs"
    for name, tensor in _missing(graph, found):
        module = next(module for module, own in graph.names.items() if own == name)
        node = graph.engine.module2node.get(module)
        # A depthwise filter makes zero of zero if it has no bias; a trial will tell.
        if tensor == "weight" and node is not None and node.type in (OPTYPE.CONV, OPTYPE.LINEAR):
            return f"tied to '{name}'; grouping='structure' takes both out"
    return ""


def _missing(graph: Graph, found: Removable) -> Iterator[tuple[str, str]]:
    """Module and tensor of what makes or scales the channels without being in their groups."""
    parameters = {id(p): name for name, p in graph.model.named_parameters()}
    members = {member.name: member for member in found.layer.members}
    for side in found.tied.positions:
        for place in slices(graph, found.tied, side):
            name = canonical_name(parameters.get(id(place.parameter), ""))
            member = members.get(name)
            index = None if member is None or member.axes != (place.axis,) else member.index
            if member is not None and index is None and member.axes == (place.axis,):
                index = torch.arange(member.slices)
            if index is None or not _covered(place, index, found.groups):
                path, _, tensor = name.rpartition(".")
                yield path, tensor


def _covered(place: Slices, index: Tensor, groups: dict[int, int]) -> bool:
    return all(int(index[at]) == groups[bundle] for at, bundle in place.groups.items())


def _of_zero(module: nn.Module) -> float:
    try:
        with torch.no_grad():
            value = module(torch.zeros(2, 1, 4, 4))
    except Exception:  # any module of the user's may be here, and takes what it takes
        return 0.0
    return float(value.flatten()[0]) if isinstance(value, Tensor) and value.numel() else 0.0

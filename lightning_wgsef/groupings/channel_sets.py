"""All sets of tied channels of a network, each once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_wgsef.groupings.channel_slices import PRODUCERS, produced, slices
from lightning_wgsef.groupings.graph import Graph, Side, Tied
from lightning_wgsef.groupings.layers import weighted_layers

_Use = tuple[int, dict[int, int]]


@dataclass(frozen=True, eq=False)
class ChannelSet:
    """Channels that are tied to those of one layer.

    Attributes:
        name: of the first layer that makes them.
        tied: everything that is tied to them.
        obstacle: why they cannot be told apart or cut; "" if they can.
        is_output: are they channels of the network's outputs?
    """

    name: str
    tied: Tied
    obstacle: str
    is_output: bool


def channel_sets(graph: Graph) -> Iterator[ChannelSet]:
    """The sets of the layers of a graph, in order of definition.

    >>> import torch
    >>> from lightning_wgsef.groupings.graph import build_graph
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> graph = build_graph(network, torch.ones(1, 3, 8, 8))
    >>> [(found.name, found.tied.count, found.is_output) for found in channel_sets(graph)]
    [('0', 8, False), ('2', 2, True)]
    """
    taken: dict[nn.Module, set[int]] = {}
    layers = list(weighted_layers(graph.model))
    problems = {layer.name: layer.problem for layer in layers if layer.problem}
    users: dict[int, list[nn.Module]] = {}
    for module in graph.names:
        for number in {id(parameter) for parameter in module.parameters(recurse=False)}:
            users.setdefault(number, []).append(module)
    for layer in layers:
        if layer.module not in graph.engine.module2node:
            continue
        channels = set(range(layer.outputs)) - taken.get(layer.module, set())
        if not channels:
            continue
        tied = graph.tied(layer.module, sorted(channels))
        obstacle = tied.obstacle or _obstacle(graph, tied, problems) or _shared(graph, tied, users)
        for module, positions in produced(graph, tied):
            if taken.setdefault(module, set()) & positions.keys():
                obstacle = obstacle or f"its channels overlap those of '{graph.names[module]}'"
            taken[module] |= positions.keys()
        if tied.count < 2:
            bundle = f"its {len(channels)} channels can only be removed together"
            obstacle = obstacle or (bundle if len(channels) > 1 else "it has one channel")
        is_output = any(side[0] in graph.outputs and graph.outward(side) for side in tied.positions)
        yield ChannelSet(layer.name, tied, obstacle, is_output)


def _obstacle(graph: Graph, tied: Tied, problems: dict[str, str]) -> str:
    """Why the parameters of these channels cannot be cut."""
    parameters = {id(p): name for name, p in graph.model.named_parameters()}
    for side in tied.positions:
        node, _ = side
        name = graph.names.get(node.module, "")
        if graph.outward(side) and name in problems:
            return f"'{name}': {problems[name]}"
        for found in slices(graph, tied, side):
            if id(found.parameter) not in parameters:
                return f"'{name}': its weight is computed from other tensors"
            size = found.parameter.shape[found.axis]
            if found.axis < 0 or max(found.groups) >= size:
                own = parameters[id(found.parameter)]
                return f"'{own}' has no axis of {len(found.groups)} channels"
    return ""


def _shared(graph: Graph, tied: Tied, users: dict[int, list[nn.Module]]) -> str:
    """Weights that several modules share must be cut in all of them alike."""
    uses: dict[int, dict[nn.Module, _Use]] = {}
    for side in tied.positions:
        for parameter, axis, groups in _touched(graph, tied, side):
            uses.setdefault(id(parameter), {})[side[0].module] = (axis, groups)
    names = {id(p): name for name, p in graph.model.named_parameters()}
    for number, by_module in uses.items():
        sharing = users.get(number, [])
        first, *others = by_module.values()
        if len(sharing) > 1 and (len(sharing) != len(by_module) or any(x != first for x in others)):
            modules = " and ".join(f"'{graph.names[user]}'" for user in sharing)
            return f"{modules} share '{names[number]}' (tied) for different channels"
    return ""


def _touched(graph: Graph, tied: Tied, side: Side) -> Iterator[tuple[Tensor, int, dict[int, int]]]:
    """All weights that removal would cut: what reads the channels, too."""
    node, _ = side
    for found in slices(graph, tied, side):
        yield found.parameter, found.axis, found.groups
    if not graph.outward(side) and node.type in PRODUCERS:
        groups = {place: tied.bundle[root] for place, root in tied.positions[side].items()}
        yield node.module.weight, int(not getattr(node.module, "transposed", False)), groups

"""Which channels of a network do nothing, as its weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.channels import (
    PRODUCERS,
    ChannelSet,
    channel_sets,
    input_obstacles,
    produced,
    read_weight,
    slices,
)
from lightning_wgsef.network.dependency_graph import Graph
from lightning_wgsef.network.layers import modules_by_name, weighted_layers
from lightning_wgsef.network.operations import OPTYPE
from lightning_wgsef.network.recurrent import recurrent_layers
from lightning_wgsef.slimming.constant_folding import constants, fold


@dataclass(frozen=True, eq=False)
class DeadChannels:
    """Channels of a set that do nothing.

    Attributes:
        found: the set.
        bundles: numbers of the bundles of channels that do nothing.
    """

    found: ChannelSet
    bundles: set[int]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads channels of a set: the bundle at each position of its inputs.

    Positions that it has only zero weights for are not among them.
    """

    name: str
    bundles: dict[int, int]

    def positions(self, bundles: set[int]) -> list[int]:
        return [place for place, bundle in self.bundles.items() if bundle in bundles]


def dead_channels(
    graph: Graph, network: nn.Module, examples: Sequence[tuple[bool, Any]], *, folding: bool = True
) -> tuple[list[DeadChannels], dict[str, str]]:
    """Find the channels that nothing reads, or that are zero whatever the input is.

    A channel does not depend on the input if all weights that make it are zero. Where it is then a
    constant other than zero, as behind a sigmoid or with a bias, it is folded into the biases of
    the layers that read it, if that is exact.

    Args:
        graph: the graph of ``network``; its own model is run, in both modes.
        network: its weights and biases change where a constant is folded.
        examples: inputs to see the constants on, and whether in training mode.
        folding: may constants other than zero be folded?

    Returns:
        The channels, and for layers whose zero channels have to stay, the reason.
    """
    modules: dict[str, Any] = {name: module for module, name in graph.names.items()}
    own = modules_by_name(network)
    sets, kept = [], {}
    for found in channel_sets(graph):
        if found.obstacle or found.is_output:
            if found.obstacle and _input_free(graph, found):
                kept[found.name] = found.obstacle
            continue
        silent = _input_free(graph, found)
        readers = list(_readers(graph, found))
        if readers:
            sets.append((found, readers, silent))
    places: dict[str, list[int]] = {}
    for _, readers, silent in sets:
        for reader in readers:
            places.setdefault(reader.name, []).extend(reader.positions(silent))
    places = {name: positions for name, positions in places.items() if positions}
    values = constants(graph.model, modules, places, examples) if places else {}
    known = {
        (name, place): float(value)
        for name, positions in places.items()
        for place, value in zip(positions, values[name].tolist(), strict=True)
    }
    dead = []
    for found, readers, silent in sets:
        gone = set(found.tied.bundle.values())
        gone -= {bundle for reader in readers for bundle in reader.bundles.values()}
        for bundle in silent - gone:
            reason = _silence(readers, bundle, known, own if folding else {})
            if reason:
                kept[found.name] = reason
            else:
                gone.add(bundle)
        if gone:
            dead.append(DeadChannels(found, gone))
    return dead, kept


def has_zero_channels(network: nn.Module) -> bool:
    """Has any layer a filter or hidden unit of zeros, or an input channel that it does not read?

    >>> layer = nn.Linear(2, 2)
    >>> has_zero_channels(layer), layer.weight.data[:, 1].zero_(), has_zero_channels(layer)
    (False, tensor([0., 0.]), True)
    """
    weights = [layer.weight for layer in weighted_layers(network) if not layer.problem]
    for _, module in recurrent_layers(network):
        weights += [p for p in module.parameters(recurse=False) if p.dim() > 1]
    return any(not bool(_any_along(weight, axis).all()) for weight in weights for axis in (0, 1))


def zeros_left(graph: Graph, network: nn.Module) -> dict[str, str]:
    """Say why layers still have zero filters or input channels that they do not read."""
    obstacles, left = input_obstacles(graph), {}
    whys = {}
    for found in channel_sets(graph):
        made = [graph.names[module] for module, _ in produced(graph, found.tied)]
        last = [graph.names[m] for m, places in produced(graph, found.tied) if len(places) == 1]
        why = "what reads them is not zero"
        if found.tied.count < len(found.tied.bundle):
            why = "others, which can only go together with them, are not zero"
        elif last:
            why = f"'{last[0]}' keeps its last channel"
        whys.update(dict.fromkeys(made, why))
    for layer in weighted_layers(network):
        if layer.problem:
            continue
        if not bool(layer.weight.any()) and layer.outputs == 1:
            left[layer.name] = "all its weights are zero, but a layer keeps its last channel"
        elif not bool(_read_channels(layer.module).all()):
            reason = obstacles.get(layer.name) or "what makes them has to stay"
            left[layer.name] = f"zero input channels: {reason}"
        elif not bool(_any_along(layer.weight, int(layer.transposed)).all()):
            why = whys.get(layer.name, "what reads them is not zero")
            left[layer.name] = f"zero filters: {why}"
    return left


def _input_free(graph: Graph, found: ChannelSet) -> set[int]:
    """The bundles of which all weights are zero; biases, scales and shifts may be anything."""
    alive: set[int] = set()
    for side in found.tied.positions:
        if side[0].type not in (*PRODUCERS, OPTYPE.EMBED):
            continue
        for part in slices(graph, found.tied, side):
            if part.parameter is not getattr(side[0].module, "bias", None):
                # Where positions cannot be relied on, they may lie beyond what there is.
                nonzero = dict(enumerate(_any_along(part.parameter, part.axis).tolist()))
                alive |= {b for place, b in part.groups.items() if nonzero.get(place, True)}
    return set(found.tied.bundle.values()) - alive


def _readers(graph: Graph, found: ChannelSet) -> Iterator[_Reader]:
    for side, roots in found.tied.positions.items():
        node, _ = side
        if graph.reads(side):
            reads = _read_channels(node.module).tolist()
            bundles = {place: found.tied.bundle[root] for place, root in roots.items()}
            read = {place: bundle for place, bundle in bundles.items() if reads[place]}
            yield _Reader(graph.names[node.module], read)


def _read_channels(module: Any) -> Tensor:
    """Which of its input channels a layer has weights for that are not zero."""
    weight = read_weight(module)
    if getattr(module, "transposed", False):
        return _any_along(weight, 0)
    # Each part of a grouped convolution has its own rows, and columns of the same numbers.
    parts = weight.reshape(getattr(module, "groups", 1), -1, *weight.shape[1:])
    return torch.cat([_any_along(part, 1) for part in parts])


def _any_along(tensor: Tensor, axis: int) -> Tensor:
    nonzero = tensor.detach().ne(0)
    return nonzero if tensor.dim() == 1 else nonzero.movedim(axis, 0).flatten(1).any(1)


def _silence(
    readers: list[_Reader],
    bundle: int,
    known: Mapping[tuple[str, int], float],
    modules: Mapping[str, nn.Module],
) -> str:
    """Make sure that a channel is zero for all its readers; else why it is not."""
    for reader in readers:
        positions = reader.positions({bundle})
        values = torch.tensor([known[reader.name, place] for place in positions])
        if bool(values.isnan().any()):
            return f"zero filters reach '{reader.name}' as something that is not constant"
        if bool((values != 0).any()) and not modules:
            return f"folding a constant that is not zero into '{reader.name}' changes the outputs"
        if bool((values != 0).any()) and reader.name not in modules:
            return f"a constant that is not zero cannot be folded into '{reader.name}'"
        if bool((values != 0).any()):
            reason = fold(modules[reader.name], positions, values)
            if reason:
                return f"{reason} in '{reader.name}'"
    return ""

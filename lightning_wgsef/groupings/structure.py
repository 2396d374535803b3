"""Coupled channels as groups, found through the dependency graph: the grouping `structure`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.groups.norm_statistics import NormStatistics, has_statistics
from lightning_wgsef.network.channels import (
    ChannelSet,
    channel_sets,
    is_scale,
    layer_name,
    normalises_width,
    produced,
    slices,
)
from lightning_wgsef.network.dependency_graph import CoupledChannels, Graph, build_graph
from lightning_wgsef.network.layers import (
    modules_by_name,
    other_layers,
    tensors_by_name,
    unwrap,
    weighted_layers,
)
from lightning_wgsef.network.operations import OPTYPE
from lightning_wgsef.network.recurrent import UnitLayer


def structure_groups(model: nn.Module, example_input: Any) -> Groups:
    """Group everything that makes one channel: filters, biases, norms, through the whole graph.

    Layers whose channels are tied, by residual sums, depthwise convolutions or whatever, are one
    layer of groups, called after the first of them. Where channels can only be removed together
    (aligned parts of a grouped convolution) a group is a bundle of channels. Columns that read the
    channels are in no group: a channel that is zero needs none of them (the zero-invariant groups
    of OTO, arXiv:2107.07467).

    Reserved are the network's outputs, residual streams that are normalised as a whole, and frozen
    layers. Left out is what the dependency graph of torch-pruning (DepGraph, arXiv:2301.12900)
    cannot tell, such as attention.

    Args:
        model: any module; it is copied, not touched.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    Raises:
        ValueError: the model cannot be copied, run or followed by autograd.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    >>> groups = structure_groups(network, torch.ones(1, 3, 8, 8))
    >>> [member.name for member in groups.layers[0].members]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> groups.layers[1].reserved
    "its channels are the network's outputs"
    """
    graph = build_graph(model, example_input)
    inner = unwrap(model)
    own, modules = tensors_by_name(inner), modules_by_name(inner)
    originals = {
        id(tensor): (name, own[name])
        for name, tensor in graph.tensors.values()
        if name in own and is_scale(name, own[name])
    }
    layers, left_out = [], other_layers(inner)
    for layer in weighted_layers(graph.model):
        if layer.module not in graph.engine.module2node:
            name = layer_name(graph, layer.module)
            left_out[name] = "the graph of example_input does not pass through it"
    for found in channel_sets(graph):
        if found.obstacle:
            left_out[found.name] = found.obstacle
            for module, _ in produced(graph, found.tied):
                left_out.setdefault(layer_name(graph, module), found.obstacle)
            continue
        members = _members(graph, found.tied, originals)
        for module in graph.modules(found.tied):
            if isinstance(module, nn.Embedding | UnitLayer):
                left_out.pop(layer_name(graph, module), None)
        reserved = _reserved(graph, found, members)
        layers.append(
            GroupedLayer(
                found.name,
                "structure",
                found.tied.count,
                members,
                removable=True,
                reserved=reserved,
                statistics=_statistics(graph, found.tied, modules),
            )
        )
    grouped = {layer.name for layer in layers}
    return Groups(layers, {name: why for name, why in left_out.items() if name not in grouped})


def stream_groups(model: nn.Module, example_input: Any) -> Groups:
    """Group the channels of residual streams that are normalised as a whole: the hidden size.

    A stream is one set of `structure_groups`, which reserves it: columns of the embeddings, rows of
    all layers that add to it, scales of the norms. Zero channels can be taken out where the norms
    divide by the mean square (RMSNorm): over fewer channels it grows by a known factor, which
    weight and epsilon make up for. LayerNorm subtracts the mean over all channels, so that zero
    channels are zero no more, and have to stay.

    Args:
        model: any module; it is copied, not touched.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    Raises:
        ValueError: see `structure_groups`.
    """
    found = structure_groups(model, example_input)
    streams = [x for x in found.layers if x.reserved.startswith(_STREAM)]
    others = {x.name: "no residual stream" for x in found.layers if x not in streams}
    return Groups(
        [replace(x, grouping="stream", reserved="") for x in streams], {**found.left_out, **others}
    )


_STREAM = "residual stream of"


def _members(
    graph: Graph, tied: CoupledChannels, originals: Mapping[int, tuple[str, Tensor]]
) -> tuple[Member, ...]:
    """List the weights in groups; a parameter that several modules share is there once."""
    members: dict[int, Member] = {}
    for side in tied.positions:
        for found in slices(graph, tied, side):
            if id(found.parameter) not in originals:
                continue  # statistics, which a zero scale outweighs
            name, parameter = originals[id(found.parameter)]
            index = found.index()
            plain = len(index) == tied.count and bool((index == torch.arange(len(index))).all())
            members[id(parameter)] = Member(
                name, parameter, (found.axis,), None if plain else index.to(parameter.device)
            )
    order = [id(parameter) for _, parameter in originals.values()]
    return tuple(sorted(members.values(), key=lambda x: order.index(id(x.parameter))))


def _statistics(
    graph: Graph, tied: CoupledChannels, modules: Mapping[str, nn.Module]
) -> tuple[NormStatistics, ...]:
    """List the norms that some of the channels pass."""
    found: dict[str, Tensor] = {}
    for side, positions in tied.positions.items():
        name = graph.names.get(side[0].module, "")
        if has_statistics(modules.get(name)) and graph.outward(side):
            index = torch.full((len(side[0].module.running_mean),), -1)
            index[list(positions)] = torch.tensor([tied.bundle[x] for x in positions.values()])
            found[name] = index
    return tuple(NormStatistics(name, modules[name], index) for name, index in found.items())


def _reserved(graph: Graph, found: ChannelSet, members: tuple[Member, ...]) -> str:
    tied = found.tied
    if found.is_output:
        return "its channels are the network's outputs"
    frozen = [
        member.name
        for member in members
        if isinstance(member.parameter, nn.Parameter) and not member.parameter.requires_grad
    ]
    if frozen:
        return f"frozen: {frozen[0]} has no gradient"
    makers = (OPTYPE.CONV, OPTYPE.LINEAR, OPTYPE.EMBED)
    sides = [
        side
        for side in tied.positions
        if side[0].type in makers and graph.outward(side) and not graph.multiplier(side[0])
    ]
    producers = list(dict.fromkeys(layer_name(graph, side[0].module) for side in sides))
    if len(producers) > 1 and any(map(normalises_width, graph.modules(tied))):
        names = ", ".join(f"'{name}'" for name in producers[:3])
        return f"{_STREAM} {names}{' ..' if len(producers) > 3 else ''}"
    return ""

"""`structure`: everything that produces or scales one channel, found through the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.example_runs import run_example
from lightning_wgsef.groupings.graph import Graph, Side, Tied, build_graph
from lightning_wgsef.groupings.layers import canonical_name, other_layers, weighted_layers
from lightning_wgsef.groupings.operations import OPTYPE, removal_obstacle
from lightning_wgsef.groups import Groups
from lightning_wgsef.members import Member

PRODUCERS = (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV, OPTYPE.LINEAR)
_SCALES = (OPTYPE.BN, OPTYPE.LN, OPTYPE.GN, OPTYPE.IN, OPTYPE.PRELU)


@dataclass(frozen=True, eq=False)
class Slices:
    """Which group every slice of a parameter of the graph's model is in."""

    parameter: Tensor
    axis: int
    groups: dict[int, int]

    def index(self) -> Tensor:
        """Group of every slice, -1 for none, shape (slices,)."""
        index = torch.full((self.parameter.shape[self.axis],), -1)
        index[list(self.groups)] = torch.tensor(list(self.groups.values()))
        return index


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
    original = _Originals(model, graph)
    left_out = other_layers(graph.model)
    found: dict[str, Tied] = {}
    taken: dict[nn.Module, set[int]] = {}
    for layer in weighted_layers(graph.model):
        if layer.module not in graph.engine.module2node:
            left_out.setdefault(layer.name, "the graph of example_input does not pass through it")
            continue
        channels = set(range(layer.outputs)) - taken.get(layer.module, set())
        if not channels:
            continue
        tied = graph.tied(layer.module, sorted(channels))
        reason = tied.obstacle or original.obstacle(tied)
        for module, positions in _produced(graph, tied):
            if taken.setdefault(module, set()) & positions.keys():
                reason = reason or f"its channels overlap those of '{graph.names[module]}'"
            taken[module] |= positions.keys()
        if tied.count < 2:
            bundle = f"its {len(channels)} channels can only be removed together"
            reason = reason or (bundle if len(channels) > 1 else "it has one channel")
        if reason:
            _leave_out(graph, tied, layer.name, reason, left_out)
        else:
            found[layer.name] = tied
    members = {name: original.members(tied) for name, tied in found.items()}
    layers = []
    for name, (obstacle, is_constant) in _trials(graph, found, example_input).items():
        tied = found[name]
        if obstacle and not is_constant:
            _leave_out(graph, tied, name, obstacle, left_out)
            continue
        for module in graph.modules(tied):
            if isinstance(module, nn.Embedding):
                left_out.pop(graph.names[module], None)
        obstacle = _unequal(graph, tied) or obstacle
        layers.append(
            GroupedLayer(
                name,
                "structure",
                tied.count,
                members[name],
                removable=not obstacle,
                obstacle=obstacle,
                reserved=_reserved(graph, tied, members[name]),
            )
        )
    grouped = {layer.name for layer in layers}
    return Groups(layers, {name: why for name, why in left_out.items() if name not in grouped})


def slices(graph: Graph, tied: Tied, side: Side) -> Iterator[Slices]:
    """The weights that produce or scale the channels at one side of a node.

    >>> graph = build_graph(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(1, 4))
    >>> tied = graph.tied(graph.model[0], [0, 1])
    >>> [(x.axis, x.groups) for side in tied.positions for x in slices(graph, tied, side)]
    [(0, {0: 0, 1: 1}), (0, {0: 0, 1: 1})]
    """
    node, _ = side
    groups = {place: tied.bundle[root] for place, root in tied.positions[side].items()}
    if not graph.outward(side) or any(node.module is given for given in graph.inputs):
        return
    if node.type == OPTYPE.PARAMETER:
        yield Slices(node.module, parameter_axis(node.module, len(groups)), groups)
    elif node.type == OPTYPE.EMBED:
        yield Slices(node.module.weight, 1, groups)
    elif node.type in PRODUCERS + _SCALES:
        # A depthwise transposed convolution has its one filter for each channel along axis 0.
        across = node.type == OPTYPE.CONV and node.module.transposed
        for name, axis in (("weight", int(across)), ("bias", 0)):
            parameter = getattr(node.module, name, None)
            if parameter is not None:
                yield Slices(parameter, axis, groups)


def parameter_axis(parameter: Tensor, width: int) -> int:
    """The axis of a parameter used by itself that holds ``width`` channels, or -1.

    >>> parameter_axis(torch.ones(1, 8, 4, 4), 8), parameter_axis(torch.ones(1, 5, 8), 8)
    (1, 2)
    """
    axes = [axis for axis, size in enumerate(parameter.shape) if size == width]
    if not axes:
        return -1
    return axes[0] if parameter.dim() > 3 else axes[-1]


class _Originals:
    """The model's own parameters, by those of the graph's copy."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        model = getattr(model, "_orig_mod", model)
        own = dict(model.named_parameters())
        self.graph = graph
        self.own = {
            id(parameter): (canonical_name(name), own[name])
            for name, parameter in graph.model.named_parameters()
        }
        self.users: dict[int, list[nn.Module]] = {}
        for module in graph.names:
            for number in {id(p) for p in module.parameters(recurse=False)}:
                self.users.setdefault(number, []).append(module)
        self.problems = {x.name: x.problem for x in weighted_layers(model) if x.problem}

    def members(self, tied: Tied) -> tuple[Member, ...]:
        """The weights in groups; a parameter that several modules share is there once."""
        members: dict[int, Member] = {}
        for side in tied.positions:
            for found in slices(self.graph, tied, side):
                name, parameter = self.own[id(found.parameter)]
                index = found.index()
                plain = len(index) == tied.count and bool((index == torch.arange(len(index))).all())
                members[id(parameter)] = Member(
                    name, parameter, (found.axis,), None if plain else index.to(parameter.device)
                )
        order = [id(parameter) for _, parameter in self.own.values()]
        return tuple(sorted(members.values(), key=lambda x: order.index(id(x.parameter))))

    def obstacle(self, tied: Tied) -> str:
        """Why the parameters of these channels cannot be members."""
        for side in tied.positions:
            node, _ = side
            name = self.graph.names.get(node.module, "")
            if self.graph.outward(side) and name in self.problems:
                return f"'{name}': {self.problems[name]}"
            for found in slices(self.graph, tied, side):
                if id(found.parameter) not in self.own:
                    return f"'{name}': its weight is computed from other tensors"
                size = found.parameter.shape[found.axis]
                if found.axis < 0 or max(found.groups) >= size:
                    parameter, _ = self.own[id(found.parameter)]
                    return f"'{parameter}' has no axis of {len(found.groups)} channels"
        return self._tied_problem(tied)

    def _tied_problem(self, tied: Tied) -> str:
        """Weights that several modules share must be cut in all of them alike."""
        uses: dict[int, dict[nn.Module, tuple[int, dict[int, int]]]] = {}
        for side in tied.positions:
            for parameter, axis, groups in self._touched(tied, side):
                uses.setdefault(id(parameter), {})[side[0].module] = (axis, groups)
        for number, by_module in uses.items():
            users = self.users.get(number, [])
            first, *others = by_module.values()
            if len(users) > 1 and (len(users) != len(by_module) or any(x != first for x in others)):
                names = " and ".join(f"'{self.graph.names[user]}'" for user in users)
                return f"{names} share '{self.own[number][0]}' (tied) for different channels"
        return ""

    def _touched(self, tied: Tied, side: Side) -> Iterator[tuple[Tensor, int, dict[int, int]]]:
        """All weights that removal would cut: what reads the channels, too."""
        node, _ = side
        for found in slices(self.graph, tied, side):
            yield found.parameter, found.axis, found.groups
        if not self.graph.outward(side) and node.type in PRODUCERS:
            groups = {place: tied.bundle[root] for place, root in tied.positions[side].items()}
            yield node.module.weight, int(not getattr(node.module, "transposed", False)), groups


def _produced(graph: Graph, tied: Tied) -> Iterator[tuple[nn.Module, dict[int, int]]]:
    for side, positions in tied.positions.items():
        if side[0].type in PRODUCERS and graph.outward(side):
            yield side[0].module, positions


def _reserved(graph: Graph, tied: Tied, members: tuple[Member, ...]) -> str:
    if any(side[0] in graph.outputs and graph.outward(side) for side in tied.positions):
        return "its channels are the network's outputs"
    frozen = [member.name for member in members if not member.parameter.requires_grad]
    if frozen:
        return f"frozen: {frozen[0]} has no gradient"
    makers = (OPTYPE.CONV, OPTYPE.LINEAR, OPTYPE.EMBED)
    sides = [side for side in tied.positions if side[0].type in makers and graph.outward(side)]
    producers = [graph.names[side[0].module] for side in sides]
    if len(producers) > 1 and any(map(normalises_width, graph.modules(tied))):
        names = ", ".join(f"'{name}'" for name in producers[:3])
        return f"residual stream of {names}{' ..' if len(producers) > 3 else ''}"
    return ""


def _leave_out(graph: Graph, tied: Tied, name: str, why: str, left_out: dict[str, str]) -> None:
    left_out[name] = why
    for module, _ in _produced(graph, tied):
        left_out.setdefault(graph.names[module], why)


def _unequal(graph: Graph, tied: Tied) -> str:
    """Why a network without the channels is another than one in which they are zero."""
    for module in graph.modules(tied):
        if normalises_width(module):
            name = graph.names[module]
            return f"{type(module).__name__} '{name}' normalises over the channels"
    for (node, _), positions in tied.positions.items():
        if obstacle := removal_obstacle(node, max(positions) + 1):
            return obstacle
    return ""


def _trials(
    graph: Graph, found: dict[str, Tied], example_input: Any
) -> dict[str, tuple[str, bool]]:
    """Whether zero groups reach as zeros what reads them; if not, why, and if as constants.

    Tried, on the graph's model, with half the groups of every set zero at once: the graph takes
    an operation that it does not know for one that keeps every channel in its place.
    """
    generator = torch.Generator().manual_seed(0)
    results, hooks = dict.fromkeys(found, ("", True)), []
    with torch.no_grad(), torch.random.fork_rng([]):
        for parameter in graph.model.parameters():
            parameter.masked_fill_(parameter == 0, 0.1)  # other zeros would hide mistakes
        for name, tied in found.items():
            order = torch.randperm(tied.count, generator=generator).tolist()
            dead = set(order[: (tied.count + 1) // 2])
            for side, positions in tied.positions.items():
                for part in slices(graph, tied, side):
                    places = [place for place, group in part.groups.items() if group in dead]
                    index = torch.tensor(places, dtype=torch.long, device=part.parameter.device)
                    part.parameter.index_fill_(part.axis, index, 0)
                if not graph.outward(side) and side[0].type in (OPTYPE.CONV, OPTYPE.LINEAR):
                    places = [x for x, root in positions.items() if tied.bundle[root] in dead]
                    reader = side[0].module
                    check = partial(_check_zeros, results, name, graph.names[reader], places)
                    hooks.append(reader.register_forward_pre_hook(check))
        run_example(graph.model, example_input)
    for hook in hooks:
        hook.remove()
    return results


def _check_zeros(
    results: dict[str, tuple[str, bool]],
    name: str,
    reader: str,
    places: list[int],
    module: Any,
    inputs: tuple[Any, ...],
) -> None:
    """Before the reader runs: note what is not zero at the places of its input."""
    axis = 1 - module.weight.dim()
    channels = inputs[0].movedim(axis, 0)[places].flatten(1)
    if bool((channels != 0).any()):
        constant = bool((channels == channels[:, :1]).all())
        why = f"a zero channel reaches '{reader}' as a constant that is not zero"
        if not constant:
            why = f"its channels do not reach '{reader}' where the graph has them"
        results[name] = max(results[name], (why, constant), key=lambda result: not result[1])


def normalises_width(module: object) -> bool:
    """Does the module normalise over its channels, as LayerNorm does?

    >>> normalises_width(nn.LayerNorm(4)), normalises_width(nn.BatchNorm1d(4))
    (True, False)
    """
    if isinstance(module, nn.GroupNorm):
        return module.num_groups < module.num_channels
    kind = type(module).__name__
    return isinstance(module, nn.LayerNorm) or "RMSNorm" in kind or "LayerNorm" in kind

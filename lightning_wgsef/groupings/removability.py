"""Removability of zero groups from a network, by trial, and the obstacles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_wgsef.groupings.unit_removal import unit_removal
from lightning_wgsef.groups.grouped_layer import GroupedLayer, with_values
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.channels import (
    PRODUCERS,
    Slices,
    channel_sets,
    is_scale,
    layer_name,
    mean_square_norm,
    normalises_width,
    slices,
)
from lightning_wgsef.network.dependency_graph import CoupledChannels, Graph, build_graph
from lightning_wgsef.network.equivalence import differing_layer, layer_outputs
from lightning_wgsef.network.example_input import observed, perturbed, reason_of
from lightning_wgsef.network.interface import InterfaceObserver, idle_parts
from lightning_wgsef.network.layers import modules_by_name, tensors_by_name, weighted_layers
from lightning_wgsef.network.operations import OPTYPE, normalised_together
from lightning_wgsef.network.recurrent import UnitLayer
from lightning_wgsef.network.surgery import RemovalPlan, channel_removal, possible_removals
from lightning_wgsef.network.trial_inputs import TrialInputs

_CENTRED = (OPTYPE.BN, OPTYPE.IN)


@dataclass(frozen=True, eq=False)
class Removable:
    """Groups of a layer as channels of the graph.

    Attributes:
        layer: the groups.
        tied: its channels, and everything that is tied to them.
        groups: the group of every bundle of channels.
        obstacle: why they cannot be taken out whatever their weights are; "" otherwise.
    """

    layer: GroupedLayer
    tied: CoupledChannels
    groups: dict[int, int]
    obstacle: str

    def bundles(self, dead: Tensor) -> set[int]:
        """Return the bundles of channels of some groups."""
        numbers = set(dead.tolist())
        return {bundle for bundle, group in self.groups.items() if group in numbers}


def as_channels(graph: Graph, layer: GroupedLayer) -> Removable:
    """Find the channels that the groups of a layer produce.

    >>> from lightning_wgsef.groupings.per_layer import filter_groups
    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> first, last = filter_groups(network).layers
    >>> graph = build_graph(network, torch.ones(1, 4))
    >>> as_channels(graph, first).obstacle, as_channels(graph, last).obstacle
    ('', "its channels are the network's outputs")
    """
    makers = _makers(graph)
    for member in layer.members:
        module = makers.get(member.name)
        node = graph.engine.module2node.get(module)
        axis = int(getattr(module, "transposed", False) and node.type == OPTYPE.CONV)
        if node and node.type in PRODUCERS and member.axes == (axis,):
            break
    else:
        return Removable(
            layer, CoupledChannels(), {}, "its groups are not the channels that a layer makes"
        )
    index = range(member.slices) if member.index is None else member.index.tolist()
    index = index[: module.out_features] if isinstance(module, UnitLayer) else index
    owner = {channel: group for channel, group in enumerate(index) if group >= 0}
    tied = graph.tied(node.module, owner)
    groups: dict[int, int] = {}
    obstacle = tied.obstacle
    for channel, bundle in tied.bundle.items():
        other = groups.setdefault(bundle, owner[channel])
        if other != owner[channel]:
            obstacle = obstacle or _together(graph, tied, other, owner[channel])
    found = Removable(layer, tied, groups, obstacle)
    if not obstacle:
        found = Removable(layer, tied, groups, _never(graph, found))
    return found


def _makers(graph: Graph) -> dict[str, nn.Module]:
    """List the modules of the graph that make channels, by the names of their weights."""
    return {
        f"{module.owner}.{module.matrix}".lstrip(".")
        if isinstance(module, UnitLayer)
        else f"{name}.weight".lstrip("."): module
        for module, name in graph.names.items()
    }


def as_read_channels(graph: Graph, layer: GroupedLayer) -> Removable:
    """Find the channels that the groups of a layer read, of which it must be the only reader.

    >>> from lightning_wgsef.groupings.per_layer import channel_groups
    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = build_graph(network, torch.ones(1, 4))
    >>> as_read_channels(graph, channel_groups(network).layers[1]).obstacle
    ''
    """
    (member,) = layer.members
    path = member.name.rpartition(".")[0]
    reader = next((module for module, name in graph.names.items() if name == path), None)
    groups, tied = dict[int, int](), CoupledChannels()
    sets = [
        (found, roots)
        for found in channel_sets(graph)
        for side, roots in found.tied.positions.items()
        if side[0].module is reader and not graph.outward(side)
    ]
    obstacle = "" if sets else "what it reads is made by no layer that could be cut"
    for found, _ in sets:
        others = [name for name in _reader_names(graph, found.tied) if name != path]
        if others:
            reads = f"'{others[0]}' reads these channels, too"
            obstacle = obstacle or f"{reads}; grouping='structure' takes them out of both"
        if found.is_output:
            obstacle = obstacle or "what it reads are the network's outputs, too"
        obstacle = obstacle or found.obstacle
    if len(sets) > 1:
        obstacle = obstacle or "it reads the channels of several layers side by side"
    if sets and not obstacle:
        found, roots = sets[0]
        tied = found.tied
        for place, root in roots.items():
            first = groups.setdefault(tied.bundle[root], place)
            if first != place:
                obstacle = obstacle or _together(graph, tied, first, place)
        if len(set(groups.values())) < layer.count:
            obstacle = obstacle or "not all that it reads is made by a layer that could be cut"
    return Removable(layer, tied, groups, obstacle)


def _together(graph: Graph, tied: CoupledChannels, one: int, other: int) -> str:
    """Say that two groups are channels of one bundle, and what bundles them."""
    sizes = {module: normalised_together(module) for module in graph.modules(tied)}
    norm = max(sizes, key=lambda module: sizes[module], default=None)
    if norm is not None and sizes[norm] > 1:
        return (
            f"GroupNorm '{graph.names[norm]}' normalises {sizes[norm]} of these channels as one: "
            f"groups {one} and {other} can only go together, as grouping='structure' has them"
        )
    return f"groups {one} and {other} can only go together"


def _reader_names(graph: Graph, tied: CoupledChannels) -> list[str]:
    return [
        layer_name(graph, node.module)
        for node, handler in tied.positions
        if graph.reads((node, handler))
    ]


def cause_of_leak(graph: Graph, found: Removable) -> str:
    """Find what keeps zero channels from being nothing; "" if it is not known.

    Looked for in this order: norms over the channels, norms without scale and shift, shifts that
    are in no group, activations that turn zero into something else.
    """
    passed = graph.modules(found.tied)
    for module in passed:
        name, kind = graph.names[module], type(module).__name__
        node = graph.engine.module2node.get(module)
        if node is not None and node.type in _CENTRED and not getattr(module, "affine", True):
            return f"{kind} '{name}' has no scale and shift: it turns 0 into a constant"
        if normalises_width(module):
            reason = f"{kind} '{name}' normalises over these channels"
            if found.layer.grouping == "stream" and mean_square_norm(module) is None:
                reason += ": it subtracts their mean, and what was zero is zero no more"
            return reason
    missing = list(_missing(graph, found))
    for name, tensor in sorted(missing, key=lambda place: place[1] != "bias"):
        return f"the {tensor} of '{name}' is in no group"
    for module in passed:
        if not list(module.parameters()):
            value = _of_zero(module)
            if value:
                name, kind = graph.names[module], type(module).__name__
                return f"'{name}' ({kind}) turns 0 into {value:.3g}"
    for side in found.tied.positions:
        module = side[0].module
        reads = side[0].type in PRODUCERS and not graph.outward(side)
        if reads and not str(type(module).forward.__module__).startswith("torch.nn."):
            name, kind = graph.names[module], type(module).__name__
            return f"'{name}' ({kind}) has a forward of its own, which may mix what it reads"
    operations = {
        type(node.grad_fn).__name__.removesuffix("Backward0")
        for node, _ in found.tied.positions
        if node.type == OPTYPE.ELEMENTWISE
        and node.grad_fn is not None
        and node.grad_fn not in graph.inside
    }
    norms = [name for name in sorted(operations) if "Norm" in name]
    if norms:
        return f"{norms[0]}, called by a forward, normalises over these channels"
    states = [module.owner for module in passed if isinstance(module, UnitLayer)]
    given = f", or a state that '{states[0]}' is given is not zero" if states else ""
    found_in = ", ".join(sorted(operations))
    return f"zero does not stay zero in one of {found_in}{given}" if operations else ""


def _never(graph: Graph, found: Removable) -> str:
    for side in found.tied.positions:
        if side[0] in graph.outputs and graph.outward(side):
            return "its channels are the network's outputs"
    for name, tensor in _missing(graph, found):
        module = next(module for module, own in graph.names.items() if own == name)
        node = graph.engine.module2node.get(module)
        # A depthwise filter makes zero of zero if it has no bias; a trial will tell.
        is_made = node is not None and node.type in (OPTYPE.CONV, OPTYPE.LINEAR)
        recurrent = isinstance(module, nn.RNNBase | nn.RNNCellBase)
        if (tensor == "weight" and is_made) or (tensor.startswith("weight") and recurrent):
            return f"tied to '{name}'; grouping='structure' takes both out"
    return ""


def _missing(graph: Graph, found: Removable) -> Iterator[tuple[str, str]]:
    """Yield module and tensor of what makes or scales the channels outside of their groups."""
    own = {id(tensor): name for name, tensor in graph.tensors.values()}
    members = {member.name: member for member in found.layer.members}
    for side in found.tied.positions:
        for place in slices(graph, found.tied, side):
            name = own.get(id(place.parameter), "")
            if not is_scale(name, place.parameter):
                continue
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


def zero_invariance(model: nn.Module, groups: Groups, example_input: Any) -> dict[str, str]:
    """Try, layer by layer, whether zero groups can be taken out without changing the outputs.

    On copies whose parameters and statistics are drawn at random (a fresh network's zero biases
    hide every leak), half of the groups of each layer are set to zero in one, and taken out of the
    other; on ``example_input``, what their layers and the networks return must agree to 1e-5 of the
    largest. Of heads, hidden units and channels that are read only what reads them is set to zero:
    a network in which that is not enough does not have them where they were looked for. Residual
    blocks were found by such a trial.

    Args:
        model: any module; it is copied, not touched.
        groups: its groups; only layers that claim to be removable are looked at.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    Returns:
        The cause for every layer that claims to be removable, "" where nothing stands against it.

    Raises:
        ValueError: the model cannot be copied, run or followed by autograd.

    >>> from lightning_wgsef.groupings.per_layer import filter_groups
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> zero_invariance(network, filter_groups(network).only(["0", "2"]), torch.ones(1, 4))
    {'0': "'1' (Sigmoid) turns 0 into 0.5", '2': ''}
    """
    causes = {layer.name: "" for layer in groups.layers if layer.removable}
    units, channels = _doubtful(groups)
    if units or channels:
        trial = _Trial(perturbed(model), example_input)
        causes.update(_failures(trial.units, units))
        causes.update(trial.idle([x for x in units if _reader(x) not in trial.called]))
    if channels:
        graph = build_graph(model, example_input)
        found = [
            as_read_channels(graph, layer)
            if layer.grouping == "channel"
            else as_channels(graph, layer)
            for layer in channels
        ]
        if _some_do_not_run(graph):
            found = [x if x.obstacle else replace(x, obstacle=trial.given(graph, x)) for x in found]
        causes.update({x.layer.name: x.obstacle for x in found})
        pending = {x.layer.name: x for x in found if not x.obstacle}

        def failure(layers: list[GroupedLayer]) -> str:
            return trial.channels(graph, [pending[layer.name] for layer in layers])

        causes.update(_failures(failure, [x.layer for x in pending.values()]))
    return causes


def with_invariance(model: nn.Module, groups: Groups, example_input: Any) -> Groups:
    """Mark the groups that `zero_invariance` objects to as not removable.

    Where it cannot tell, since the model cannot be followed, none are that it would have to try.

    >>> from lightning_wgsef.groupings.per_layer import filter_groups
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> groups = with_invariance(network, filter_groups(network), torch.ones(1, 4))
    >>> groups.layers[0].obstacle
    "LayerNorm '1' normalises over these channels"
    """
    causes = {}
    for layers in _doubtful(groups):
        try:
            causes.update(zero_invariance(model, Groups(layers), example_input))
        except ValueError as error:
            causes.update({layer.name: f"not known: {error}" for layer in layers})
    layers = []
    for layer in groups.layers:
        cause = causes.get(layer.name, "")
        layers.append(replace(layer, removable=False, obstacle=cause) if cause else layer)
    return Groups(layers, groups.left_out, float(groups.budgets[0]) if groups.is_global else None)


def _doubtful(groups: Groups) -> tuple[list[GroupedLayer], list[GroupedLayer]]:
    """List the layers that claim to be removable, and have to prove it: units, and channels."""
    claiming = [x for x in groups.layers if x.removable and x.grouping != "layer"]
    return [x for x in claiming if x.has_reader], [x for x in claiming if not x.has_reader]


def _failures(
    failure_of: Callable[[list[GroupedLayer]], str], layers: list[GroupedLayer]
) -> dict[str, str]:
    """Find the layers that fail, with the cause: by halves where all at once fail."""
    failure = failure_of(layers) if layers else ""
    if not failure:
        return {}
    if len(layers) == 1:
        return {layers[0].name: failure}
    middle = len(layers) // 2
    failures = _failures(failure_of, layers[:middle]) | _failures(failure_of, layers[middle:])
    return failures or {layer.name: failure for layer in layers}


class _Trial:
    """Network to try removals on.

    Args:
        network: a copy with random biases, scales and statistics.
        example_input: what it is run on.

    Attributes:
        called: names of the modules that read units and were called in a trial.
    """

    def __init__(self, network: nn.Module, example_input: Any) -> None:
        self.network, self.example_input = network, example_input
        self.generator = torch.Generator().manual_seed(0)
        self.called: set[str] = set()

    @torch.no_grad()
    def idle(self, layers: list[GroupedLayer]) -> dict[str, str]:
        """Find layers of which something does not run, with that for a cause."""
        if not layers:
            return {}
        observer = InterfaceObserver(self.network)
        with observer.watching():
            layer_outputs(self.network, self.example_input)
        names = [x.name for x in weighted_layers(self.network) if not x.problem]
        left = {name for _, own in idle_parts(names, observer.ran) for name in own}
        places = {x.name: {m.name.rpartition(".")[0] for m in x.members} for x in layers}
        return {name: "example_input does not run it" for name in places if places[name] & left}

    @cached_property
    def _inputs(self) -> TrialInputs:
        return TrialInputs(self.network, self.example_input)

    def given(self, graph: Graph, found: Removable) -> str:
        """Say which part of the network that does not run may be given these channels."""
        part = self._inputs.idle_user(graph, found.tied)
        return part and (
            f"'{part}', which ran on no variation of example_input, may read its channels; take it "
            "out of the network if nothing runs it"
        )

    @torch.no_grad()
    def units(self, layers: list[GroupedLayer]) -> str:
        """Say how the outputs without half of the heads or hidden units differ."""
        # One of every two: a forward that keeps units in pairs fails with single ones.
        halves = [torch.arange(0, x.count - 1, 2) for x in layers]
        halves = [x + torch.randint(2, x.shape, generator=self.generator) for x in halves]
        failure = self._without(layers, halves, widths=False)
        return failure and self._without(layers, halves, widths=True) and failure

    def _without(self, layers: list[GroupedLayer], dead: list[Tensor], *, widths: bool) -> str:
        changed = {member.name for layer in layers for member in layer.members}
        zeroed, units = _copy(self.network, changed), []
        for layer, half in zip(layers, dead, strict=True):
            _zero(zeroed, layer, half, readers=layer.grouping != "expert")
            mask = torch.zeros(layer.count, dtype=torch.bool)
            units.append((layer, mask.index_fill_(0, half, True)))
        modules = modules_by_name(zeroed)
        readers = {name: modules[name] for name in map(_reader, layers)}
        with observed(readers, after=lambda name, *_: self.called.add(name)):
            return self._difference(zeroed, unit_removal(self.network, units, widths=widths))

    @torch.no_grad()
    def channels(self, graph: Graph, found: list[Removable]) -> str:
        """Say how the outputs with half of the groups zero, and with their channels cut, differ.

        Once with the first half, and once with some of every other group: where a forward splits
        channels by their number, in blocks or in turn, or joins as many zeros as there are
        channels, parts and layers that lost equally many would fit by chance.
        """
        if any(x.layer.count < 2 for x in found):
            return "it has one group"
        for step in (1, 2):
            most = [x.layer.count // 2 for x in found]
            if step == 2:
                most = [int(torch.randint(1, n + 1, (), generator=self.generator)) for n in most]
            some = [
                torch.arange(x.layer.count)[::step][:n] for x, n in zip(found, most, strict=True)
            ]
            failure = self._cut(graph, found, some)
            if failure:
                return failure
        return ""

    def _cut(self, graph: Graph, found: list[Removable], dead: list[Tensor]) -> str:
        changed = {member.name for x in found for member in x.layer.members}
        zeroed = _copy(self.network, changed)
        removals = [(x.tied, x.bundles(own)) for x, own in zip(found, dead, strict=True)]
        possible = list(possible_removals(graph, removals))
        for x, (_, bundles) in zip(found, possible, strict=True):
            _zero(zeroed, x.layer, torch.tensor(sorted({x.groups[bundle] for bundle in bundles})))
        failure = self._difference(zeroed, channel_removal(graph, possible))
        if failure and graph.compared:  # modules may check widths
            plan = channel_removal(graph, possible, widths=True)
            failure = self._difference(zeroed, plan) and failure
        causes = [cause_of_leak(graph, x) for x in found] if failure == _CHANGED else []
        return next(filter(None, causes[:1]), failure)

    def _difference(self, zeroed: nn.Module, plan: RemovalPlan) -> str:
        small = _copy(zeroed, [*plan.kept, *plan.parts])
        try:
            plan.apply(small)
            differs = differing_layer(zeroed, small, self.example_input, plan)
        except Exception as error:  # a cut that does not fit may end in anything
            return f"the network does not run without them: {reason_of(error)}"
        return _CHANGED if differs else ""


def _some_do_not_run(graph: Graph) -> bool:
    layers = (x.module for x in weighted_layers(graph.model) if not x.problem)
    return any(module not in graph.engine.module2node for module in layers)


def _reader(layer: GroupedLayer) -> str:
    return layer.members[-1].name.rpartition(".")[0]


_CHANGED = "the outputs change when zero groups are taken out"


def _copy(network: nn.Module, own: Collection[str]) -> nn.Module:
    """Copy a network, with parameters of these names of its own; the others are shared."""
    modules = modules_by_name(network)
    places = [name.rpartition(".") for name in own]
    copied = {id(getattr(modules[path], tensor)) for path, _, tensor in places}
    for path, _, tensor in places:
        if is_parametrized(modules[path], tensor):  # to set it writes into what it is made of
            computed = modules[path].get_submodule(f"parametrizations.{tensor}")
            copied.update(id(original) for original in computed.parameters())
    shared = {id(x): x for x in network.parameters() if id(x) not in copied}
    return copy.deepcopy(network, shared)


def _zero(network: nn.Module, layer: GroupedLayer, dead: Tensor, *, readers: bool = False) -> None:
    """Set groups to zero, or with ``readers`` the last of their members, which reads them."""
    parameters = tensors_by_name(network)
    own = replace(layer, members=layer.members[-1:]) if readers else layer
    groups = Groups(with_values([own], parameters))
    factors = torch.ones(layer.count, device=groups.device)
    factors[dead] = 0
    groups.scale_(factors)

"""Removability of zero groups from a network, by trial, and the obstacles."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer, with_values
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.channels import PRODUCERS, Slices, normalises_width, slices
from lightning_wgsef.network.dependency_graph import CoupledChannels, Graph, build_graph
from lightning_wgsef.network.equivalence import differing_layer
from lightning_wgsef.network.example_input import perturbed
from lightning_wgsef.network.layers import canonical_name
from lightning_wgsef.network.operations import OPTYPE
from lightning_wgsef.network.surgery import channel_removal

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
    modules = {name: module for module, name in graph.names.items()}
    for member in layer.members:
        path, _, tensor = member.name.rpartition(".")
        node = graph.engine.module2node.get(modules.get(path))
        axis = int(getattr(modules.get(path), "transposed", False) and node.type == OPTYPE.CONV)
        if node and node.type in PRODUCERS and tensor == "weight" and member.axes == (axis,):
            break
    else:
        return Removable(
            layer, CoupledChannels(), {}, "its groups are not the channels that a layer makes"
        )
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
        if node.type == OPTYPE.ELEMENTWISE
        and node.grad_fn is not None
        and node.grad_fn not in graph.inside
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
    """Yield module and tensor of what makes or scales the channels outside of their groups."""
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


# Groupings whose groups hold what reads them, so that a zero group adds nothing.
BY_CONSTRUCTION = ("channel", "head", "hidden", "layer")


def zero_invariance(model: nn.Module, groups: Groups, example_input: Any) -> dict[str, str]:
    """Try, layer by layer, whether zero groups can be taken out without changing the outputs.

    On copies whose parameters and statistics are drawn at random (a fresh network's zero biases
    hide every leak), half of the groups of each layer are set to zero in one, and their channels
    are cut out of the other; on ``example_input``, what their layers and the networks return must
    agree to 1e-5 of the largest.
    Channels, heads, hidden units and residual blocks need no run: their groups hold what reads
    them.

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
    doubtful = _doubtful(groups)
    if not doubtful:
        return causes
    trial = _Trial(model, example_input)
    found = [as_channels(trial.graph, layer) for layer in doubtful]
    causes.update({x.layer.name: x.obstacle for x in found})
    causes.update(_failures(trial, [x for x in found if not x.obstacle]))
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
    try:
        causes = zero_invariance(model, groups, example_input)
    except ValueError as error:
        causes = {layer.name: f"not known: {error}" for layer in _doubtful(groups)}
    layers = []
    for layer in groups.layers:
        cause = causes.get(layer.name, "")
        layers.append(replace(layer, removable=False, obstacle=cause) if cause else layer)
    return Groups(layers, groups.left_out, float(groups.budgets[0]) if groups.is_global else None)


def _doubtful(groups: Groups) -> list[GroupedLayer]:
    """List the layers that claim to be removable, and have to prove it."""
    return [x for x in groups.layers if x.removable and x.grouping not in BY_CONSTRUCTION]


def _failures(trial: _Trial, found: list[Removable]) -> dict[str, str]:
    """Find the layers that fail, with the cause: by halves where all at once fail."""
    failure = trial.failure(found) if found else ""
    if not failure:
        return {}
    if len(found) == 1:
        return {found[0].layer.name: failure}
    middle = len(found) // 2
    failures = _failures(trial, found[:middle]) | _failures(trial, found[middle:])
    return failures or {x.layer.name: failure for x in found}


class _Trial:
    """Network to try removals on: a copy with random biases, scales and statistics."""

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.graph = build_graph(model, example_input)
        self.example_input = example_input
        self.network = perturbed(model)
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def failure(self, found: list[Removable]) -> str:
        """Say how the outputs with half of the groups zero, and with their channels cut, differ."""
        zeroed, slim = copy.deepcopy(self.network), copy.deepcopy(self.network)
        removals = []
        for x in found:
            if x.layer.count < 2:
                return "it has one group"
            dead = torch.randperm(x.layer.count, generator=self.generator)[: x.layer.count // 2]
            _zero(zeroed, x.layer, dead)
            removals.append((x.tied, x.bundles(dead)))
        plan = channel_removal(self.graph, removals)
        plan.apply(slim)
        try:
            if not differing_layer(zeroed, slim, self.example_input, plan):
                return ""
        except ValueError as error:
            return f"the network does not run without them: {error.__cause__ or error}"
        causes = [cause_of_leak(self.graph, x) for x in found]
        return causes[0] or "the outputs change when zero groups are taken out"


def _zero(network: nn.Module, layer: GroupedLayer, dead: Tensor) -> None:
    parameters = {canonical_name(name): p for name, p in network.named_parameters()}
    groups = Groups(with_values([layer], parameters))
    factors = torch.ones(layer.count, device=groups.device)
    factors[dead] = 0
    groups.scale_(factors)

"""What has to be cut, and where, when channels are taken out of a network."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from lightning_wgsef.groupings.channel_slices import parameter_axis
from lightning_wgsef.groupings.graph import Graph, Side, Tied
from lightning_wgsef.groupings.operations import OPTYPE
from lightning_wgsef.groupings.removal_plan import RemovalPlan

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
# Types of nodes that produce and read the same channels: the sizes of their modules.
_PASSED = {
    OPTYPE.BN: ("num_features",),
    OPTYPE.IN: ("num_features",),
    OPTYPE.GN: ("num_channels",),
    OPTYPE.LN: ("normalized_shape",),
    OPTYPE.PRELU: ("num_parameters",),
    OPTYPE.DEPTHWISE_CONV: ("in_channels", "out_channels", "groups"),
}


def channel_removal(graph: Graph, removals: Iterable[tuple[Tied, Collection[int]]]) -> RemovalPlan:
    """The plan that takes bundles of channels out of the model that the graph was built of.

    Args:
        graph: the graph of the model.
        removals: sets of tied channels, with the numbers of the bundles that go.

    >>> from lightning_wgsef.groupings.graph import build_graph
    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    >>> graph = build_graph(network, torch.ones(1, 3, 8, 8))
    >>> plan = channel_removal(graph, [(graph.tied(graph.model[0], range(8)), {0, 1, 2})])
    >>> plan.apply(network)
    >>> network[0], network[1].num_features, network[2].weight.shape
    (Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1)), 5, torch.Size([4, 5, 3, 3]))
    """
    gone: dict[Side, set[int]] = {}
    widths: dict[Side, int] = {}
    for tied, bundles in removals:
        for side, roots in tied.positions.items():
            removed = {place for place, root in roots.items() if tied.bundle[root] in bundles}
            gone.setdefault(side, set()).update(removed)
            widths[side] = len(roots)
    plan = RemovalPlan()
    for side, positions in gone.items():
        if positions:
            _cut(plan, graph, side, sorted(positions), widths[side])
    return plan


def _cut(plan: RemovalPlan, graph: Graph, side: Side, positions: list[int], width: int) -> None:
    node, _ = side
    module, less = node.module, len(positions)
    if node.type == OPTYPE.PARAMETER:
        _cut_parameter(plan, graph, module, positions, width)
        return
    if module not in graph.names:
        return
    name = graph.names[module]

    def remove(tensor: str, axis: int, places: list[int]) -> None:
        plan.remove(name, module, tensor, axis, places)

    if node.type in _PASSED:
        if node.type == OPTYPE.PRELU and module.num_parameters == 1:
            return
        for tensor in _NORM_TENSORS:
            remove(tensor, 0, positions)
        for size in _PASSED[node.type]:
            plan.resize(name, module, size, less)
    elif node.type == OPTYPE.EMBED:
        remove("weight", 1, positions)
        plan.resize(name, module, "embedding_dim", less)
    elif node.type in (OPTYPE.CONV, OPTYPE.LINEAR):
        kind = "channels" if node.type == OPTYPE.CONV else "features"
        across = int(getattr(module, "transposed", False))
        if graph.outward(side):
            remove("weight", across, positions)
            remove("bias", 0, positions)
            plan.resize(name, module, f"out_{kind}", less)
        else:
            # The parts of a grouped convolution are cut alike; its weight shows one of them.
            each = module.weight.shape[1 - across]
            remove("weight", 1 - across, [place for place in positions if place < each])
            plan.resize(name, module, f"in_{kind}", less)


def _cut_parameter(
    plan: RemovalPlan, graph: Graph, parameter: nn.Parameter, positions: list[int], width: int
) -> None:
    for module, name in graph.names.items():
        for tensor, own in module.named_parameters(recurse=False):
            if own is parameter:
                plan.remove(name, module, tensor, parameter_axis(own, width), positions)
                if getattr(module, "normalized_shape", None) is not None:  # RMSNorm
                    plan.resize(name, module, "normalized_shape", len(positions))

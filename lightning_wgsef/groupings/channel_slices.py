"""Where the weights are that produce or scale the channels of a set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.graph import Graph, Side, Tied
from lightning_wgsef.groupings.operations import OPTYPE

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


def slices(graph: Graph, tied: Tied, side: Side) -> Iterator[Slices]:
    """The weights that produce or scale the channels at one side of a node.

    >>> from lightning_wgsef.groupings.graph import build_graph
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


def produced(graph: Graph, tied: Tied) -> Iterator[tuple[nn.Module, dict[int, int]]]:
    """The layers that make channels, and the root's channel at each position of their outputs.

    >>> from lightning_wgsef.groupings.graph import build_graph
    >>> graph = build_graph(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(1, 4))
    >>> list(produced(graph, graph.tied(graph.model[0], [0, 1])))
    [(Linear(in_features=4, out_features=2, bias=True), {0: 0, 1: 1})]
    """
    for side, positions in tied.positions.items():
        if side[0].type in PRODUCERS and graph.outward(side):
            yield side[0].module, positions


def normalises_width(module: object) -> bool:
    """Does the module normalise over its channels, as LayerNorm does?

    >>> normalises_width(nn.LayerNorm(4)), normalises_width(nn.BatchNorm1d(4))
    (True, False)
    """
    kind = type(module).__name__
    return isinstance(module, nn.LayerNorm) or "RMSNorm" in kind or "LayerNorm" in kind

"""Sets of tied channels of a network, and where the weights are that make them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.dependency_graph import CoupledChannels, Graph, Side
from lightning_wgsef.network.layers import Homes, parameter_homes, weighted_layers
from lightning_wgsef.network.operations import OPTYPE
from lightning_wgsef.network.recurrent import UnitLayer

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


def slices(graph: Graph, tied: CoupledChannels, side: Side) -> Iterator[Slices]:
    """The weights that produce or scale the channels at one side of a node.

    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> graph = build_graph(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(1, 4))
    >>> tied = graph.tied(graph.model[0], [0, 1])
    >>> [(x.axis, x.groups) for side in tied.positions for x in slices(graph, tied, side)]
    [(0, {0: 0, 1: 1}), (0, {0: 0, 1: 1})]
    """
    node, _ = side
    groups = {place: tied.bundle[root] for place, root in tied.positions[side].items()}
    if not graph.outward(side) or any(node.module is given for given in graph.inputs):
        return
    if isinstance(node.module, UnitLayer):
        rows = {row: group for place, group in groups.items() for row in node.module.rows([place])}
        for name in node.module.tensors:
            yield Slices(node.module.parameter(name), 0, rows)
    elif node.type == OPTYPE.PARAMETER:
        _, own = graph.tensors.get(id(node.module), ("", node.module))
        yield Slices(own, parameter_axis(own, len(groups)), groups)
    elif node.type == OPTYPE.EMBED:
        yield Slices(node.module.weight, 1, groups)
    elif node.type == OPTYPE.PRELU and node.module.num_parameters == 1:
        return  # one slope for all channels
    elif node.type in PRODUCERS + _SCALES:
        # A depthwise transposed convolution has its one filter for each channel along axis 0.
        across = node.type == OPTYPE.CONV and node.module.transposed
        for name, axis in (("weight", int(across)), ("bias", 0)):
            parameter = getattr(node.module, name, None)
            if parameter is not None:
                yield Slices(parameter, axis, groups)


def is_scale(name: str, tensor: Tensor) -> bool:
    """Is a tensor with an entry for every channel trained, or scale or shift of a frozen norm?

    >>> norm = nn.BatchNorm1d(2)
    >>> is_scale("0.bias", norm.bias.detach()), is_scale("0.running_mean", norm.running_mean)
    (True, False)
    """
    return isinstance(tensor, nn.Parameter) or name.rpartition(".")[2] in ("weight", "bias")


def parameter_axis(parameter: Tensor, width: int) -> int:
    """The axis of a parameter used by itself that holds ``width`` channels, or -1.

    >>> parameter_axis(torch.ones(1, 8, 4, 4), 8), parameter_axis(torch.ones(1, 5, 8), 8)
    (1, 2)
    """
    axes = [axis for axis, size in enumerate(parameter.shape) if size == width]
    if not axes:
        return -1
    return axes[0] if parameter.dim() > 3 else axes[-1]


def produced(graph: Graph, tied: CoupledChannels) -> Iterator[tuple[nn.Module, dict[int, int]]]:
    """The layers that make channels, and the root's channel at each position of their outputs.

    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> graph = build_graph(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(1, 4))
    >>> list(produced(graph, graph.tied(graph.model[0], [0, 1])))
    [(Linear(in_features=4, out_features=2, bias=True), {0: 0, 1: 1})]
    """
    for side, positions in tied.positions.items():
        if side[0].type in PRODUCERS and graph.outward(side):
            yield side[0].module, positions


def layer_name(graph: Graph, module: nn.Module) -> str:
    """The name under which the channels that a module of the graph makes are reported."""
    return module.set_name if isinstance(module, UnitLayer) else graph.names[module]


def normalises_width(module: object) -> bool:
    """Does the module normalise over all its channels, as LayerNorm does?

    >>> normalises_width(nn.LayerNorm(4)), normalises_width(nn.BatchNorm1d(4))
    (True, False)
    >>> normalises_width(nn.GroupNorm(1, 4)), normalises_width(nn.GroupNorm(2, 4))
    (True, False)
    """
    kind = type(module).__name__
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    named = isinstance(module, nn.LayerNorm) or "RMSNorm" in kind or "LayerNorm" in kind
    return named or (isinstance(module, nn.Module) and mean_square_norm(module) is not None)


# Names under which norms keep what they add to the mean square.
_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "rms_norm_eps")


@torch.no_grad()
def mean_square_norm(module: nn.Module) -> tuple[str, float, float] | None:
    r"""Try whether a module computes :math:`(w + c) x / \sqrt{\overline{x^2} + \epsilon}`.

    Returns:
        The name of eps, its value, and c, which is 0 or 1; None for other modules.

    >>> mean_square_norm(nn.RMSNorm(4, eps=0.5)), mean_square_norm(nn.LayerNorm(4))
    (('eps', 0.5, 0.0), None)
    """
    weight = module._parameters.get("weight")
    name = next((name for name in _EPS if hasattr(module, name)), "")
    if weight is None or weight.dim() != 1 or not name or len(module._parameters) > 1:
        return None
    eps = getattr(module, name)
    eps = torch.finfo(weight.dtype).eps if eps is None else float(eps)
    given = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        found = module.forward(given)
    except Exception:  # the forward is anybody's
        return None
    for more in (0.0, 1.0):
        expected = (weight + more) * given / (given.square().mean(-1, keepdim=True) + eps).sqrt()
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return None
        if torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
            return name, eps, more
    return None


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
    tied: CoupledChannels
    obstacle: str
    is_output: bool


def channel_sets(graph: Graph) -> Iterator[ChannelSet]:
    """The sets of the layers of a graph, in order of definition.

    >>> import torch
    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> graph = build_graph(network, torch.ones(1, 3, 8, 8))
    >>> [(found.name, found.tied.count, found.is_output) for found in channel_sets(graph)]
    [('0', 8, False), ('2', 2, True)]
    """
    taken: dict[nn.Module, set[int]] = {}
    layers = list(weighted_layers(graph.model))
    problems = {layer.name: layer.problem for layer in layers if layer.problem}
    homes = parameter_homes(graph.model)
    for layer in layers:
        if layer.module not in graph.engine.module2node:
            continue
        channels = set(range(layer.outputs)) - taken.get(layer.module, set())
        if not channels:
            continue
        tied = graph.tied(layer.module, sorted(channels))
        obstacle = tied.obstacle or _obstacle(graph, tied, problems) or _shared(graph, tied, homes)
        # One channel that all others read is no channel of theirs.
        for module, positions in produced(graph, tied) if layer.outputs > 1 else ():
            if taken.setdefault(module, set()) & positions.keys():
                obstacle = obstacle or f"its channels overlap those of '{graph.names[module]}'"
            taken[module] |= positions.keys()
        if tied.count < 2:
            bundle = f"its {len(channels)} channels can only be removed together"
            obstacle = obstacle or (bundle if len(channels) > 1 else "it has one channel")
        is_output = any(side[0] in graph.outputs and graph.outward(side) for side in tied.positions)
        yield ChannelSet(layer_name(graph, layer.module), tied, obstacle, is_output)


def input_obstacles(graph: Graph) -> dict[str, str]:
    """Say why zero input channels cannot be taken out, layer by layer; "" where some can.

    >>> import torch
    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> graph = build_graph(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(1, 4))
    >>> input_obstacles(graph)
    {'0': 'no convolution or dense layer makes its input channels alone', '1': ''}
    """
    causes: dict[str, list[str]] = {}
    owners = {name: layer_name(graph, module) for module, name in graph.names.items()}
    for found in channel_sets(graph):
        readers = [
            graph.names[side[0].module] for side in found.tied.positions if graph.reads(side)
        ]
        for name in readers:
            others = [owners.get(other, other) for other in readers if other != name]
            also = [f"'{other}' reads these channels, too" for other in others]
            end = "they are channels of the network's outputs, too" if found.is_output else ""
            why = next(filter(None, (found.obstacle, end, *also[:1])), "")
            causes.setdefault(name, []).append(why and f"{why} (made by '{found.name}')")
    found_causes = {}
    for layer in weighted_layers(graph.model):
        reason = "no convolution or dense layer makes its input channels alone"
        if layer.module not in graph.engine.module2node:
            reason = "the example does not run it"
        own = causes.get(layer.name, [reason])
        found_causes[layer.name] = "" if "" in own else own[0]
    return found_causes


def _obstacle(graph: Graph, tied: CoupledChannels, problems: dict[str, str]) -> str:
    """Why the parameters of these channels cannot be cut."""
    own = {id(tensor): name for name, tensor in graph.tensors.values()}
    for side in tied.positions:
        node, _ = side
        name = graph.names.get(node.module, "")
        if graph.outward(side) and name in problems:
            return f"'{name}': {problems[name]}"
        for found in slices(graph, tied, side):
            if id(found.parameter) not in own:
                return f"'{name}': its weight is computed from other tensors"
            size = found.parameter.shape[found.axis]
            if found.axis < 0 or max(found.groups) >= size:
                tensor = own[id(found.parameter)]
                return f"'{tensor}' has no axis of {len(found.groups)} channels"
    return ""


def read_weight(module: Any) -> Tensor:
    """The weight by which a layer of the graph reads channels."""
    weight: Tensor = module.weight
    return module.parameter(module.matrix) if isinstance(module, UnitLayer) else weight


def _shared(graph: Graph, tied: CoupledChannels, homes: Homes) -> str:
    """Weights that several modules share must be cut in all of them alike."""
    uses: dict[int, dict[nn.Module, _Use]] = {}
    for side in tied.positions:
        for parameter, axis, groups in _touched(graph, tied, side):
            uses.setdefault(id(parameter), {})[side[0].module] = (axis, groups)
    for number, by_module in uses.items():
        sharing = list(dict.fromkeys(home.rpartition(".")[0] for home in homes.get(number, [])))
        first, *others = by_module.values()
        if len(sharing) > 1 and (len(sharing) != len(by_module) or any(x != first for x in others)):
            modules = " and ".join(f"'{user}'" for user in sharing)
            return f"{modules} share '{homes[number][0]}' (tied) for different channels"
    return ""


def _touched(
    graph: Graph, tied: CoupledChannels, side: Side
) -> Iterator[tuple[Tensor, int, dict[int, int]]]:
    """All weights that removal would cut: what reads the channels, too."""
    node, _ = side
    for found in slices(graph, tied, side):
        yield found.parameter, found.axis, found.groups
    if not graph.outward(side) and node.type in PRODUCERS and not graph.multiplier(node):
        groups = {place: tied.bundle[root] for place, root in tied.positions[side].items()}
        yield read_weight(node.module), int(not getattr(node.module, "transposed", False)), groups

"""Cutting a network: what stays of it as plain data (`RemovalPlan`), and the plans for channels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_wgsef.network.channels import mean_square_norm, parameter_axis
from lightning_wgsef.network.dependency_graph import CoupledChannels, Graph, Side
from lightning_wgsef.network.layers import WeightedLayer, modules_by_name
from lightning_wgsef.network.operations import OPTYPE, Held, normalised_together, shape_after
from lightning_wgsef.network.recurrent import UnitLayer
from lightning_wgsef.network.slim_modules import (
    KeptExperts,
    Silent,
    Skip,
    SlimAttention,
    SlimRecurrent,
)

Size = int | tuple[int, ...]


@dataclass(eq=False)
class RemovalPlan:
    """Slices that are taken out of tensors, and the sizes that modules say they have.

    Attributes:
        kept: indices that stay, by name of the parameter or buffer and by axis.
        sizes: new values of attributes, by name of the module.
        heads: heads that stay, by name of an `nn.MultiheadAttention`.
        biases: names of layers that get a bias which they did not have.
        skipped: names of residual blocks of which only the shortcut stays.
        parts: indices that stay for every index of the first axis, by name of the parameter and by
            axis: as many for each.
        experts: experts that stay, by name of the module that holds their weights.
        silenced: names of modules that return zeros from now on.
        norms: over how many channels norms take the mean square, before and after, by name.

    >>> plan = RemovalPlan()
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    >>> plan.remove("0", network[0], "weight", 0, [1])
    >>> plan.remove("0", network[0], "bias", 0, [1])
    >>> plan.remove("1", network[1], "weight", 1, [1])
    >>> plan.resize("0", network[0], "out_features", 1)
    >>> plan.apply(network)
    >>> network[0].weight.shape, network[1].weight.shape, network[0].out_features
    (torch.Size([2, 4]), torch.Size([1, 2]), 2)
    """

    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    sizes: dict[str, dict[str, Size]] = field(default_factory=dict)
    heads: dict[str, list[int]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    parts: dict[str, dict[int, list[list[int]]]] = field(default_factory=dict)
    experts: dict[str, list[int]] = field(default_factory=dict)
    silenced: list[str] = field(default_factory=list)
    norms: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Is there anything to take out?"""
        return bool(self.kept or self.skipped or self.biases or self.parts or self.silenced)

    def remove(
        self,
        name: str,
        module: nn.Module,
        tensor: str,
        axis: int,
        positions: Iterable[int],
        *,
        at: int | None = None,
    ) -> None:
        """Take slices out of a parameter or buffer of the module, which has this canonical name.

        What the module does not have, such as a bias, is passed over. With ``at``, only at this
        index of the first axis; as many have to go at every other.
        """
        value = getattr(module, tensor, None)
        if isinstance(value, Tensor):
            path, gone = f"{name}.{tensor}".lstrip("."), set(positions)
            if at is not None:
                every = self.parts.setdefault(path, {})
                if axis not in every:
                    every[axis] = [list(range(value.shape[axis])) for _ in range(len(value))]
                every[axis][at] = [place for place in every[axis][at] if place not in gone]
                return
            axes = self.kept.setdefault(path, {})
            stay = axes.get(axis, range(value.shape[axis]))
            axes[axis] = [position for position in stay if position not in gone]

    def resize(self, name: str, module: nn.Module, attribute: str, less: int) -> None:
        """Lower an attribute that holds a number, or a tuple of which the last is it."""
        sizes = self.sizes.setdefault(name, {})
        value = sizes.get(attribute, getattr(module, attribute))
        sizes[attribute] = (
            value - less if isinstance(value, int) else (*value[:-1], value[-1] - less)
        )

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Make ``model`` smaller, in place.

        The parameters stay the same objects, so that ties, hooks, flags and an optimizer's
        references survive; gradients are dropped.

        Args:
            model: the network that the plan is of.
            optimizer: its state is cut as the parameters are; see `check_optimizer`.
        """
        left = self.skipped + self.silenced
        gone = [p for name in left for p in modules_by_name(model)[name].parameters()]
        for name in self.skipped:
            _put(model, name, Skip())
        for name in self.silenced:
            _put(model, name, Silent())
        if optimizer is not None:
            _forget(optimizer, gone)
        modules, done = modules_by_name(model), set[int]()
        states = {name: self._kept_states(name, module) for name, module in modules.items()}
        for name, (before, after) in self.norms.items():
            _rescale(modules[name], before / after)
        for name, heads in self.heads.items():
            attention = modules[name]
            if not isinstance(attention, nn.MultiheadAttention):
                raise ValueError(f"'{name}' is a {type(attention).__name__}, which has no heads")
            SlimAttention.of(attention, heads)
        for name, numbers in self.experts.items():
            full = len(next(p for p in modules[name].parameters() if p.dim() == 3))
            modules[name].register_forward_pre_hook(KeptExperts(numbers, full), with_kwargs=True)
        for name in self.biases:
            _add_bias(modules[name], optimizer)
        for module in modules.values():
            if isinstance(module, nn.TransformerEncoder) and self.heads:
                module.use_nested_tensor = False  # nested tensors take all heads for granted
        for name in dict.fromkeys([*self.kept, *self.parts]):
            path, _, tensor = name.rpartition(".")
            value = getattr(modules[path], tensor)
            if id(value) in done:
                continue  # tied: cut under its other name
            if isinstance(value, nn.Parameter):
                state = {} if optimizer is None else optimizer.state.get(value, {})
                for key, entry in state.items():
                    if isinstance(entry, Tensor) and entry.shape == value.shape:
                        state[key] = self._cut(name, entry)
                value.grad = None
                value.data = self._cut(name, value.detach())
                done.add(id(value))
            else:
                setattr(modules[path], tensor, self._cut(name, value))
        for path, sizes in self.sizes.items():
            for attribute, size in sizes.items():
                several = isinstance(getattr(modules[path], attribute, None), list)
                value = list(size) if several and isinstance(size, tuple) else size
                setattr(modules[path], attribute, value)
        for name, kept in states.items():
            if kept:
                SlimRecurrent.of(modules[name], kept)

    def _kept_states(self, name: str, module: nn.Module) -> list[tuple[int, list[int]]]:
        """What stays of every state of a recurrent layer, and its width; [] where all does."""
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return []
        end = "_l0" if isinstance(module, nn.RNNBase) else ""
        units, outputs = (
            self.kept.get(f"{name}.weight_{kind}{end}".lstrip("."), {}).get(0)
            for kind in ("ih", "hr")
        )
        if units is None and outputs is None:
            return []
        width = module.hidden_size
        kept = [(width, list(range(width)) if units is None else [x for x in units if x < width])]
        if projected := getattr(module, "proj_size", 0):
            kept.insert(0, (projected, list(range(projected)) if outputs is None else outputs))
        elif isinstance(module, nn.LSTM | nn.LSTMCell):
            kept *= 2
        return kept

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        for axis, rows in self.parts.get(name, {}).items():
            pairs = zip(tensor, rows, strict=True)
            tensor = torch.stack([_selected(part, axis - 1, kept) for part, kept in pairs])
        for axis, kept in self.kept.get(name, {}).items():
            tensor = _selected(tensor, axis, kept)
        return tensor


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise `ValueError` unless the optimizer's state can be cut with the parameters.

    Every entry must be shaped like its parameter, or be a number.

    >>> model = nn.Linear(2, 1)
    >>> check_optimizer(model, torch.optim.Adam(model.parameters()))
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, entry in state.items():
            whole = not isinstance(entry, Tensor) or entry.shape == parameter.shape
            if not whole and entry.numel() > 1:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} keeps {key!r} of shape "
                    f"{tuple(entry.shape)} for '{names.get(id(parameter))}' of shape "
                    f"{tuple(parameter.shape)}; only what is shaped like the parameter can be cut: "
                    "leave optimizer out, and make a new one for the slim network"
                )


def _add_bias(layer: Any, optimizer: Optimizer | None) -> None:
    """Give a layer a bias of zeros; it is trained as the weight is."""
    layer.bias = nn.Parameter(
        layer.weight.new_zeros(WeightedLayer("", layer).outputs),
        requires_grad=layer.weight.requires_grad,
    )
    for group in optimizer.param_groups if optimizer is not None else ():
        if any(parameter is layer.weight for parameter in group["params"]):
            group["params"].append(layer.bias)


def _selected(tensor: Tensor, axis: int, kept: list[int]) -> Tensor:
    index = torch.tensor(kept, dtype=torch.long, device=tensor.device)
    return tensor.index_select(axis, index)


def _forget(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    gone = {id(parameter) for parameter in parameters}
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace every module of this canonical name, wrapped or not."""
    own = modules_by_name(model)[name]
    for parent in list(model.modules()):
        for child, value in list(parent.named_children()):
            if value is own:
                setattr(parent, child, module)


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


def channel_removal(
    graph: Graph,
    removals: Iterable[tuple[CoupledChannels, Collection[int]]],
    *,
    widths: bool = False,
) -> RemovalPlan:
    """The plan that takes bundles of channels out of the model that the graph was built of.

    Args:
        graph: the graph of the model.
        removals: sets of tied channels, with the numbers of the bundles that go.
        widths: lower the numbers, too, with which modules check how wide the channels are that they
            are given. They may mean something else, so that the plan has to be tried.

    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    >>> graph = build_graph(network, torch.ones(1, 3, 8, 8))
    >>> plan = channel_removal(graph, [(graph.tied(graph.model[0], range(8)), {0, 1, 2})])
    >>> plan.apply(network)
    >>> network[0], network[1].num_features, network[2].weight.shape
    (Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1)), 5, torch.Size([4, 5, 3, 3]))
    """
    gone: dict[Side, set[int]] = {}
    counts: dict[Side, int] = {}
    for tied, bundles in possible_removals(graph, list(removals)):
        for side, roots in tied.positions.items():
            removed = {place for place, root in roots.items() if tied.bundle[root] in bundles}
            gone.setdefault(side, set()).update(removed)
            counts[side] = len(roots)
    plan = RemovalPlan()
    for side, positions in gone.items():
        if positions:
            _cut_side(plan, graph, side, sorted(positions), counts[side])
    if widths:
        _lower_compared(plan, graph, {side: len(x) for side, x in gone.items() if x})
    return plan


def possible_removals(
    graph: Graph, removals: Sequence[tuple[CoupledChannels, Collection[int]]]
) -> Iterator[tuple[CoupledChannels, set[int]]]:
    """Leave one channel to every layer, and to an LSTM more hidden units than projections.

    A layer without channels does not run, and an LSTM with as many units as projections is taken
    for one without.

    >>> from lightning_wgsef.network.dependency_graph import build_graph
    >>> import torch
    >>> graph = build_graph(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(1, 4))
    >>> tied = graph.tied(graph.model[0], range(3))
    >>> [bundles for _, bundles in possible_removals(graph, [(tied, {0, 1, 2})])]
    [{1, 2}]
    """
    gone: dict[Side, set[int]] = {}
    cut = [(tied, _without_empty_layers(graph, tied, set(x), gone)) for tied, x in removals]
    projected = {
        x.owner: units for own in cut for x, units in _units_left(graph, *own, "proj_size")
    }
    for tied, bundles in cut:
        for layer, units in _units_left(graph, tied, bundles, "hidden_size"):
            if layer.projections:
                few = projected.get(layer.owner, layer.projections) + 1 - units
                bundles = set(sorted(bundles)[max(0, few) :])
        yield tied, bundles


def _without_empty_layers(
    graph: Graph, tied: CoupledChannels, bundles: set[int], gone: dict[Side, set[int]]
) -> set[int]:
    """Leave out of ``bundles`` what would be the last channel of a layer, and note what goes.

    A layer may work on a part of one set and a part of another, side by side.
    """

    def places(side: Side, bundles: set[int]) -> set[int]:
        return {x for x, root in tied.positions[side].items() if tied.bundle[root] in bundles}

    for side, roots in tied.positions.items():
        own = {tied.bundle[root] for root in roots.values()} & bundles
        if own and len(places(side, bundles) | gone.get(side, set())) == graph.width(side):
            bundles = bundles - {min(own)}
    for side in tied.positions:
        gone.setdefault(side, set()).update(places(side, bundles))
    return bundles


def _units_left(
    graph: Graph, tied: CoupledChannels, bundles: Collection[int], size: str
) -> Iterator[tuple[UnitLayer, int]]:
    """Yield the matrices of recurrent layers that make that many units, and what is left."""
    for side, roots in tied.positions.items():
        layer = side[0].module
        if isinstance(layer, UnitLayer) and layer.sizes[1] == size and graph.outward(side):
            yield layer, sum(tied.bundle[root] not in bundles for root in roots.values())


def _cut_side(
    plan: RemovalPlan, graph: Graph, side: Side, positions: list[int], width: int
) -> None:
    node, _ = side
    module, less = node.module, len(positions)
    _lower_parts(plan, graph, node, positions)
    if node.type == OPTYPE.PARAMETER:
        _cut_parameter(plan, graph, module, positions, width)
        return
    if module not in graph.names:
        return
    name = graph.names[module]

    def remove(tensor: str, axis: int, places: list[int]) -> None:
        plan.remove(name, module, tensor, axis, places)

    def lower(sizes: Iterable[str]) -> None:
        for size in sizes:
            if size in vars(module):  # what only looks like a layer may say no size
                plan.resize(name, module, size, less)

    if isinstance(module, UnitLayer):
        outward = graph.outward(side)
        rows = module.rows(positions) if outward else positions
        for tensor in module.tensors if outward else [module.matrix]:
            plan.remove(module.owner, module.layer[0], tensor, int(not outward), rows)
        if size := module.sizes[outward]:
            plan.resize(module.owner, module.layer[0], size, less)
    elif node.type in _PASSED:
        if node.type == OPTYPE.PRELU and module.num_parameters == 1:
            return
        for tensor in _NORM_TENSORS:
            remove(tensor, 0, positions)
        lower(_PASSED[node.type])
        if together := normalised_together(module):
            plan.resize(name, module, "num_groups", less // together)
    elif node.type == OPTYPE.EMBED:
        remove("weight", 1, positions)
        plan.resize(name, module, "embedding_dim", less)
    elif node.type in (OPTYPE.CONV, OPTYPE.LINEAR):
        across = int(getattr(module, "transposed", False))
        if graph.multiplier(node) and not graph.outward(side):
            lower(("in_channels", "groups"))
        elif graph.outward(side):
            remove("weight", across, positions)
            remove("bias", 0, positions)
            lower(("out_channels", "out_features"))
        else:
            # The parts of a grouped convolution are cut alike; its weight shows one of them.
            each = module.weight.shape[1 - across]
            remove("weight", 1 - across, [place for place in positions if place < each])
            lower(("in_channels", "in_features"))


def _lower_compared(plan: RemovalPlan, graph: Graph, less: dict[Side, int]) -> None:
    """Lower what modules compare with the width of channels: of what they are given, or have."""
    lowered = {(name, attribute) for name, sizes in plan.sizes.items() for attribute in sizes}
    for held in graph.compared:
        name = graph.names[held.module]
        if (name, held.attribute) in lowered:
            continue
        for known in (graph.given.get(name, set()), graph.results.get(name, set())):
            found = {
                number
                for side, number in less.items()
                if {side[0].grad_fn, side[0].module} & known
                and graph.outward(side)
                and int(held) in (shape_after(side[0].grad_fn) or ())
            }
            if found:
                break
        if len(found) == 1:
            _set_held(plan, graph, held, int(held) - found.pop())


def _lower_parts(plan: RemovalPlan, graph: Graph, node: Any, positions: list[int]) -> None:
    """Lower the numbers, held by modules, of the channels in the parts that a split makes."""
    start = 0
    for size, held in graph.parts.get(node.grad_fn, ()):
        if held is not None:
            left = size - sum(start <= place < start + size for place in positions)
            _set_held(plan, graph, held, left)
        start += size


def _set_held(plan: RemovalPlan, graph: Graph, held: Held, left: int) -> None:
    """Set a number that a module holds."""
    sizes = plan.sizes.setdefault(graph.names[held.module], {})
    before = sizes.get(held.attribute, getattr(held.module, held.attribute))
    if held.index is None:
        sizes[held.attribute] = left * held.times
    else:
        numbers = list(before)
        numbers[held.index] = left * held.times
        sizes[held.attribute] = tuple(numbers)


@torch.no_grad()
def _rescale(module: nn.Module, share: float) -> None:
    r"""Let a norm over fewer channels, the others of which were zero, make the same of them.

    With n channels before and k after, :math:`s = n / k`, the mean square is s times as large:
    :math:`w x / \sqrt{\overline{x^2} + \epsilon}` stays with :math:`s \epsilon` and
    :math:`\sqrt{s} w`.
    """
    found = mean_square_norm(module)
    if found is None:
        raise ValueError(f"a {type(module).__name__} does not normalise by the mean square")
    name, eps, more = found
    for weight in module.parameters():
        weight.add_(more).mul_(share**0.5).sub_(more)
    setattr(module, name, eps * share)


def _cut_parameter(
    plan: RemovalPlan, graph: Graph, parameter: nn.Parameter, positions: list[int], width: int
) -> None:
    found = graph.tensors.get(id(parameter), ("", parameter))[1]
    for module, name in graph.names.items():
        tensors = (module.named_parameters, module.named_buffers)
        for tensor, own in (x for named in tensors for x in named(recurse=False)):
            if own is found:
                plan.remove(name, module, tensor, parameter_axis(own, width), positions)
                if mean_square_norm(module) is not None:
                    plan.norms[name] = width, width - len(positions)
                if getattr(module, "normalized_shape", None) is not None:  # RMSNorm
                    plan.resize(name, module, "normalized_shape", len(positions))
                elif getattr(module, "num_features", None) == width:  # several tensors, one size
                    plan.sizes.setdefault(name, {})["num_features"] = width - len(positions)

"""Dependency graph of a network: which channels are tied, by torch-pruning, on a copy.

torch-pruning traces a forward pass by autograd, switches the model to evaluation, does not see
frozen parameters or the network's inputs, and takes every operation it does not know for one that
works element by element. Hence the copy, and the `obstacle` of a set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch_pruning  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_wgsef.network.example_input import (
    mapped,
    model_copy,
    observed,
    run_example,
    tensors,
)
from lightning_wgsef.network.index_mapping import (
    Index,
    carried_operands,
    divides_channels,
    infer_sizes,
    map_parts,
    padded_part,
    part_size,
)
from lightning_wgsef.network.layers import canonical_name
from lightning_wgsef.network.look_alikes import follow_look_alikes
from lightning_wgsef.network.operations import (
    HEAD,
    MODULE_OPERATIONS,
    OPTYPE,
    Held,
    Watch,
    flatten_obstacle,
    mixes_channels,
    normalised_together,
    operation_obstacle,
    shape_after,
)
from lightning_wgsef.network.recurrent import PaddingAsAnySum, follow_units

Node = Any

# A node of torch-pruning's graph and the function that would prune its inputs or its outputs.
Side = tuple[Node, Callable[..., Any]]


@dataclass(eq=False)
class CoupledChannels:
    """Channels of one layer and everything that is tied to them.

    Attributes:
        positions: at every side of a node, the root's channel that each position is tied to.
        bundle: the channels of the root that live and die together have equal numbers, from 0.
        obstacle: why the positions cannot be relied on; "" if they can.
    """

    positions: dict[Side, dict[int, int]] = field(default_factory=dict)
    bundle: dict[int, int] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def count(self) -> int:
        """Number of bundles."""
        return len(set(self.bundle.values()))


@dataclass(eq=False)
class Graph:
    """The dependency graph of a copy of a model.

    Attributes:
        model: the copy.
        engine: torch-pruning's graph of it.
        names: canonical name of every module of the copy.
        inputs: the network's inputs, as parameters, so that the graph has them.
        outputs: the nodes that return the network's outputs.
        inside: operations inside of the modules that torch-pruning knows.
        activations: the modules without parameters, by the operation they end in.
        parts: sizes of the parts that splits and slices make of channels, with the numbers that
            modules hold of them; None for no such number.
        compared: numbers that modules hold and compare with sizes.
        given: operations and modules whose results a module is given, by name.
        results: the same of all that its forward has at hand.
        tensors: canonical name and tensor of the copy's parameters and of the buffers that the
            graph has, by the id of what stands for it there: the parameter, or a stand-in.
    """

    model: nn.Module
    engine: Any
    names: dict[nn.Module, str]
    inputs: list[nn.Parameter]
    outputs: set[Node]
    inside: set[Any]
    activations: dict[Any, nn.Module]
    parts: dict[Any, list[tuple[int, Held | None]]]
    compared: list[Held]
    given: dict[str, set[Any]]
    results: dict[str, set[Any]]
    tensors: dict[int, tuple[str, Tensor]]

    def outward(self, side: Side) -> bool:
        """Are these the outputs of the node (which for a norm are its inputs, too)?"""
        node, handler = side
        return bool(handler == self.engine.get_pruner_of_module(node.module).prune_out_channels)

    def reads(self, side: Side) -> bool:
        """Are these the inputs of a layer that mixes them?"""
        matrix = side[0].type in (OPTYPE.CONV, OPTYPE.LINEAR)
        return matrix and not self.outward(side) and not self.multiplier(side[0])

    def multiplier(self, node: Node) -> int:
        """Return how many channels a depthwise convolution makes of each, if several; 0 for others.

        They go with what they are made of, as in EEGNet: a depth multiplier.
        """
        module = node.module
        if node.type != OPTYPE.CONV or module.groups == 1 or module.groups != module.in_channels:
            return 0
        return 0 if module.transposed else int(module.out_channels) // int(module.groups)

    def modules(self, tied: CoupledChannels) -> list[nn.Module]:
        """The modules that the channels pass, with those of their parameters and activations."""
        passed = []
        for node, _ in tied.positions:
            if isinstance(node.module, nn.Parameter):
                own = self.tensors.get(id(node.module), ("", node.module))[1]
                passed += [
                    m
                    for m in self.names
                    if any(own is x for x in (*m._parameters.values(), *m._buffers.values()))
                ]
            else:
                passed.append(self.activations.get(node.grad_fn, node.module))
        return [module for module in dict.fromkeys(passed) if module in self.names]

    def has_at_hand(self, name: str, tied: CoupledChannels) -> bool:
        """Does a module that is called, of this name, hold a tensor with these channels in it?

        Its own parameters, its arguments, and what the modules that it calls take or return.
        """
        results = self.results.get(name, set())
        made = [side[0] for side in tied.positions if self.outward(side)]
        return any(node.grad_fn in results or node.module in results for node in made) or any(
            self.names[module] == name for module in self.modules(tied)
        )

    def tied(self, module: nn.Module, channels: Iterable[int]) -> CoupledChannels:
        """Everything that output channels of a module of the copy are tied to."""
        channels = list(channels)
        found = self._tied(module, channels, whole=True)
        if found.obstacle and any(self.multiplier(node) for node, _ in found.positions):
            # What is made of each channel can lose the same places everywhere, too.
            aligned = self._tied(module, channels, whole=False)
            if not aligned.obstacle and aligned.count > 1:
                return aligned
        return found

    def _tied(self, module: nn.Module, channels: list[int], *, whole: bool) -> CoupledChannels:
        found, joined = CoupledChannels(), _Joined(channels)
        try:
            self._follow(module, found, joined, whole)
        except Exception as error:  # the library's mappings fail on operations that it misreads
            names = [
                self.names[node.module] for node, _ in found.positions if node.module in self.names
            ]
            found.obstacle = (
                f"torch-pruning loses track of its channels behind '{names[-1] if names else ''}' "
                f"({type(error).__name__}: {error})"
            )
        found.positions = {side: known for side, known in found.positions.items() if known}
        found.bundle = joined.numbers()
        if not self._has_attention:
            for words in (f": {HEAD}", " with heads"):
                found.obstacle = found.obstacle.replace(words, "")
        return found

    def _follow(
        self, module: nn.Module, found: CoupledChannels, joined: _Joined, whole: bool
    ) -> None:
        """Walk from the outputs of a module to everything that is tied to them."""
        start = self.engine.get_pruner_of_module(module).prune_out_channels
        indices = [Index(idx=channel, root_idx=channel) for channel in joined.parent]
        waiting = [((self.engine.module2node[module], start), indices)]
        circular = False  # a wrong mapping in a circle counts up for ever
        summed: set[Node] = set()  # products that are reached from what they sum along
        while waiting:
            side, indices = waiting.pop()
            node, handler = side
            if self.width(side) == 1 and any(index.idx for index in indices):
                continue  # broadcast: every channel reads the same one
            known, fresh = found.positions.setdefault(side, {}), []
            for index in self._aligned(side, indices, whole):
                if index.idx >= self.largest_axis:
                    circular = True
                elif index.root_idx is None:
                    found.obstacle = found.obstacle or f"its channels are repeated heads: {HEAD}"
                elif index.idx not in known:
                    known[index.idx] = index.root_idx
                    fresh.append(index)
                elif known[index.idx] != index.root_idx:
                    joined.join(known[index.idx], index.root_idx)
            if fresh and whole and (times := self.multiplier(node)):
                waiting.append(self._other_side(side, fresh, times))
            if self._mixes(node) and (node in summed or node not in self._carried):
                continue  # what lies behind is not tied, and recurrence would never end
            for dependency in node.dependencies if fresh else ():
                target = dependency.target
                if target in node.inputs and self._carried.get(node, target) is not target:
                    continue
                if dependency.trigger == handler:
                    if node in target.inputs and self._carried.get(target, node) is not node:
                        summed.add(target)
                    mapped = fresh
                    for mapping in dependency.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    if mapped:
                        waiting.append(((target, dependency.handler), mapped))
        for (node, _), known in found.positions.items():
            # A chunk is as wide as the others: parts lose the same places. A GroupNorm loses whole
            # groups, which it normalises each by itself.
            size, together = part_size(node, self._free), normalised_together(node.module)
            for place, root in known.items():
                if size:
                    joined.join(known.get(place % size, root), root)
                if together:
                    joined.join(known.get(place // together * together, root), root)
        for side, known in found.positions.items():
            if not known:
                continue
            carried = side[0] in self._carried and side[0] not in summed
            found.obstacle = found.obstacle or ("" if carried else self._obstacle(side, known))
        if circular:
            found.obstacle = found.obstacle or "torch-pruning loses track of its channels"

    @cached_property
    def _has_attention(self) -> bool:
        return any("attention" in type(module).__name__.lower() for module in self.names)

    @cached_property
    def largest_axis(self) -> int:
        """Size of the longest axis of any tensor, which no channel's number reaches."""
        shapes: list[tuple[int, ...]] = [
            tuple(parameter.shape) for parameter in self.model.parameters()
        ]
        shapes += [shape_after(node.grad_fn) or () for node in self.engine.module2node.values()]
        return max(size for shape in shapes for size in shape)

    @cached_property
    def _free(self) -> set[Any]:
        """Splits and slices of which a module holds every size as a number of its own."""
        places = {
            operation: {(x.module, x.attribute, x.index) for _, x in parts if x is not None}
            for operation, parts in self.parts.items()
        }
        return {x for x, parts in self.parts.items() if len(places[x]) == len(parts)}

    @cached_property
    def _carried(self) -> dict[Node, Node]:
        """The operand whose channels a product of matrices outside of modules hands on."""
        return carried_operands(x for x in self.engine.module2node.values() if self._mixes(x))

    def _mixes(self, node: Node) -> bool:
        outside = node.module not in self.names and node.grad_fn not in self.inside
        return outside and mixes_channels(node)

    def width(self, side: Side) -> int | None:
        """Return the number of channels at a side of a node; None where it is not known."""
        node, _ = side
        if node.type == OPTYPE.PARAMETER or isinstance(node.module, nn.PReLU):
            return None
        outward = self.outward(side)
        width = self.engine.get_out_channels if outward else self.engine.get_in_channels
        return None if node.type == OPTYPE.OUTPUT else width(node)

    def _aligned(self, side: Side, indices: list[Any], whole: bool) -> list[Any]:
        """With the same place in all parts of a grouped convolution: all parts are of one width."""
        node, _ = side
        parts = getattr(node.module, "groups", 1)
        if node.type != OPTYPE.CONV or parts == 1:
            return indices
        each = (self.width(side) or 0) // parts
        if whole and self.multiplier(node):
            return [
                Index(idx=index.idx // each * each + place, root_idx=index.root_idx)
                for index in indices
                for place in range(each)
            ]
        return [
            Index(idx=index.idx % each + part * each, root_idx=index.root_idx)
            for index in indices
            for part in range(parts)
        ]

    def _other_side(self, side: Side, indices: list[Any], times: int) -> tuple[Side, list[Any]]:
        """Map what a convolution with a multiplier reads to what it makes of it, or back."""
        node, _ = side
        pruner = self.engine.get_pruner_of_module(node.module)
        if self.outward(side):
            read = [Index(x.idx // times, x.root_idx) for x in indices]
            return (node, pruner.prune_in_channels), read
        made = [Index(x.idx * times, x.root_idx) for x in indices]  # and the others of its group
        return (node, pruner.prune_out_channels), made

    def _obstacle(self, side: Side, positions: dict[int, int]) -> str:
        node, _ = side
        module, width = node.module, self.width(side)
        name = self.names.get(module, "")
        if any(module is given for given in self.inputs):
            return "tied to the network's input"
        if isinstance(module, MODULE_OPERATIONS):
            advice = f": {HEAD}" if isinstance(module, nn.MultiheadAttention) else ""
            return f"tied to '{name}' ({type(module).__name__}){advice}"
        if node.type in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV) and module.groups > 1:
            depthwise = module.in_channels == module.out_channels == module.groups
            if not depthwise and (module.transposed or node.type == OPTYPE.DEPTHWISE_CONV):
                return f"tied to '{name}', a grouped convolution whose parts cannot be aligned"
        together = normalised_together(module)
        groups = {place // together for place in positions} if together else set()
        if any(n * together + x not in positions for n in groups for x in range(together)):
            return f"tied to '{name}', a GroupNorm that mixes them with channels of other layers"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return f"tied to '{name}', a LayerNorm over more than the channels"
        if width is not None and max(positions) >= width:
            place = name or node.type.name.lower()
            return f"a split mixes its channels with heads, or does not fit '{place}': {HEAD}"
        if name or node.grad_fn in self.inside:
            return ""
        if (part := padded_part(node)) is not None:
            inside = all(place in part for place in positions)
            return "" if inside else "zeros are padded beside other channels where they are"
        return flatten_obstacle(node, positions) or operation_obstacle(node, max(positions) + 1)


class _Joined:
    """Channels that live and die together."""

    def __init__(self, channels: Iterable[int]) -> None:
        self.parent = {channel: channel for channel in channels}

    def first(self, channel: int) -> int:
        while self.parent[channel] != channel:
            channel = self.parent[channel]
        return channel

    def join(self, one: int, two: int) -> None:
        one, two = sorted((self.first(one), self.first(two)))
        self.parent[two] = one

    def numbers(self) -> dict[int, int]:
        numbers: dict[int, int] = {}
        return {c: numbers.setdefault(self.first(c), len(numbers)) for c in self.parent}


def build_graph(model: nn.Module, example_input: Any) -> Graph:
    """The dependency graph of a copy of ``model``; the model itself is not touched.

    Args:
        model: any module.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    Raises:
        ValueError: the model cannot be copied or run, or autograd cannot follow it.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> graph = build_graph(network, torch.ones(1, 3, 8, 8))
    >>> tied = graph.tied(graph.model[0], range(8))
    >>> tied.count, [node.type.name for node, _ in tied.positions]
    (8, ['CONV', 'ELEMENTWISE', 'CONV'])
    """
    try:
        return _traced(model, example_input, buffers=True)
    except ValueError:  # where buffers cannot be followed, as one that is resized
        return _traced(model, example_input, buffers=False)


class _Engine(torch_pruning.DependencyGraph):  # type: ignore[misc]  # untyped
    """Dependency graph that takes from a watch which operation is a module's own."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._owners = watch.owners

    def _trace_computational_graph(
        self, nodes: Any, output: Any, owners: dict[Any, Any], *rest: Any, **more: Any
    ) -> Any:
        for operation, module in self._owners.items():
            if module is None:
                owners.pop(operation, None)
            else:
                owners[operation] = module
        self._owners = {}  # operations without one get one of torch-pruning's
        return super()._trace_computational_graph(nodes, output, owners, *rest, **more)


@contextmanager
def _followed_buffers(
    model: nn.Module, *, follow: bool
) -> Iterator[dict[nn.Parameter, tuple[str, Tensor]]]:
    """Let autograd follow the buffers of modules that torch-pruning does not know.

    A frozen norm may hold scale and shift of every channel as buffers. Yields their names and the
    buffers, by the leaf that stands for each while the block runs.
    """
    leaves: dict[nn.Parameter, tuple[str, Tensor]] = {}
    replaced = []
    for path, module in model.named_modules() if follow else ():
        if torch_pruning.ops.module2type(module) != OPTYPE.ELEMENTWISE:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.numel() > 1:
                # torch-pruning takes a parameter of three axes for a position.
                leaf = nn.Parameter(buffer.clone()[None] if buffer.dim() == 3 else buffer.clone())
                leaves[leaf] = (canonical_name(f"{path}.{name}"), buffer)
                replaced.append((module, name, buffer))
                # A tensor that is not a leaf may be written into.
                module._buffers[name] = leaf[0] if buffer.dim() == 3 else leaf.clone()
    try:
        yield leaves
    finally:
        for module, name, buffer in replaced:
            module._buffers[name] = buffer


def _traced(model: nn.Module, example_input: Any, *, buffers: bool) -> Graph:
    clone = model_copy(model).eval()
    for module in clone.modules():
        compiled = isinstance(module, torch.jit.ScriptModule)  # whose attributes are constants
        if getattr(module, "inplace", False) is True and not compiled:
            # It would hide its input from the trace.
            module.inplace = False  # type: ignore[assignment]
    follow_units(clone)
    follow_look_alikes(clone)
    for parameter in clone.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    names = {module: canonical_name(name) for name, module in clone.named_modules()}
    one_dimensional = any(isinstance(module, nn.Conv1d) for module in names)
    inputs: list[tuple[nn.Parameter, int]] = []
    device = next((parameter.device for parameter in clone.parameters()), None)

    def tracked(value: Any) -> Any:
        """The value as a parameter, so that the graph has it."""
        value = value.to(device) if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return value
        flat = value.dim() == 3  # torch-pruning takes a parameter of three axes for a position
        parameter = nn.Parameter(value.detach().clone()[None] if flat else value.clone())
        inputs.append((parameter, (2 if one_dimensional else 3) if flat else 1))
        return parameter[0] if flat else parameter

    arguments = mapped(tracked, example_input)
    watch = Watch(clone)
    engine = _Engine(watch)
    outputs: list[Tensor] = []

    def run(network: nn.Module, _: Any) -> list[Tensor]:
        with watch:
            found = tensors(run_example(network, arguments))
        outputs.extend(x for x in found if x.grad_fn is not None)
        if not outputs:
            raise ValueError(
                f"example_input: no output of {type(model).__name__} has a gradient, so its graph "
                "cannot be followed; call this outside of torch.no_grad and do not detach outputs"
            )
        return outputs

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng([]):
        try:
            named = {name: module for module, name in names.items()}
            with (
                warnings.catch_warnings(),
                observed(named, watch.enter, watch.leave),
                _followed_buffers(clone, follow=buffers) as leaves,
                PaddingAsAnySum(),
            ):
                warnings.filterwarnings("ignore", module="torch_pruning")
                try:
                    engine.build_dependency(
                        clone,
                        list(arguments),
                        run,
                        unwrapped_parameters=[*inputs, *map(_with_axis, leaves)],
                        ignored_layers=[x for x in names if isinstance(x, nn.RNNBase)],
                        verbose=False,
                    )
                except (IndexError, TypeError, ZeroDivisionError):  # a size that it cannot infer
                    if not outputs or not hasattr(engine, "module2node"):
                        raise
                    infer_sizes(engine)
                map_parts(engine, one_dimensional)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"torch-pruning cannot follow {type(model).__name__}: {type(error).__name__}: "
                f"{error}; 'filter', 'channel', 'head' and 'hidden' need no graph"
            ) from error
    ends = {output.grad_fn for output in outputs}
    returned = {node for node in engine.module2node.values() if node.grad_fn in ends}
    given = [parameter for parameter, _ in inputs]
    own: dict[int, tuple[str, Tensor]] = {
        id(p): (canonical_name(name), p) for name, p in clone.named_parameters()
    }
    own.update({id(leaf): found for leaf, found in leaves.items()})
    divided = [x.grad_fn for x in engine.module2node.values() if divides_channels(x)]
    parts = {operation: watch.parts[operation] for operation in divided if operation in watch.parts}
    # By their places: as numbers they may be equal.
    compared = {(x.module, x.attribute, x.index): x for x in watch.compared}
    at_hand = (list(compared.values()), watch.given, watch.results)
    noted = (watch.inside, watch.activations, parts, *at_hand)
    return Graph(clone, engine, names, given, returned, *noted, own)


def _with_axis(parameter: nn.Parameter) -> tuple[nn.Parameter, int]:
    """Return a parameter and the last of its axes that is longer than 1."""
    return parameter, max(axis for axis, size in enumerate(parameter.shape) if size > 1)

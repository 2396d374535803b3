"""Positions of channels through splits, slices and concatenations, as autograd recorded them.

torch-pruning takes the consumers of a split for its parts, in order: wrong where a part is used
twice or not at all. It also leaves out what a concatenation joins besides channels of layers, and
fails where it cannot infer a size.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple
from unittest.mock import patch

from torch_pruning import dependency  # type: ignore[import-untyped]

from lightning_wgsef.network.operations import OPTYPE, adds_axes, shape_after

Node = Any

_PADDING = "ConstantPadNdBackward0"


class Index(NamedTuple):
    """A position at one side, and the channel of the root that it is tied to.

    torch-pruning's own index is private; its mappings read these two names and nothing else.
    """

    idx: int
    root_idx: int | None


class _Flat(NamedTuple):
    """Mapping between channels and their places in a matrix, in runs or each step by itself."""

    width: int
    times: int
    runs: bool
    to_matrix: bool

    def __call__(self, indices: list[Any]) -> list[Index]:
        if not self.to_matrix:
            places = [x.idx // self.times if self.runs else x.idx % self.width for x in indices]
            found = [Index(place, x.root_idx) for place, x in zip(places, indices, strict=True)]
            return list(dict.fromkeys(found))
        step, stride = (1, self.times) if self.runs else (self.width, 1)
        return [
            Index(x.idx * stride + step * number, x.root_idx)
            for x in indices
            for number in range(self.times)
        ]


class _Part(NamedTuple):
    """Mapping between the positions of a whole and those of one part of it."""

    first: int
    size: int
    to_whole: bool

    def __call__(self, indices: list[Any]) -> list[Index]:
        if self.to_whole:
            return [Index(x.idx + self.first, x.root_idx) for x in indices]
        inside = range(self.first, self.first + self.size)
        return [Index(x.idx - self.first, x.root_idx) for x in indices if x.idx in inside]


def map_parts(engine: Any, one_dimensional: bool) -> None:
    """Correct the mappings of splits, slices and concatenations along the channels.

    Args:
        engine: a dependency graph of torch-pruning.
        one_dimensional: tensors of three axes have their channels along the second.
    """
    for node in engine.module2node.values():
        if node.type == OPTYPE.UNBIND:  # torch-pruning takes the parts for channels of one tensor
            _unmap(node)
    for node, edges, axis, rank in _joints(engine):
        along = _channel_axis(node, 1 if one_dimensional else 2) if rank == 3 else 1
        channels = axis == along and rank > 0
        split = node.type == OPTYPE.SPLIT
        for neighbour, occurrence, first, size in edges:
            for one, other, to_whole in ((node, neighbour, False), (neighbour, node, True)):
                towards = [dep for dep in one.dependencies if dep.target is other]
                if occurrence < len(towards):
                    slot = 0 if split else 1
                    mapping = _Part(first, size, to_whole) if channels else None
                    towards[occurrence].index_mapping[slot] = mapping
    for node in engine.module2node.values():
        before = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
        if node.type == OPTYPE.SLICE and before:
            _map_slice(node, before, 1 if one_dimensional else 2)
        if node.type == OPTYPE.RESHAPE and adds_axes(before, shape_after(node.grad_fn) or ()):
            for dep in (x for one in (node, *node.inputs, *node.outputs) for x in one.dependencies):
                if node in (dep.source, dep.target):
                    dep.index_mapping[0] = None
        _map_flattened(node, before, 1 if one_dimensional else 2)
        if type(node.grad_fn).__name__ == _PADDING:
            _map_padded(node, 1 if one_dimensional else 2)
        for dep in node.dependencies if node.type == OPTYPE.CONCAT else ():
            if dep.target.type == OPTYPE.SPLIT:  # of the whole first, then to the other's whole
                dep.index_mapping.reverse()


def _map_slice(node: Node, before: tuple[int, ...], otherwise: int) -> None:
    """Map the channels of a whole to those of a slice, unless it is along another axis."""
    operation = node.grad_fn
    axis = _positive(operation._saved_dim, len(before))
    along = axis == _channel_axis(node, otherwise if len(before) == 3 else 1)
    start, end = _bounds(operation, before[axis])
    for source in node.inputs:
        for one, other, to_whole in ((node, source, True), (source, node, False)):
            for dep in one.dependencies:
                if dep.target is not other or (along and operation._saved_step != 1):
                    continue
                own = _Part(start, end - start, to_whole) if along else None
                of_source = dep.index_mapping[0] if source.type == OPTYPE.SPLIT else None
                # The part of a split that is sliced is found first, or last on the way back.
                dep.index_mapping[:] = [own, of_source] if to_whole else [of_source, own]


def _map_padded(node: Node, otherwise: int) -> None:
    """Map channels to their places among the zeros that are padded beside them."""
    shape, pads = shape_after(node.grad_fn) or (), node.grad_fn._saved_pad
    axis = _channel_axis(node, otherwise if len(shape) == 3 else 1)
    place = 2 * (len(shape) - 1 - axis)  # two numbers for each axis, from the last one on
    before, after = (_signed(x) for x in (*pads[place : place + 2], 0, 0)[:2])
    if min(before, after) < 0 or before == after == 0:
        return
    for source in node.inputs:
        for one, other, to_whole in ((node, source, False), (source, node, True)):
            for dep in one.dependencies:
                if dep.target is other:
                    own = _Part(before, shape[axis] - before - after, to_whole)
                    of_source = dep.index_mapping[0] if source.type == OPTYPE.SPLIT else None
                    dep.index_mapping[:] = [of_source, own] if to_whole else [own, of_source]


def padded_part(node: Node) -> range | None:
    """Find the places of the channels that zeros are padded to; None where it is not so."""
    if type(node.grad_fn).__name__ != _PADDING:
        return None
    for dep in node.dependencies:
        part = dep.index_mapping[0]
        if dep.target in node.inputs and isinstance(part, _Part):
            return range(part.first, part.first + part.size)
    return None


def _bounds(operation: Any, width: int) -> tuple[int, int]:
    """Return where a slice of an axis of this width begins and ends."""
    start, end = (_signed(place) for place in (operation._saved_start, operation._saved_end))
    start, end, _ = slice(start, end).indices(width)
    return start, end


def _map_flattened(node: Node, before: tuple[int, ...], otherwise: int) -> None:
    """Map the channels of a tensor to the columns of the matrix to which it is flattened."""
    after = shape_after(node.grad_fn) or ()
    if node.type != OPTYPE.RESHAPE or len(before) < 3 or len(after) != 2 or before[0] != after[0]:
        return
    axis = _channel_axis(node, otherwise if len(before) == 3 else 1)
    if axis not in (1, len(before) - 1):
        return
    times = math.prod(before[1:]) // max(before[axis], 1)
    for source in node.inputs:
        for one, other, to_matrix in ((source, node, True), (node, source, False)):
            for dep in one.dependencies:
                if dep.target is other:
                    mapping = _Flat(before[axis], times, axis == 1, to_matrix)
                    dep.index_mapping[0] = mapping
    for reader in node.outputs:  # torch-pruning may have put it there
        for one, other in ((reader, node), (node, reader)):
            for dep in one.dependencies:
                if dep.target is other:
                    dep.index_mapping[0] = None


def _unmap(node: Node) -> None:
    for dep in node.dependencies:
        dep.index_mapping[:] = [None, None]
        for back in dep.target.dependencies:
            if back.target is node:
                back.index_mapping[:] = [None, None]


def carried_operands(nodes: Iterable[Node]) -> dict[Node, Node]:
    """Find, for products of matrices, the operand whose channels they hand on, each by itself.

    The product ``a @ b`` sums along the last axis of ``a``. Channels along the last axis of ``b``,
    or along the last but one of ``a``, are none of its sum, as where the adjacency matrix of a
    graph multiplies the features of its nodes. A product of which no operand has such channels, or
    both have, is not in what is returned.
    """
    known: dict[Node, Node | None] = {}
    products = [node for node in nodes if _is_product(node)]
    # From the inputs on, so that few are still unknown behind one.
    found = {node: _carried(node, known) for node in reversed(products)}
    return {node: operand for node, operand in found.items() if operand is not None}


def _is_product(node: Node) -> bool:
    return type(node.grad_fn).__name__ in ("MmBackward0", "BmmBackward0")


def _carried(node: Node, known: dict[Node, Node | None]) -> Node | None:
    if node not in known:
        rank = len(shape_after(node.grad_fn) or ())
        sources = [source for source, _ in node.grad_fn.next_functions]
        operands = [next((x for x in node.inputs if x.grad_fn is s), None) for s in sources]
        # A layer that is used twice is one node, with the operation of one of its calls.
        rest = [x for x in node.inputs if x not in operands]
        unknown = [n for n, s in enumerate(sources) if s is not None and operands[n] is None]
        if len(rest) == len(unknown) == 1:
            operands[unknown[0]] = rest[0]
        carried = [
            operand
            for operand, axis in zip(operands, (rank - 2, rank - 1), strict=True)
            if operand is not None and _axis_behind([operand], -1, known) == axis
        ]
        alone = len(carried) == 1 and operands.count(carried[0]) == 1
        known[node] = carried[0] if alone else None
    return known[node]


def _channel_axis(node: Node, otherwise: int) -> int:
    """Find the axis of the channels in what an operation reads, from the layer that made them."""
    return _axis_behind(node.inputs, otherwise, {})


def _axis_behind(sources: list[Node], otherwise: int, known: dict[Node, Node | None]) -> int:
    waiting: list[tuple[Node, list[Node]]] = [(source, []) for source in sources]
    seen = set[int]()
    while waiting:
        one, behind = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        shape = shape_after(one.grad_fn) or ()
        second = one.type in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV)
        if one.type == OPTYPE.LN:  # one that moves the second axis of an image to the end and back
            size = tuple(one.module.normalized_shape)
            second = size != shape[-1:] and size == shape[1:2]
        if second or one.type in (OPTYPE.LINEAR, OPTYPE.EMBED, OPTYPE.LN):
            return _moved(1 if second else len(shape) - 1, len(shape), behind)
        further = one.inputs
        if one.type == OPTYPE.ELEMENTWISE and _is_product(one):
            further = [x for x in (_carried(one, known),) if x is not None]
        waiting += [(source, [one, *behind]) for source in further]
    return otherwise


def _moved(axis: int, rank: int, operations: list[Node]) -> int:
    """Follow an axis of a tensor of some rank through operations; the last one stays the last."""
    for node in operations:
        operation, before = node.grad_fn, rank
        rank = len(shape_after(operation) or ())
        kind = type(operation).__name__
        if kind == "TransposeBackward0":
            pair = [_positive(operation._saved_dim0, rank), _positive(operation._saved_dim1, rank)]
            axis = sum(pair) - axis if axis in pair else axis
        elif kind == "PermuteBackward0":
            axis = [_positive(dim, rank) for dim in operation._saved_dims].index(axis)
        else:
            axis = rank - 1 if axis == before - 1 else min(axis, rank - 1)
    return axis


def _positive(axis: int, rank: int) -> int:
    return _signed(axis) % max(rank, 1)


def _signed(number: int) -> int:
    """Return a number that autograd saved, negative ones without their sign."""
    return number - 2**64 if number >= 2**63 else number


def divides_channels(node: Node) -> bool:
    """Tell whether a node is a split or slice along the channels."""
    whole = node.outputs if node.type == OPTYPE.SPLIT else node.inputs
    return node.type in (OPTYPE.SPLIT, OPTYPE.SLICE) and any(
        isinstance(mapping, _Part)
        for dep in node.dependencies
        if dep.target in whole
        for mapping in dep.index_mapping
    )


def part_size(node: Node, free: Container[Any]) -> int:
    """Return the size of the equal parts that channels are split or sliced into; 0 for others.

    Args:
        node: of the whole.
        free: splits and slices of which a module holds the sizes, so that each may be another.
    """
    if node.type != OPTYPE.SPLIT:
        return _slice_size(node, free)
    if node.grad_fn in free or not divides_channels(node):
        return 0
    rank = len(shape_after(node.grad_fn) or ())
    sizes = _split_sizes(node.grad_fn, _positive(node.grad_fn._saved_dim, rank))
    return sizes[0] if len(set(sizes)) == 1 else 0


def _slice_size(node: Node, free: Container[Any]) -> int:
    slices = [x for x in node.outputs if x.type == OPTYPE.SLICE and divides_channels(x)]
    operations = [x.grad_fn for x in slices if x.grad_fn not in free]
    found, width = set[tuple[int, int]](), 0
    for operation in operations:
        before = operation._saved_self_sym_sizes
        width = int(before[_positive(operation._saved_dim, len(before))])
        found.add(_bounds(operation, width))
    starts, sizes = sorted(start for start, _ in found), {end - start for start, end in found}
    size = sizes.pop() if len(sizes) == 1 else 0
    return size if len(found) > 1 and size > 0 and starts == list(range(0, width, size)) else 0


def infer_sizes(engine: Any) -> None:
    """Give splits and concatenations the sizes that torch-pruning could not infer, and go on."""
    for node, edges, _, _ in _joints(engine):
        sizes = [size for _, _, _, size in edges]
        if node.type == OPTYPE.SPLIT:
            node.module.split_sizes = sizes
        else:
            node.module.concat_sizes = sizes
    mappings = dependency.index_mapping
    update = mappings.update_reshape_index_mapping

    def careful(graph: Any, node: Node) -> None:
        with suppress(ZeroDivisionError):  # a shuffle of channels, which `operation_obstacle` names
            update(graph, node)

    with patch.object(mappings, "update_reshape_index_mapping", careful):
        mappings.update_index_mapping(engine)


_Edge = tuple[Node, int, int, int]


def _joints(engine: Any) -> Iterator[tuple[Node, list[_Edge], int, int]]:
    """Every split and concatenation with its neighbours, its axis and the rank of its tensor.

    A neighbour comes with how often it came before, and the place and size of its part.
    """
    for node in list(engine.module2node.values()):
        operation, shape = node.grad_fn, shape_after(node.grad_fn)
        saved = getattr(operation, "_saved_dim", None)
        if node.type not in (OPTYPE.SPLIT, OPTYPE.CONCAT) or saved is None or shape is None:
            continue
        rank = len(shape)
        axis = _positive(saved, rank)
        if node.type == OPTYPE.CONCAT:
            sources = [source for source, _ in operation.next_functions]
            known = [
                None if source is None else int(source._input_metadata[number].shape[axis])
                for source, number in operation.next_functions
            ]
            # A part without a gradient does not say how large it is; one such is what is left.
            rest = shape[axis] - sum(size for size in known if size is not None)
            if known.count(None) > 1:
                known = [0 if size is None else size for size in known]
                rank = 0  # no axis is that of the channels: their places are not known
            sizes = [rest if size is None else size for size in known]
            numbers = range(len(sizes))
            neighbours = [
                next((x for x in node.inputs if x.grad_fn is source), None) for source in sources
            ]
        else:
            sizes = _split_sizes(operation, axis)
            neighbours, numbers = [], []  # type: ignore[assignment]
            for consumer in dict.fromkeys(node.outputs):
                for source, number in getattr(consumer.grad_fn, "next_functions", ()):
                    if source is operation:
                        neighbours.append(consumer)
                        numbers.append(number)  # type: ignore[attr-defined]
        starts = [0, *accumulate(sizes)]
        seen: dict[int, int] = {}
        edges = []
        for neighbour, number in zip(neighbours, numbers, strict=True):
            if neighbour is not None and number < len(sizes):
                occurrence = seen.get(id(neighbour), 0)
                seen[id(neighbour)] = occurrence + 1
                edges.append((neighbour, occurrence, starts[number], sizes[number]))
        yield node, edges, axis, rank


def _split_sizes(operation: Any, axis: int) -> list[int]:
    sizes = getattr(operation, "_saved_split_sizes", None)
    if sizes is not None:
        return [int(size) for size in sizes]
    # A split into equal parts returns one tensor for each, the last of which may be smaller.
    return [int(entry.shape[axis]) for entry in operation._input_metadata]

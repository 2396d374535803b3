"""Positions of channels through splits and concatenations, as autograd recorded them.

torch-pruning takes the consumers of a split for its parts, in order: wrong where a part is used
twice or not at all. It also leaves out what a concatenation joins besides channels of layers, and
fails where it cannot infer a size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from torch_pruning import dependency  # type: ignore[import-untyped]

from lightning_wgsef.network.operations import OPTYPE, adds_axes, shape_after

Node = Any


class Index(NamedTuple):
    """A position at one side, and the channel of the root that it is tied to.

    torch-pruning's own index is private; its mappings read these two names and nothing else.
    """

    idx: int
    root_idx: int | None


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
    """Correct the mappings of splits and concatenations along the channels.

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
        if node.type == OPTYPE.RESHAPE and adds_axes(before, shape_after(node.grad_fn) or ()):
            for dep in (x for one in (node, *node.inputs, *node.outputs) for x in one.dependencies):
                if node in (dep.source, dep.target):
                    dep.index_mapping[0] = None
        for dep in node.dependencies if node.type == OPTYPE.CONCAT else ():
            if dep.target.type == OPTYPE.SPLIT:  # of the whole first, then to the other's whole
                dep.index_mapping.reverse()


def _unmap(node: Node) -> None:
    for dep in node.dependencies:
        dep.index_mapping[:] = [None, None]
        for back in dep.target.dependencies:
            if back.target is node:
                back.index_mapping[:] = [None, None]


def _channel_axis(node: Node, otherwise: int) -> int:
    """Find the axis of the channels in a tensor of three axes, from the layer that made them."""
    waiting, seen = [(node, False)], set[int]()
    while waiting:
        one, swapped = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        axis = 1 if one.type in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV) else 2
        if axis == 1 or one.type in (OPTYPE.LINEAR, OPTYPE.EMBED, OPTYPE.LN):
            return 3 - axis if swapped else axis
        turns = type(one.grad_fn).__name__ in ("TransposeBackward0", "PermuteBackward0")
        waiting += [(source, swapped != turns) for source in one.inputs]
    return otherwise


def part_size(node: Node) -> int:
    """Return the size of the equal parts that a split makes along the channels; 0 for others."""
    mapped = any(isinstance(x, _Part) for dep in node.dependencies for x in dep.index_mapping)
    if node.type != OPTYPE.SPLIT or not mapped:
        return 0
    rank = len(shape_after(node.grad_fn) or ())
    saved = node.grad_fn._saved_dim
    sizes = _split_sizes(node.grad_fn, (saved - 2**64 if saved >= 2**63 else saved) % rank)
    return sizes[0] if len(set(sizes)) == 1 else 0


def infer_sizes(engine: Any) -> None:
    """Give splits and concatenations the sizes that torch-pruning could not infer, and go on."""
    for node, edges, _, _ in _joints(engine):
        sizes = [size for _, _, _, size in edges]
        if node.type == OPTYPE.SPLIT:
            node.module.split_sizes = sizes
        else:
            node.module.concat_sizes = sizes
    dependency.index_mapping.update_index_mapping(engine)


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
        axis = (saved - 2**64 if saved >= 2**63 else saved) % rank
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

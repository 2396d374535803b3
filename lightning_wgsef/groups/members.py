"""Members: slices of one parameter, whole and in chunks that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_wgsef.network.attention import DenseLayer
from lightning_wgsef.utils.fusion import CACHED


@dataclass(frozen=True, eq=False)
class Member:
    """Slices of one parameter, each belonging to a group.

    A slice is what is left of the parameter after fixing an index on each of ``axes``.

    Attributes:
        name: canonical name of the parameter in the model.
        parameter: the parameter itself.
        axes: axes along which the groups lie, in increasing order; the others are summed over.
        index: group of every slice, shape (number of slices,), -1 for "in no group"; None: slice i
            belongs to group i.
        shape: the parameter is seen in this shape, with axes of it split in two; None: its own.
        at: only this place of the parameter's first axis is meant, one expert of several, and the
            axes are those of what lies there; None: all of it.

    The filters of a convolution lie along axis 0, its input channels along axis 1, single weights
    along all axes:

    >>> weight = torch.nn.Parameter(torch.ones(8, 3, 5, 5))
    >>> Member("conv.weight", weight, axes=(0,)).slices
    8
    >>> Member("conv.weight", weight, axes=(0, 1, 2, 3)).slices
    600

    Tiles of four filters and three channels:

    >>> Member("conv.weight", weight, axes=(0, 2), shape=(2, 4, 1, 3, 5, 5)).slices
    2

    The rows of the third of four matrices:

    >>> Member("experts", torch.nn.Parameter(torch.ones(4, 6, 2)), axes=(0,), at=2).slices
    6
    """

    name: str
    parameter: Tensor
    axes: tuple[int, ...]
    index: Tensor | None = None
    shape: tuple[int, ...] | None = None
    at: int | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and math.prod(self.shape) != self.parameter.numel():
            raise ValueError(
                f"shape of '{self.name}' must hold its {self.parameter.numel()} weights "
                f"(shape {tuple(self.parameter.shape)}), got {self.shape}"
            )
        dimensions = len(self.extent)
        rising = all(a < b for a, b in zip(self.axes, self.axes[1:], strict=False))
        if not self.axes or not rising or not all(0 <= a < dimensions for a in self.axes):
            raise ValueError(
                f"axes of '{self.name}' must be increasing and within 0..{dimensions - 1} "
                f"(shape {tuple(self.extent)}), got {self.axes}"
            )
        if self.index is not None and self.index.shape != (self.slices,):
            raise ValueError(
                f"index of '{self.name}' must have one entry for each of its {self.slices} slices, "
                f"got shape {tuple(self.index.shape)}"
            )

    @property
    def weights(self) -> Tensor:
        """The values of the parameter."""
        return self.own(self.parameter)

    def own(self, tensor: Tensor) -> Tensor:
        """Return of a tensor shaped like the parameter what `weights` is of the parameter."""
        return tensor.detach() if self.at is None else tensor.detach()[self.at]

    @property
    def extent(self) -> Sequence[int]:
        """The shape in which the weights are seen."""
        own = self.parameter.shape if self.at is None else self.parameter.shape[1:]
        return own if self.shape is None else self.shape

    def seen(self, tensor: Tensor) -> Tensor:
        """View ``tensor``, shaped like the weights, in the shape in which they are seen."""
        return tensor if self.shape is None else tensor.view(self.shape)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return math.prod(self.extent[a] for a in self.axes)

    @property
    def down_columns(self) -> bool:
        """Do the slices run down the columns of a matrix, as input channels do?"""
        return self.axes == (1,) or self.axes == tuple(range(1, len(self.extent)))

    @property
    def slice_size(self) -> int:
        """Number of weights in one slice."""
        return self.weights.numel() // max(self.slices, 1)

    def as_rows(self, tensor: Tensor) -> Tensor | None:
        """View ``tensor``, shaped like the weights, as a matrix of slices, or of parts of slices.

        Slices along the first axes are its rows, those along the second axis, or along all but the
        first, its columns. Work on a matrix runs at the speed of memory, on general axes it does
        not. None: it is no matrix.
        """
        leading = self.axes == tuple(range(len(self.axes)))
        if not tensor.is_contiguous() or not tensor.numel() or not (leading or self.down_columns):
            return None
        return tensor.detach().view(self.slices if leading else self.extent[0], -1)

    def norms(self, dtype: torch.dtype) -> Tensor:
        """Return the norm of every slice, in ``dtype``, which is no less than the weights'."""
        rows = self.as_rows(self.weights)
        if rows is None:
            values = self.seen(self.weights)
            summed = [a for a in range(values.dim()) if a not in self.axes]
            if not summed:
                return values.to(dtype).abs().flatten()
            return _norm(values, summed, dtype).flatten()
        if self.down_columns:
            columns = _column_squares(rows.to(dtype)).view(self.slices, -1)
            return (columns.sum(1) if columns.shape[1] > 1 else columns.view(-1)).sqrt_()
        if rows.shape[1] == 1:
            return rows.to(dtype).abs().view(-1)
        return _norm(rows, [1], dtype)

    def scale_(self, per_slice: Tensor) -> None:
        """Multiply every slice by its factor, in place."""
        rows = self.as_rows(self.weights)
        if rows is None:
            self.seen(self.weights).mul_(self.laid(per_slice))
        elif self.down_columns:
            columns = per_slice.view(-1, 1).expand(-1, rows.shape[1] // self.slices)
            rows.mul_(columns.reshape(1, -1))
        else:
            rows.mul_(per_slice.view(-1, 1))

    def nonzeros(self) -> Tensor:
        """Count the weights of every slice that are not exactly zero (NaN is not)."""
        nonzero = self.seen(self.weights) != 0
        summed = [a for a in range(nonzero.dim()) if a not in self.axes]
        return (nonzero.sum(dim=summed) if summed else nonzero).flatten()

    def laid(self, per_slice: Tensor) -> Tensor:
        """Shape a number of every slice to broadcast with the weights as `seen`."""
        return per_slice.view([n if a in self.axes else 1 for a, n in enumerate(self.extent)])

    def along(self, per_group: Tensor, outside: float | bool) -> Tensor:
        """Shape a number of every group like `laid`; ``outside`` for what is in no group."""
        per_slice = per_group
        if self.index is not None:
            per_slice = torch.cat([per_group, per_group.new_full((1,), outside)])[self.index]
        return self.laid(per_slice)


def gather(per_slice: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Sum slices into their groups; slices of group -1 are dropped."""
    if index is None:
        return per_slice
    totals = per_slice.new_zeros(count + 1)
    return totals.index_add_(0, index.to(per_slice.device) % (count + 1), per_slice)[:count]


def _norm(values: Tensor, axes: list[int], dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=axes, dtype=dtype)
    return norms


def _column_squares(matrix: Tensor) -> Tensor:
    """Sum squares down every column, shape (columns,).

    torch's own reduction down columns of a tall matrix takes ten times as long as one along rows.
    Here chunks of rows are multiplied into a chunk that stays in the cache.
    """
    rows, columns = matrix.shape
    chunk = max(1, CACHED // max(columns, 1))
    if rows <= 2 * chunk or matrix.device.type != "cpu":
        sums: Tensor = torch.linalg.vecdot(matrix, matrix, dim=0)
        return sums
    whole = rows // chunk * chunk
    sums = matrix[:chunk].square()
    for start in range(chunk, whole, chunk):
        part = matrix[start : start + chunk]
        sums.addcmul_(part, part)
    if whole < rows:
        sums[: rows - whole].addcmul_(matrix[whole:], matrix[whole:])
    return sums.sum(0)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of a member's matrix; the whole parameter where it is no matrix.

    Attributes:
        member: whose weights these are.
        rows: which rows; None: everything.
    """

    member: Member
    rows: slice | None

    def of(self, tensor: Tensor) -> Tensor:
        """View the chunk's part of a tensor that is shaped like the weights."""
        matrix = None if self.rows is None else self.member.as_rows(tensor)
        return self.member.seen(tensor.detach()) if matrix is None else matrix[self.rows]

    def part(self, laid: Tensor) -> Tensor:
        """View the chunk's part of what `laid_along` gave, to broadcast with it."""
        return laid if self.rows is None or self.member.down_columns else laid[self.rows]

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes that a sum over slices runs over; what is left goes to `of_slices`."""
        if self.rows is not None:
            return (0,) if self.member.down_columns else (1,)
        axes = range(len(self.member.extent))
        return tuple(a for a in axes if a not in self.member.axes)

    def sum(self, values: Tensor) -> Tensor:
        """Sum values shaped like the chunk over every slice: one number a slice it touches."""
        return self.of_slices(values.sum(self.summed) if self.summed else values)

    def of_slices(self, sums: Tensor) -> Tensor:
        """Make of sums over the axes `summed` one number for every slice that the chunk touches."""
        if self.rows is None or not self.member.down_columns:
            return sums.flatten()
        return sums.view(self.member.slices, -1).sum(1)


def chunks(member: Member, numbers: int = CACHED // 2) -> Iterator[Chunk]:
    """Yield the chunks of ``member``, in order, of at most ``numbers`` weights, or of one row.

    So many as are taken by itself stay in the cache with what is computed of them.

    >>> weight = torch.nn.Parameter(torch.ones(1000, 1000))
    >>> [chunk.rows for chunk in chunks(Member("fc.weight", weight, axes=(0,)))][:2]
    [slice(0, 131, None), slice(131, 262, None)]
    """
    rows = member.as_rows(member.weights)
    if rows is None or member.parameter.device.type != "cpu":
        yield Chunk(member, None)
        return
    size = max(1, numbers // max(rows.shape[1], 1))
    for start in range(0, len(rows), size):
        yield Chunk(member, slice(start, min(start + size, len(rows))))


def laid_along(member: Member, per_slice: Tensor) -> Tensor:
    """Lay a number of every slice along the matrix of ``member`` or along its weights."""
    if member.as_rows(member.weights) is None or member.parameter.device.type != "cpu":
        return member.laid(per_slice)
    if member.down_columns:
        columns = member.weights.numel() // member.extent[0] // member.slices
        return per_slice.view(-1, 1).expand(-1, columns).reshape(1, -1)
    return per_slice.view(-1, 1)


def joined(member: Member, parts: list[Tensor]) -> Tensor:
    """Join what `Chunk.sum` gave for every chunk of ``member``: a number of every slice."""
    if member.down_columns:
        return torch.stack(parts).sum(0)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def output_members(layer: DenseLayer, index: Tensor | None = None) -> list[Member]:
    """Make members of weight and bias of a dense layer, by output."""
    members = [Member(layer.path("weight"), layer.weight, (layer.output_axis,), index)]
    bias = getattr(layer.module, "bias", None)
    if isinstance(bias, nn.Parameter):
        members.append(Member(layer.path("bias"), bias, (0,), index))
    return members


def input_member(layer: DenseLayer, index: Tensor | None = None) -> Member:
    """Make a member of the weight of a dense layer, by input."""
    return Member(layer.path("weight"), layer.weight, (1 - layer.output_axis,), index)

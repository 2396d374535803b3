"""Segments: groups that compete for one budget, laid out so that many budgets are solved at once.

A vector over groups becomes a matrix with one segment a row (padded with zeros where segments
differ in length), so that everything else is plain arithmetic on rows: no Python loop over groups,
no scattered sums, the same bits on every run and, on an accelerator, no synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGE = 2**18
"""A segment of so many groups has a matrix of its own."""

_SMALL = 2**16
"""Up to this many entries a matrix may be mostly padding."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Segments that share one matrix.

    Attributes:
        rows: number of segments.
        width: length of the longest of them.
        segments: which segments these are; None: all, in order.
        groups: the groups they hold, in row order; None: all, in order.
        positions: where in the flattened matrix these groups are; None: they fill it.
        contests: is every row a contest of its own for the budget of the one segment?
    """

    rows: int
    width: int
    segments: Tensor | None = None
    groups: Tensor | slice | None = None
    positions: Tensor | None = None
    contests: bool = False

    def matrix(self, per_group: Tensor, *, pad_with_lowest: bool = False) -> Tensor:
        """A vector over all groups, shape (m,), as a matrix, shape (rows, width), zero padded.

        Divisors and weights are padded with their lowest value, which is as valid as the others.
        """
        values = per_group if self.groups is None else per_group[self.groups]
        if self.positions is None:
            return values.view(self.rows, self.width)
        matrix = values.new_zeros(self.rows * self.width)
        if pad_with_lowest:
            matrix += values.amin()
        return matrix.index_copy_(0, self.positions, values).view(self.rows, self.width)

    def column(self, per_segment: Tensor) -> Tensor:
        """A vector over all segments, shape (S,), as a column, shape (rows, 1)."""
        values = per_segment if self.segments is None else per_segment[self.segments]
        if self.contests:
            return values.view(1, 1).expand(self.rows, 1)
        return values.view(self.rows, 1)

    def of_segments(self, per_row: Tensor) -> Tensor:
        """A number of every row, shape (rows,) or (rows, 1), summed over the rows of a segment."""
        return per_row.view(-1).sum(0, keepdim=True) if self.contests else per_row.view(-1)

    def place(self, matrix: Tensor, result: Tensor | None, size: int) -> Tensor:
        """Write the matrix back into a vector over all ``size`` groups; the vector."""
        values = matrix.reshape(-1)
        if self.positions is not None:
            values = values[self.positions]
        if self.groups is None:
            return values
        result = values.new_zeros(size) if result is None else result
        result[self.groups] = values
        return result


class Segments:
    """Which of m groups compete with each other.

    Args:
        size: number of groups m.
        count: number of segments S.
        pieces: together they hold every group once.

    >>> segments = Segments.of_labels(torch.tensor([0, 1, 0]))
    >>> segments.pieces[0].matrix(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 3.],
            [2., 0.]])
    """

    def __init__(self, size: int, count: int, pieces: Sequence[Piece]) -> None:
        self.size = size
        self.count = count
        self.pieces = tuple(pieces)

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Consecutive segments of these lengths.

        >>> Segments.of_sizes([2, 1]).labels()
        tensor([0, 0, 1])
        """
        total, count = sum(sizes), len(sizes)
        width = max(sizes, default=0)
        large = count > 1 and width >= LARGE
        if total == count * width and not large:
            return cls(total, count, [Piece(count, width)])
        lengths = torch.tensor(sizes)
        starts = lengths.cumsum(0) - lengths
        if count * width <= max(_SMALL, 2 * total) and not large:
            # Every group as far right of its row's first place as it is of its segment's first.
            shift = torch.arange(count) * width - starts
            positions = torch.arange(total) + shift.repeat_interleave(lengths)
            return cls(total, count, [Piece(count, width, positions=positions.to(device))])
        # Very different lengths: those within a factor of two of each other share a matrix.
        alike: dict[int, list[int]] = {}
        for number, n in enumerate(sizes):
            alike.setdefault(n.bit_length() if n < LARGE else -number - 1, []).append(number)
        pieces = []
        for own in alike.values():
            inner = cls.of_sizes([sizes[number] for number in own], device).pieces[0]
            groups: Tensor | slice = slice(int(starts[own[0]]), int(starts[own[0]]) + sizes[own[0]])
            if len(own) > 1:
                mine = lengths[own]
                shift = starts[own] - (mine.cumsum(0) - mine)
                groups = torch.arange(int(mine.sum())) + shift.repeat_interleave(mine)
                groups = groups.to(device)
            numbers = torch.tensor(own, device=device)
            pieces.append(Piece(inner.rows, inner.width, numbers, groups, inner.positions))
        return cls(total, count, pieces)

    @classmethod
    def of_labels(cls, labels: Tensor, count: int | None = None) -> Segments:
        """Segments given by a number 0..S-1 for every group, shape (m,); read by the host."""
        labels = labels.long()
        sizes = torch.bincount(labels, minlength=count or 0)
        laid_out = cls.of_sizes(sizes.tolist(), labels.device)
        if bool((labels[1:] >= labels[:-1]).all()):
            return laid_out
        order = labels.argsort(stable=True)
        pieces = [
            replace(piece, groups=order if piece.groups is None else order[piece.groups])
            for piece in laid_out.pieces
        ]
        return cls(laid_out.size, laid_out.count, pieces)

    @classmethod
    def of_contests(
        cls,
        sizes: Sequence[int],
        contests: Sequence[int | None],
        device: torch.device | str = "cpu",
    ) -> Segments:
        """Consecutive segments, of which some are cut into contests of equal length.

        Each of these contests has the segment's budget to itself.

        >>> segments = Segments.of_contests([2, 4], [None, 2])
        >>> segments.labels()
        tensor([0, 0, 1, 1, 1, 1])
        >>> segments.pieces[1].matrix(torch.arange(6.0))
        tensor([[2., 3.],
                [4., 5.]])
        """
        if not any(contests):
            return cls.of_sizes(sizes, device)
        lengths = torch.tensor(sizes)
        starts = lengths.cumsum(0).sub_(lengths)
        pieces = []
        whole = torch.tensor([number for number, contest in enumerate(contests) if not contest])
        if len(whole):
            mine = lengths[whole]
            before = starts[whole] - (mine.cumsum(0) - mine)
            groups = torch.arange(int(mine.sum())) + before.repeat_interleave(mine)
            groups = groups.to(device)
            whole = whole.to(device)
            for piece in cls.of_sizes(mine.tolist(), device).pieces:
                numbers = whole if piece.segments is None else whole[piece.segments]
                inside = groups if piece.groups is None else groups[piece.groups]
                pieces.append(replace(piece, segments=numbers, groups=inside))
        for number, (size, contest) in enumerate(zip(sizes, contests, strict=True)):
            if contest:
                start = int(starts[number])
                segment = torch.tensor([number], device=device)
                own = slice(start, start + size)
                pieces.append(Piece(size // contest, contest, segment, own, contests=True))
        return cls(sum(sizes), len(sizes), pieces)

    def total(self, per_group: Tensor) -> Tensor:
        """Sum over every segment of a number of each group, shape (S,)."""
        totals = per_group.new_zeros(self.count)
        for piece in self.pieces:
            sums = piece.of_segments(piece.matrix(per_group).sum(1))
            if piece.segments is None:
                return sums
            totals[piece.segments] = sums
        return totals

    def spread(self, per_segment: Tensor) -> Tensor:
        """For every group the value of its segment, shape (m,)."""
        result = None
        for piece in self.pieces:
            matrix = piece.column(per_segment).expand(piece.rows, piece.width)
            result = piece.place(matrix, result, self.size)
        return per_segment[:0] if result is None else result

    def labels(self) -> Tensor:
        """The segment of every group, shape (m,)."""
        return self.spread(torch.arange(self.count))

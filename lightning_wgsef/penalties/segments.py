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

# A segment of so many groups has a matrix of its own.
LARGE = 2**18

# Up to this many entries a matrix may be mostly padding: that is cheaper than a second matrix.
_SMALL = 2**16


@dataclass(frozen=True, eq=False)
class Bucket:
    """Segments of like length, which share one matrix.

    Attributes:
        rows: number of segments.
        width: length of the longest of them.
        segments: which segments these are; None: all, in order.
        groups: the groups they hold, in row order; None: all, in order.
        positions: where in the flattened matrix these groups are; None: they fill it.
        n_of_m: does every row have the budget of the one segment to itself?
    """

    rows: int
    width: int
    segments: Tensor | None = None
    groups: Tensor | slice | None = None
    positions: Tensor | None = None
    n_of_m: bool = False

    def matrix(self, per_group: Tensor, *, pad_with_lowest: bool = False) -> Tensor:
        """Lay a vector over all groups, shape (m,), out as a zero-padded matrix (rows, width).

        Divisors and weights are padded with their lowest value, which is as valid as the others.
        """
        values = per_group if self.groups is None else per_group[self.groups]
        if self.positions is None:
            return values.view(self.rows, self.width)
        matrix = values.new_zeros(self.rows * self.width)
        if pad_with_lowest:
            matrix += values.amin()  # stays on the device, unlike a fill value
        return matrix.index_copy_(0, self.positions, values).view(self.rows, self.width)

    def column(self, per_segment: Tensor) -> Tensor:
        """Return what a vector over all segments, shape (S,), has for the rows, shape (rows, 1)."""
        values = per_segment if self.segments is None else per_segment[self.segments]
        if self.n_of_m:
            return values.view(1, 1).expand(self.rows, 1)
        return values.view(self.rows, 1)

    def of_segments(self, per_row: Tensor) -> Tensor:
        """Sum a number of every row, shape (rows,) or (rows, 1), over the rows of a segment."""
        return per_row.view(-1).sum(0, keepdim=True) if self.n_of_m else per_row.view(-1)

    def place(self, matrix: Tensor, result: Tensor | None, size: int) -> Tensor:
        """Write the matrix back into a vector over all ``size`` groups, and return that."""
        values = matrix.reshape(-1)
        if self.positions is not None:
            values = values[self.positions]
        if self.groups is None:
            return values
        result = values.new_zeros(size) if result is None else result
        result[self.groups] = values
        return result


class Segments:
    """Partition of m groups into those that compete with each other.

    Args:
        size: number of groups m.
        count: number of segments S.
        buckets: together they hold every group once.

    >>> segments = Segments.of_labels(torch.tensor([0, 1, 0]))
    >>> segments.buckets[0].matrix(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 3.],
            [2., 0.]])
    """

    def __init__(self, size: int, count: int, buckets: Sequence[Bucket]) -> None:
        self.size = size
        self.count = count
        self.buckets = tuple(buckets)

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Make consecutive segments of these lengths.

        >>> Segments.of_sizes([2, 1]).labels()
        tensor([0, 0, 1])
        """
        total, count = sum(sizes), len(sizes)
        width = max(sizes, default=0)
        large = count > 1 and width >= LARGE
        if total == count * width and not large:  # a view is enough
            return cls(total, count, [Bucket(count, width)])
        lengths = torch.tensor(sizes)
        starts = lengths.cumsum(0) - lengths
        if count * width <= max(_SMALL, 2 * total) and not large:
            # A group is as far right of its row's first place as it is of its segment's first.
            shift = torch.arange(count) * width - starts
            positions = torch.arange(total) + shift.repeat_interleave(lengths)
            return cls(total, count, [Bucket(count, width, positions=positions.to(device))])
        # Very different lengths: those within a factor of two of each other share a matrix, so
        # that at most half of it is padding. A negative key is met once: a matrix of its own.
        alike: dict[int, list[int]] = {}
        for number, n in enumerate(sizes):
            alike.setdefault(n.bit_length() if n < LARGE else -number - 1, []).append(number)
        buckets = []
        for own in alike.values():
            # So much alike that this makes one bucket, in one of the two ways above.
            inner = cls.of_sizes([sizes[number] for number in own], device).buckets[0]
            groups: Tensor | slice = slice(int(starts[own[0]]), int(starts[own[0]]) + sizes[own[0]])
            if len(own) > 1:  # their groups lie apart: by how much each is shifted
                mine = lengths[own]
                shift = starts[own] - (mine.cumsum(0) - mine)
                groups = torch.arange(int(mine.sum())) + shift.repeat_interleave(mine)
                groups = groups.to(device)
            numbers = torch.tensor(own, device=device)
            buckets.append(Bucket(inner.rows, inner.width, numbers, groups, inner.positions))
        return cls(total, count, buckets)

    @classmethod
    def of_labels(cls, labels: Tensor, count: int | None = None) -> Segments:
        """Make segments of a number 0..S-1 for every group, shape (m,); read by the host."""
        labels = labels.long()
        sizes = torch.bincount(labels, minlength=count or 0)
        laid_out = cls.of_sizes(sizes.tolist(), labels.device)
        if bool((labels[1:] >= labels[:-1]).all()):
            return laid_out
        order = labels.argsort(stable=True)  # among equals the lower index stays first
        buckets = [
            replace(bucket, groups=order if bucket.groups is None else order[bucket.groups])
            for bucket in laid_out.buckets
        ]
        return cls(laid_out.size, laid_out.count, buckets)

    @classmethod
    def n_of_m(
        cls,
        sizes: Sequence[int],
        ms: Sequence[int | None],
        device: torch.device | str = "cpu",
    ) -> Segments:
        """Make consecutive segments, of which some are cut into rows of m groups, as in n:m.

        Each of these rows has the segment's budget to itself.

        Args:
            sizes: length of every segment.
            ms: length of the rows of every segment; None: it is not cut.
            device: where indices are kept.

        >>> segments = Segments.n_of_m([2, 4], [None, 2])
        >>> segments.labels()
        tensor([0, 0, 1, 1, 1, 1])
        >>> segments.buckets[1].matrix(torch.arange(6.0))
        tensor([[2., 3.],
                [4., 5.]])
        """
        if not any(ms):
            return cls.of_sizes(sizes, device)
        lengths = torch.tensor(sizes)
        starts = lengths.cumsum(0).sub_(lengths)
        buckets = []
        whole = torch.tensor([number for number, m in enumerate(ms) if not m])
        if len(whole):
            # Laid out as if they were all, then numbered as they are among all.
            mine = lengths[whole]
            before = starts[whole] - (mine.cumsum(0) - mine)
            groups = torch.arange(int(mine.sum())) + before.repeat_interleave(mine)
            groups = groups.to(device)
            whole = whole.to(device)
            for bucket in cls.of_sizes(mine.tolist(), device).buckets:
                numbers = whole if bucket.segments is None else whole[bucket.segments]
                inside = groups if bucket.groups is None else groups[bucket.groups]
                buckets.append(replace(bucket, segments=numbers, groups=inside))
        for number, (size, m) in enumerate(zip(sizes, ms, strict=True)):
            if m:
                start = int(starts[number])
                segment = torch.tensor([number], device=device)
                own = slice(start, start + size)
                buckets.append(Bucket(size // m, m, segment, own, n_of_m=True))
        return cls(sum(sizes), len(sizes), buckets)

    def total(self, per_group: Tensor) -> Tensor:
        """Sum a number of each group, shape (m,), over every segment, shape (S,)."""
        totals = per_group.new_zeros(self.count)
        for bucket in self.buckets:
            sums = bucket.of_segments(bucket.matrix(per_group).sum(1))
            if bucket.segments is None:
                return sums
            totals[bucket.segments] = sums
        return totals

    def spread(self, per_segment: Tensor) -> Tensor:
        """Give every group the value of its segment, shape (m,)."""
        result = None
        for bucket in self.buckets:
            matrix = bucket.column(per_segment).expand(bucket.rows, bucket.width)
            result = bucket.place(matrix, result, self.size)
        return per_segment[:0] if result is None else result

    def labels(self) -> Tensor:
        """Return the number of every group's segment, shape (m,)."""
        return self.spread(torch.arange(self.count))

"""A member's weights block by block, so that elementwise work stays in the cache of a core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wgsef.members import Member

_NUMBERS = 2**17
"""Numbers of one block: several blocks of them fit the cache of a core."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of a member's matrix; the whole parameter where it is no matrix.

    Attributes:
        member: whose weights these are.
        rows: which rows; None: everything.
    """

    member: Member
    rows: slice | None

    def of(self, tensor: Tensor) -> Tensor:
        """The block's part of a tensor that is shaped like the weights; a view."""
        matrix = None if self.rows is None else self.member.as_rows(tensor)
        return self.member.seen(tensor.detach()) if matrix is None else matrix[self.rows]

    def part(self, laid: Tensor) -> Tensor:
        """The block's part of what `laid_along` gave, to broadcast with it."""
        return laid if self.rows is None or self.member.down_columns else laid[self.rows]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over every slice of values shaped like the block; one number a slice it touches."""
        if self.rows is None:
            summed = [a for a in range(values.dim()) if a not in self.member.axes]
            return (values.sum(summed) if summed else values).flatten()
        if self.member.down_columns:
            return values.sum(0).view(self.member.slices, -1).sum(1)
        return values.sum(1)


def blocks(member: Member) -> Iterator[Block]:
    """The blocks of ``member``, in order.

    >>> weight = torch.nn.Parameter(torch.ones(1000, 1000))
    >>> [block.rows for block in blocks(Member("fc.weight", weight, axes=(0,)))][:2]
    [slice(0, 131, None), slice(131, 262, None)]
    """
    rows = member.as_rows(member.weights)
    if rows is None or member.parameter.device.type != "cpu":
        yield Block(member, None)
        return
    size = max(1, _NUMBERS // max(rows.shape[1], 1))
    for start in range(0, len(rows), size):
        yield Block(member, slice(start, min(start + size, len(rows))))


def laid_along(member: Member, per_slice: Tensor) -> Tensor:
    """A number of every slice, laid along the matrix of ``member`` or along its weights."""
    if member.as_rows(member.weights) is None or member.parameter.device.type != "cpu":
        return member.laid(per_slice)
    if member.down_columns:
        columns = member.weights.numel() // member.extent[0] // member.slices
        return per_slice.view(-1, 1).expand(-1, columns).reshape(1, -1)
    return per_slice.view(-1, 1)


def joined(member: Member, parts: list[Tensor]) -> Tensor:
    """What `Block.sum` gave for every block of ``member``, for every slice of it."""
    if member.down_columns:
        return torch.stack(parts).sum(0)
    return parts[0] if len(parts) == 1 else torch.cat(parts)

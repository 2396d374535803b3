"""The group that owns every slice of every member, as one index over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.members import Member
from lightning_wgsef.sharding import counted_here, is_sharded


def owners_of_slices(layers: Sequence[GroupedLayer], members: Sequence[Member]) -> Tensor | None:
    """The group of every slice of every member, m for none; None: slice i is group i.

    Args:
        layers: the layers.
        members: theirs, one after the other; of sharded ones, what lies on this process.
    """
    owners, first, left = [], 0, iter(members)
    total = sum(layer.count for layer in layers)
    if all(len(x.members) == 1 for x in layers) and all(x.index is None for x in members):
        return None
    for layer in layers:
        for member in itertools.islice(left, len(layer.members)):
            index = torch.arange(layer.count) if member.index is None else member.index.cpu()
            owners.append(torch.where(index < 0, total, index + first))
        first += layer.count
    joined = torch.cat(owners)
    sharded = any(is_sharded(member.parameter) for member in members)
    if not sharded and len(joined) == total and bool((joined == torch.arange(total)).all()):
        return None
    return joined.to(members[0].parameter.device)


def counted_owners(owners: Tensor | None, members: Sequence[Member], total: int) -> Tensor | None:
    """``owners`` for sums over processes: m for what another process counts, too."""
    if owners is None:
        return None
    parts = torch.split_with_sizes(owners, [member.slices for member in members])
    mine = zip(parts, counted_here(members), strict=True)
    return torch.cat([x if counted else torch.full_like(x, total) for x, counted in mine])

"""Which weights are claimed: no weight may belong to two groups."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.members import Member


class Claims:
    """The weights that layers of groups have claimed so far.

    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> rows = GroupedLayer("fc", "row", 2, (Member("fc.weight", weight, axes=(0,)),))
    >>> columns = GroupedLayer("other", "column", 2, (Member("fc.weight", weight, axes=(1,)),))
    >>> claims = Claims()
    >>> claims.add(rows), claims.add(columns)
    ('', "weights of 'fc.weight' belong to 'fc' (row) and to 'other' (column)")
    """

    def __init__(self) -> None:
        self._claims: dict[int, list[tuple[GroupedLayer, Member]]] = {}

    def add(self, layer: GroupedLayer) -> str:
        """Claim the weights of ``layer``; if some are claimed already, none, and say which."""
        mine: dict[int, list[tuple[GroupedLayer, Member]]] = {}
        for member in layer.members:
            key = id(member.parameter)
            for other, one in (*self._claims.get(key, ()), *mine.get(key, ())):
                if bool((_claim(other, one) & _claim(layer, member)).any()):
                    return (
                        f"weights of '{one.name}' belong to '{other.name}' ({other.grouping}) "
                        f"and to '{layer.name}' ({layer.grouping})"
                    )
            mine.setdefault(key, []).append((layer, member))
        for key, claims in mine.items():
            self._claims.setdefault(key, []).extend(claims)
        return ""


def _claim(layer: GroupedLayer, member: Member) -> Tensor:
    """Which weights of the member's parameter belong to a group, shaped to broadcast with it."""
    inside = torch.ones(layer.count, dtype=torch.bool, device=member.parameter.device)
    claim = member.along(inside, False)
    if member.shape is None:
        return claim
    return claim.expand(member.shape).reshape(member.parameter.shape)

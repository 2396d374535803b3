"""Groups of one layer, and overlaps between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.members import Member, gather
from lightning_wgsef.groups.norm_statistics import NormStatistics, has_statistics
from lightning_wgsef.network.layers import modules_by_name, tensors_by_name


def on_model(layers: Iterable[GroupedLayer], model: nn.Module) -> list[GroupedLayer]:
    """Return layers that were found on a copy with parameters and norms of the model itself."""
    layers = list(layers)
    own = tensors_by_name(model)
    modules = modules_by_name(model)
    norms = [
        [replace(norm, module=modules[norm.name]) for norm in layer.statistics] for layer in layers
    ]
    return [
        replace(layer, statistics=tuple(x for x in found if has_statistics(x.module)))
        for layer, found in zip(with_values(layers, own), norms, strict=True)
    ]


def with_values(layers: Iterable[GroupedLayer], values: Mapping[str, Tensor]) -> list[GroupedLayer]:
    """Return the same groups of other tensors, given by canonical name, without statistics."""
    return [
        replace(
            layer,
            members=tuple(replace(m, parameter=values[m.name]) for m in layer.members),
            statistics=(),
        )
        for layer in layers
    ]


@dataclass(frozen=True, eq=False)
class GroupedLayer:
    """The groups of one layer, which compete for one budget.

    Attributes:
        name: canonical name of the layer, under which it is reported.
        grouping: name of the grouping that made the groups.
        count: number of groups.
        members: where the groups' weights are.
        removable: whether zero groups can be taken out of the network.
        obstacle: why they cannot, where somebody might expect it; "" otherwise.
        has_reader: does the last member read what the others make, so that with it at zero a group
            adds nothing?
        reserved: why the layer is left out unless the user names it; "" for "it is not".
        weights: penalty weights w_j > 0, shape (count,); None: 1.
        layer_normalised: in one competition of all layers, the weights are divided by the mean
            square norm of the layer's groups, measured anew at every step.
        costs: costs c_j > 0, shape (count,); None: 1.
        budget: K in units of cost.
        m: how many groups in a row share the budget, as in n:m; None: all of them.
        statistics: norms that follow, whose running statistics shrink with the groups.
        least: how many groups have to stay.
        most: how many may stay at most; None: all.
        multiple: a multiple of which stays: what runs the layer takes no other sizes.

    Raises:
        ValueError: an index or a tensor does not fit ``count``.
    """

    name: str
    grouping: str
    count: int
    members: tuple[Member, ...]
    removable: bool = False
    obstacle: str = ""
    has_reader: bool = False
    reserved: str = ""
    weights: Tensor | None = None
    layer_normalised: bool = False
    costs: Tensor | None = None
    budget: float = field(default=math.inf)
    m: int | None = None
    statistics: tuple[NormStatistics, ...] = ()
    least: int = 1
    most: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        for member in self.members:
            index = torch.tensor([member.slices - 1]) if member.index is None else member.index
            highest = int(index.max()) if len(index) else -1
            if len(index) and int(index.min()) < -1:
                raise ValueError(
                    f"index of '{member.name}' must be a group, or -1 for none, "
                    f"got {int(index.min())}"
                )
            if highest >= self.count or (member.index is None and member.slices != self.count):
                raise ValueError(
                    f"'{member.name}' has slices up to group {highest}, but layer '{self.name}' "
                    f"has {self.count} groups"
                )
        if self.m is not None and (self.m < 1 or self.count % self.m or self.costs is not None):
            raise ValueError(
                f"m of layer '{self.name}' must divide its {self.count} groups, which have "
                f"no costs, got {self.m}"
            )
        for name, values in (("weights", self.weights), ("costs", self.costs)):
            if values is not None and (
                values.shape != (self.count,) or not bool((values > 0).all())
            ):
                lowest = f", lowest {float(values.min())}" if values.numel() else ""
                raise ValueError(
                    f"{name} of layer '{self.name}' must be positive, of shape ({self.count},), "
                    f"got shape {tuple(values.shape)}{lowest}"
                )

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest number of groups that may stay.

        >>> GroupedLayer("fc", "filter", 20, (), least=10, most=17, multiple=8).bounds
        (16, 16)
        """
        most = self.count if self.most is None else self.most
        least = -(-self.least // self.multiple) * self.multiple
        return least, most // self.multiple * self.multiple

    @property
    def largest_member(self) -> Member:
        """The member with most weights."""
        return max(self.members, key=lambda member: member.parameter.numel())

    def sizes(self) -> Tensor:
        """Count the weights of every group, shape (count,), float64."""
        sizes = torch.zeros(self.count, dtype=torch.float64)
        for member in self.members:
            if member.index is None:
                sizes += member.slice_size
            else:
                size = torch.full((member.slices,), float(member.slice_size), dtype=torch.float64)
                sizes += gather(size, member.index.cpu(), self.count)
        return sizes


class Overlaps:
    """Weights that layers have claimed so far, to notice one that is claimed twice.

    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> rows = GroupedLayer("fc", "row", 2, (Member("fc.weight", weight, axes=(0,)),))
    >>> columns = GroupedLayer("other", "column", 2, (Member("fc.weight", weight, axes=(1,)),))
    >>> overlaps = Overlaps()
    >>> overlaps.add(rows), overlaps.add(columns)
    ('', "weights of 'fc.weight' belong to 'fc' (row) and to 'other' (column)")
    """

    def __init__(self) -> None:
        self._taken: dict[int, list[tuple[GroupedLayer, Member]]] = {}

    def add(self, layer: GroupedLayer) -> str:
        """Claim the weights of ``layer``; if some are claimed already, none, and say which."""
        mine: dict[int, list[tuple[GroupedLayer, Member]]] = {}
        for member in layer.members:
            key = id(member.parameter)
            for other, one in (*self._taken.get(key, ()), *mine.get(key, ())):
                apart = one.at != member.at and None not in (one.at, member.at)
                if not apart and bool((_covered(other, one) & _covered(layer, member)).any()):
                    return (
                        f"weights of '{one.name}' belong to '{other.name}' ({other.grouping}) "
                        f"and to '{layer.name}' ({layer.grouping})"
                    )
            mine.setdefault(key, []).append((layer, member))
        for key, taken in mine.items():
            self._taken.setdefault(key, []).extend(taken)
        return ""


def _covered(layer: GroupedLayer, member: Member) -> Tensor:
    """Tell which weights of the member's parameter are in a group, to broadcast with it."""
    inside = torch.ones(layer.count, dtype=torch.bool, device=member.parameter.device)
    covered = member.along(inside, False)
    if member.at is not None:
        whole = covered.new_zeros(member.parameter.shape[0], *covered.shape)
        whole[member.at] = covered
        return whole
    if member.shape is None:
        return covered
    return covered.expand(member.shape).reshape(member.parameter.shape)

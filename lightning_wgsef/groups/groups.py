"""All groups of a model: their norms and scaling, and who competes with whom."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor

from lightning_wgsef.groups.grouped_layer import GroupedLayer, Overlaps
from lightning_wgsef.groups.members import Member
from lightning_wgsef.groups.sharding import counted_here, local_member
from lightning_wgsef.network.sharding import is_sharded
from lightning_wgsef.penalties.segments import Segments
from lightning_wgsef.utils.tables import format_table


class CompetitionArguments(TypedDict):
    """Keyword arguments of `envelope_value`, `sparsity_gap` and `prox_multipliers`."""

    weights: Tensor | None
    costs: Tensor | None
    segments: Segments


class Groups:
    """All groups of a model, layer after layer, with their budgets.

    Attributes:
        layers: the grouped layers.
        left_out: name of every layer that is not grouped, and the reason.
        is_global: do all layers compete for one budget?
        budgets: K of every segment, shape (S,): of every layer, or of all together.
        segments: which groups compete.
        weights: penalty weights w_j, shape (m,); None: 1.
        costs: costs c_j, shape (m,); None: 1.
        starts: the first group of every layer.

    Args:
        budget: one budget for all layers; None: every layer has its own.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> rows = GroupedLayer("fc", "mine", 2, (Member("fc.weight", weight, axes=(0,)),), budget=1)
    >>> groups = Groups([rows])
    >>> groups.norms()
    tensor([5., 1.])
    >>> groups.scale_(torch.tensor([0.5, 0.0]))
    >>> weight.tolist()
    [[1.5, 2.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        layers: Iterable[GroupedLayer],
        left_out: Mapping[str, str] | None = None,
        budget: float | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.left_out = dict(left_out or {})
        self.counts = [layer.count for layer in self.layers]
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"names of layers must differ, got {twice} more than once")
        parameters = [m.parameter for layer in self.layers for m in layer.members]
        device = parameters[0].device if parameters else torch.device("cpu")
        wide = any(p.dtype == torch.float64 for p in parameters)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = device
        self.is_global = budget is not None
        budgets = [min(layer.budget, 1e300) for layer in self.layers]
        if budget is not None:
            budgets = [budget]
        if self.is_global:
            _refuse_n_of_m(self.layers)
            self.segments = Segments.of_sizes([len(self)], device)
        else:
            ms = [layer.m for layer in self.layers]
            self.segments = Segments.n_of_m(self.counts, ms, device)
        self.budgets = torch.tensor(budgets, dtype=torch.float64).to(device)
        self.weights = self._joined([layer.weights for layer in self.layers], self.dtype)
        # Whether costs fit a budget is a matter of their last digits.
        self.costs = self._joined([layer.costs for layer in self.layers], torch.float64)
        # Of parameters that are sharded, what lies on this process.
        self.members = [local_member(member) for layer in self.layers for member in layer.members]
        self._is_sharded = any(map(is_sharded, parameters))
        counts = torch.tensor(self.counts, dtype=torch.long)
        self.starts = (counts.cumsum(0) - counts).to(device)
        self._counts = counts.to(device)
        self._slices = [member.slices for member in self.members]
        self._owners = owners_of_slices(self.layers, self.members)
        self._counted = self._owners
        if self._is_sharded:
            self._counted = counted_owners(self._owners, self.members, len(self))
        self._own_weights = self.weights
        self._is_layer_normalised = self.is_global and any(
            layer.layer_normalised for layer in self.layers
        )
        self.weigh(self.norms() if self._is_layer_normalised else None)

    def _joined(self, values: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        if all(value is None for value in values):
            return None
        ones = [torch.ones(n) if v is None else v for n, v in zip(self.counts, values, strict=True)]
        return torch.cat([value.to(self.device, dtype) for value in ones])

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def sizes(self) -> Tensor:
        """Number of weights in every group, shape (m,)."""
        sizes = torch.cat([torch.zeros(0), *(layer.sizes() for layer in self.layers)])
        return sizes.to(self.device)

    @property
    def totals(self) -> Tensor:
        """What all groups that compete for one budget cost, shape (S,)."""
        if any(layer.m for layer in self.layers):  # which have no costs
            counts = [layer.m or layer.count for layer in self.layers]
            return torch.tensor(counts, dtype=torch.float64, device=self.device)
        costs = torch.ones(len(self)) if self.costs is None else self.costs
        return self.segments.total(costs.to(self.device, torch.float64))

    @property
    def competition(self) -> CompetitionArguments:
        """Who competes with whom and how, as the functions of the envelope take it."""
        return {"weights": self.weights, "costs": self.costs, "segments": self.segments}

    def only(self, names: Iterable[str]) -> Groups:
        """The layers with these names.

        Raises:
            ValueError: all layers compete for one budget, and some are missing.
        """
        wanted = set(names)
        layers = [layer for layer in self.layers if layer.name in wanted]
        if len(layers) == len(self.layers):
            return self
        if self.is_global:
            raise ValueError(
                "layers that compete for one budget (scope='global') need one optimizer, got one "
                f"that trains only {sorted(wanted)}; use scope='layer', or exclude the others"
            )
        return Groups(layers)

    def weigh(self, norms: Tensor | None) -> None:
        """Measure the weights of layers that are ``layer_normalised`` anew.

        Without it, the layer whose groups grow fastest wins a competition of all layers: groups of
        one layer are more alike than layers are.

        Args:
            norms: of the groups as they are, shape (m,).
        """
        if not self._is_layer_normalised or norms is None:
            return
        squares = norms.double().square()
        parts = torch.split_with_sizes(squares, self.counts)
        means = torch.stack([part.mean() for part in parts])
        means = torch.where(means > 0, means, 1)
        per_group = means.repeat_interleave(self._counts, output_size=len(self))
        own = 1 if self._own_weights is None else self._own_weights
        self.weights = (own / per_group).to(self.dtype)

    def split(self, per_group: Tensor) -> dict[str, Tensor]:
        """A vector over all groups, shape (m,), as one vector for every layer."""
        parts = torch.split_with_sizes(per_group, self.counts)
        return {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}

    @torch.no_grad()
    def norms(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Norm of every group, shape (m,), accumulated in float32 (float64 for float64 weights).

        Args:
            values: tensors to use instead of the parameters, by parameter name.
        """
        slices = [
            member.norms(None if values is None else self._like(member, values), self.dtype)
            for member in self.members
        ]
        if self._counted is None:
            return torch.cat(slices) if slices else torch.zeros(0, dtype=self.dtype)
        return self.gathered([norms.square_() for norms in slices]).sqrt_()

    @torch.no_grad()
    def alive(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Has the group a weight that is not exactly zero? Booleans, shape (m,)."""
        slices = [
            member.nonzeros(member.weights if values is None else self._like(member, values))
            for member in self.members
        ]
        return self.gathered(slices) > 0

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply every group by its factor, shape (m,), in place."""
        for member, part in zip(self.members, self.spread(factors, 1.0), strict=True):
            # Not rounded to the weights' precision where that is low: the product is, once.
            member.scale_(part.to(torch.promote_types(member.parameter.dtype, torch.float32)))

    def spread(self, per_group: Tensor, outside: float) -> tuple[Tensor, ...]:
        """For every member a number for each of its slices, ``outside`` for those in no group."""
        if self._owners is not None:
            per_group = torch.cat([per_group, per_group.new_full((1,), outside)])[self._owners]
        return torch.split_with_sizes(per_group, self._slices)

    def gathered(self, per_slice: Sequence[Tensor]) -> Tensor:
        """Sum a number of every slice of each member over the slices of each group, shape (m,).

        Where parameters are sharded over processes, every process has to ask, and gets the sum
        over all of them.
        """
        slices = torch.cat(list(per_slice)) if per_slice else torch.zeros(0)
        if self._counted is None:
            return slices
        totals = slices.new_zeros(len(self) + 1).index_add_(0, self._counted, slices)[:-1]
        if self._is_sharded:
            totals = totals.contiguous()
            torch.distributed.all_reduce(totals)
        return totals

    def _like(self, member: Member, values: Mapping[str, Tensor]) -> Tensor:
        return member.own(values[member.name]).to(member.parameter.device)

    def check_disjoint(self, other: Groups | None = None) -> None:
        """Refuse a weight that two groups claim, inside these groups or between these and others.

        Raises:
            ValueError: names the parameter and both layers.
        """
        overlaps = Overlaps()
        others = other.layers if other is not None else ()
        for layer in (*self.layers, *others):
            if clash := overlaps.add(layer):
                whose = " of another callback or regularizer" if layer in others else ""
                raise ValueError(
                    f"groups overlap: {clash}{whose}; leave one of the two out with include or "
                    "exclude"
                )

    def __str__(self) -> str:
        header = ["layer", "grouping", "groups", "weights each", "budget", "removable"]
        rows = []
        for layer in self.layers:
            budget = f"{layer.budget:g}" if math.isfinite(layer.budget) else "-"
            budget += f" of {layer.m}" if layer.m else ""
            removable = "yes" if layer.removable else "no"
            removable += f": {layer.obstacle}" if layer.obstacle else ""
            size = _range(layer.sizes())
            rows.append([layer.name, layer.grouping, f"{layer.count}", size, budget, removable])
        extra = {"weight": self.weights is not None, "cost": self.costs is not None}
        for place, name in enumerate([name for name, shown in extra.items() if shown]):
            header.insert(4 + place, name)
            for row, layer in zip(rows, self.layers, strict=True):
                row.insert(4 + place, _range(layer.weights if name == "weight" else layer.costs))
        lines = [format_table(header, rows)]
        if self.is_global:
            costs = self.costs if self.costs is not None else torch.ones(len(self))
            lines.append(f"budget of all: {float(self.budgets[0]):g} of {float(costs.sum()):g}")
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def _refuse_n_of_m(layers: Iterable[GroupedLayer]) -> None:
    for layer in layers:
        if layer.m:
            raise ValueError(
                f"scope must be 'layer' with grouping '{layer.grouping}' (layer '{layer.name}'), "
                f"where every {layer.m} groups in a row have a budget of their own"
            )


def _range(values: Tensor | None) -> str:
    """The lowest and the highest value."""
    if values is None:
        return "1"
    ends = (values.min(), values.max()) if len(values) else ()
    return "-".join(dict.fromkeys(f"{float(end):.4g}" for end in ends))


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

"""Groups of a model: its grouped layers, their budgets and what is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor

from lightning_wgsef.groups.grouped_layer import GroupedLayer, Overlaps
from lightning_wgsef.groups.layout import Layout, joined_layers
from lightning_wgsef.groups.size import SlimSize, WidthLimits
from lightning_wgsef.penalties.segments import Segments
from lightning_wgsef.utils.tables import format_table


class CompetitionArguments(TypedDict):
    """Keyword arguments of `envelope_value`, `sparsity_gap` and `prox_multipliers`."""

    weights: Tensor | None
    costs: Tensor | None
    segments: Segments


class Groups:
    """All groups of a model, layer after layer, with their budgets.

    A list, cheap to make. What is measured and changed on the weights is the `Layout`'s, which is
    made when it is first asked for.

    Attributes:
        layers: the grouped layers.
        left_out: name of every layer that is not grouped, and the reason.
        is_global: do all layers compete for one budget?
        budgets: K of every segment, shape (S,): of every layer, or of all together.
        size: of the slim network by the groups alive, where the budget counts that; else None.
        counts: number of groups of every layer.
        dtype: float64 where any weight is, else float32.
        device: where vectors over groups are.

    Args:
        budget: one budget for all layers; None: every layer has its own.
        size: see above; ``budget`` is the limit then.
        limit: see below, where every layer has its own budget.

    >>> from lightning_wgsef.groups.members import Member
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
        *,
        size: SlimSize | None = None,
        limit: float | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.left_out = dict(left_out or {})
        self.counts = [layer.count for layer in self.layers]
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"names of layers must differ, got {twice} more than once")
        parameters = [m.parameter for layer in self.layers for m in layer.members]
        wide = any(p.dtype == torch.float64 for p in parameters)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.is_global = budget is not None
        if budget is None:
            budgets = [min(layer.budget, 1e300) for layer in self.layers]
        else:
            _refuse_n_of_m(self.layers)
            budgets = [budget]
        self.budgets = torch.tensor(budgets, dtype=torch.float64).to(self.device)
        self.size = None if size is None else size.to(self.device)
        self._limit = limit

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def layout(self) -> Layout:
        """Where the weights lie in memory; finding groups needs none."""
        return Layout(self.layers, dtype=self.dtype, device=self.device, normalised=self.is_global)

    @cached_property
    def limits(self) -> WidthLimits:
        """How many groups of each layer may stay."""
        return WidthLimits.of(self.layers, self.device)

    @property
    def limit(self) -> float | None:
        """The largest size of the slim network; None: none was named."""
        return float(self.budgets[0]) if self.is_global else self._limit

    @property
    def latency(self) -> Tensor | None:
        """What was measured of a size that is a latency, see `SlimSize`; None: nothing was.

        A resumed run sets that of before.
        """
        return None if self.size is None else self.size.latency

    @latency.setter
    def latency(self, measured: Tensor | None) -> None:
        if self.size is not None and measured is not None:
            self.size = self.size.with_latency(measured)

    @property
    def starts(self) -> Tensor:
        """The first group of every layer, shape (layers,)."""
        return self.layout.starts

    @cached_property
    def segments(self) -> Segments:
        """Which groups compete for one budget."""
        if self.is_global:
            return Segments.of_sizes([len(self)], self.device)
        return Segments.n_of_m(self.counts, [layer.m for layer in self.layers], self.device)

    @property
    def weights(self) -> Tensor | None:
        """Penalty weights w_j, shape (m,); None: 1. A resumed run sets those of before."""
        return self.layout.weights

    @weights.setter
    def weights(self, weights: Tensor | None) -> None:
        self.layout.weights = weights

    @cached_property
    def costs(self) -> Tensor | None:
        """Costs c_j, shape (m,), float64, since their last digits decide what fits; None: 1.

        Where the budget is a size of the slim network, what a group costs at the widths that fitted
        the last budget; a resumed run sets those of before.
        """
        costs = [layer.costs for layer in self.layers]
        return joined_layers(costs, self.counts, torch.float64, self.device)

    @cached_property
    def sizes(self) -> Tensor:
        """Number of weights in every group, shape (m,)."""
        sizes = torch.cat([torch.zeros(0), *(layer.sizes() for layer in self.layers)])
        return sizes.to(self.device)

    @property
    def totals(self) -> Tensor:
        """What all groups that compete for one budget cost, shape (S,)."""
        if self.is_global and self.size is not None:
            return self.size.total.view(1)
        if any(layer.m for layer in self.layers):  # which have no costs
            counts = [layer.m or layer.count for layer in self.layers]
            return torch.tensor(counts, dtype=torch.float64, device=self.device)
        costs = torch.ones(len(self)) if self.costs is None else self.costs
        return self.segments.total(costs.to(self.device, torch.float64))

    @property
    def competition(self) -> CompetitionArguments:
        """Who competes with whom and how, as the functions of the envelope take it."""
        return {"weights": self.weights, "costs": self.costs, "segments": self.segments}

    def norms(self) -> Tensor:
        """Measure every group's norm, shape (m,), in float32 (float64 for float64 weights)."""
        return self.layout.norms()

    def alive(self) -> Tensor:
        """Tell which groups have a weight that is not exactly zero: booleans, shape (m,)."""
        return self.layout.alive()

    def scale_(self, factors: Tensor) -> None:
        """Multiply every group by its factor, shape (m,), in place."""
        self.layout.scale_(factors)

    def split(self, per_group: Tensor) -> dict[str, Tensor]:
        """Split a vector over all groups, shape (m,), into one vector for every layer."""
        parts = torch.split_with_sizes(per_group, self.counts)
        return {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}

    def only(self, names: Iterable[str]) -> Groups:
        """Return the layers with these names.

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
        weighted = any(x.weights is not None or x.layer_normalised for x in self.layers)
        extra = {"weight": weighted, "cost": self.costs is not None}
        for place, name in enumerate([name for name, shown in extra.items() if shown]):
            header.insert(4 + place, name)
            for row, layer in zip(rows, self.layers, strict=True):
                row.insert(4 + place, _range(layer.weights if name == "weight" else layer.costs))
        lines = [format_table(header, rows)]
        if self.size is not None and self.size.unit and self.limit is not None:
            total = float(self.size.total)
            lines.append(
                f"size of the slim network: at most {self.size.shown(self.limit)} of "
                f"{self.size.shown(total)} {self.size.unit} ({self.limit / total:.1%})"
            )
        elif self.is_global:
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
    """Format the lowest and the highest value."""
    if values is None:
        return "1"
    ends = (values.min(), values.max()) if len(values) else ()
    return "-".join(dict.fromkeys(f"{float(end):.4g}" for end in ends))

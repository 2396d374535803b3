"""Scope of the competition: every layer for itself, or all layers for one budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.penalties.envelope import envelope_value, sparsity_gap


class Scope:
    """Norms and budgets as the penalty sees them.

    Where all layers compete for one budget, a layer that lost all its groups would cut the network
    in two. Therefore the strongest group of every layer is kept: its cost is taken from the budget,
    and the others compete for the rest.

    Attributes:
        norms: norms of the groups, shape (m,), 0 for those that are kept.
        budgets: what is left for the others, shape (S,).
        kept: booleans, shape (m,); None: every layer has its own budget.
    """

    def __init__(self, groups: Groups, norms: Tensor, budgets: Tensor) -> None:
        self.norms = norms
        self.budgets = budgets
        self.kept: Tensor | None = None
        if groups.is_global:
            strongest = norms if groups.weights is None else norms * groups.weights.sqrt()
            strongest = strongest if groups.costs is None else strongest / groups.costs.sqrt()
            firsts = [part.argmax() for part in torch.split_with_sizes(strongest, groups.counts)]
            places = torch.stack(firsts) + groups.layout.starts
            self.kept = torch.zeros_like(norms, dtype=torch.bool).index_fill_(0, places, True)
            costs = torch.ones_like(norms) if groups.costs is None else groups.costs
            taken = (costs.double() * self.kept).sum()
            # At least as much as nothing: budgets are positive numbers.
            self.budgets = (budgets - taken).clamp(min=1e-9)
            self.norms = norms.masked_fill(self.kept, 0)

    def with_kept(self, per_group: Tensor, value: Tensor | float) -> Tensor:
        """Return ``per_group`` with ``value`` for those that are kept."""
        if self.kept is None:
            return per_group
        return torch.where(self.kept, value, per_group).to(per_group.dtype)


def value_and_gap(groups: Groups, norms: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of the envelope and the sparsity gap of every segment, shape (S,).

    A group that is kept has the share 1: half of its weighted square is its value, its gap is 0.
    """
    scope = Scope(groups, norms, budgets)
    value = envelope_value(scope.norms, scope.budgets, **groups.competition)
    gap = sparsity_gap(scope.norms, scope.budgets, **groups.competition)
    if scope.kept is not None:
        squares = norms.square() if groups.weights is None else norms.square() * groups.weights
        value = value + 0.5 * (squares * scope.kept).sum()
    return value, gap

"""Scope of the competition: every layer for itself, or all layers for one budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.penalties.envelope import (
    envelope_value,
    prox_multipliers,
    sparsity_gap,
)


class Scope:
    """Norms and budgets as the penalty sees them.

    Where all layers compete for one budget, a layer that lost all its groups would cut the network
    in two. Therefore the strongest group of every layer is kept: its cost is taken from the budget,
    and the others compete for the rest. Where the budget is a size of the slim network, it is
    counted exactly which groups fit it in the order of their strengths, and what they cost by the
    linear costs is the budget of the prox.

    Attributes:
        norms: norms of the groups, shape (m,), 0 for those that are kept.
        budgets: what is left for the others, shape (S,).
        kept: booleans, shape (m,); None: every layer has its own budget.
        fitting: which groups fit the size of the slim network, booleans, shape (m,); None: the
            budget is none.
    """

    def __init__(self, groups: Groups, norms: Tensor, budgets: Tensor) -> None:
        self.norms = norms
        self.budgets = budgets
        self.kept: Tensor | None = None
        self.fitting: Tensor | None = None
        if groups.is_global:
            strongest = norms if groups.weights is None else norms * groups.weights.sqrt()
            strongest = strongest if groups.costs is None else strongest / groups.costs.sqrt()
            costs = torch.ones_like(norms) if groups.costs is None else groups.costs
            if groups.size is None:
                parts = torch.split_with_sizes(strongest, groups.counts)
                places = torch.stack([part.argmax() for part in parts]) + groups.layout.starts
                self.kept = torch.zeros_like(norms, dtype=torch.bool).index_fill_(0, places, True)
                left = budgets - (costs.double() * self.kept).sum()
            else:
                self.kept = (
                    groups.limits.ranks(strongest) < groups.limits.least[groups.limits.owner]
                )
                self.fitting = groups.size.fitting(strongest, groups.limits, budgets[0])
                # Weaker ones may fit behind one that is too dear; it is a loser all the same, and
                # shrinks beside those before it.
                loser = strongest.masked_fill(self.fitting, 0).max()
                before = self.fitting & ~self.kept & (strongest >= loser)
                left = (costs * before).sum().view(1)
            # At least as much as nothing: budgets are positive numbers.
            self.budgets = left.clamp(min=1e-9)
            self.norms = norms.masked_fill(self.kept, 0)

    def with_kept(self, per_group: Tensor, value: Tensor | float) -> Tensor:
        """Return ``per_group`` with ``value`` for those that are kept."""
        if self.kept is None:
            return per_group
        return torch.where(self.kept, value, per_group).to(per_group.dtype)


def survivors(groups: Groups, norms: Tensor, budgets: Tensor) -> Tensor:
    """Return which groups the projection onto the budgets keeps, booleans of shape (m,)."""
    scope = Scope(groups, norms, budgets)
    if scope.fitting is not None:
        return scope.fitting & (norms > 0)
    weights = groups.weights
    factors = prox_multipliers(
        scope.norms if weights is None else scope.norms * weights.sqrt(),
        1.0,
        scope.budgets,
        costs=groups.costs,
        segments=groups.segments,
        debias=1.0,
    )
    return (scope.with_kept(factors, 1.0) > 0) & (norms > 0)


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

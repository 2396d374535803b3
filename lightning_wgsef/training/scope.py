"""Who competes: all groups, or in a global competition all but the strongest of every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.penalties.envelope import envelope_value, sparsity_gap


class Competitors:
    """Norms and budgets as the competition sees them.

    Where all layers compete for one budget, a layer that lost all its groups would cut the network
    in two. Therefore the strongest group of every layer is seeded: it stays, its cost is taken from
    the budget, and the others compete for the rest.

    Attributes:
        norms: norms of the groups, shape (m,), 0 for those that are seeded.
        budgets: what is left for the others, shape (S,).
        seeded: booleans, shape (m,); None: nobody.
    """

    def __init__(self, groups: Groups, norms: Tensor, budgets: Tensor) -> None:
        self.norms = norms
        self.budgets = budgets
        self.seeded: Tensor | None = None
        if groups.is_global:
            strongest = norms if groups.weights is None else norms * groups.weights.sqrt()
            strongest = strongest if groups.costs is None else strongest / groups.costs.sqrt()
            firsts = [part.argmax() for part in torch.split_with_sizes(strongest, groups.counts)]
            places = torch.stack(firsts) + groups.starts
            self.seeded = torch.zeros_like(norms, dtype=torch.bool).index_fill_(0, places, True)
            costs = torch.ones_like(norms) if groups.costs is None else groups.costs
            taken = (costs.double() * self.seeded).sum()
            # At least as much as nothing: budgets are positive numbers.
            self.budgets = (budgets - taken).clamp(min=1e-9)
            self.norms = norms.masked_fill(self.seeded, 0)

    def with_seeded(self, per_group: Tensor, value: Tensor | float) -> Tensor:
        """``per_group`` with ``value`` for those that are seeded."""
        if self.seeded is None:
            return per_group
        return torch.where(self.seeded, value, per_group).to(per_group.dtype)


def value_and_gap(groups: Groups, norms: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor]:
    """Value of the envelope and sparsity gap in every segment, shape (S,).

    A group that is seeded has the share 1: half of its weighted square is its value, its gap is 0.
    """
    competitors = Competitors(groups, norms, budgets)
    value = envelope_value(competitors.norms, competitors.budgets, **groups.competition)
    gap = sparsity_gap(competitors.norms, competitors.budgets, **groups.competition)
    if competitors.seeded is not None:
        squares = norms.square() if groups.weights is None else norms.square() * groups.weights
        value = value + 0.5 * (squares * competitors.seeded).sum()
    return value, gap

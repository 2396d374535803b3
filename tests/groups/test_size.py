"""The choice that fits a size, against every choice that there is, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_wgsef.groups.size import SlimSize, WidthLimits


def polynomial(counts: list[int], seed: int, kinds_of: int = 1) -> tuple[SlimSize, WidthLimits]:
    """Draw a chain of layers, a width that is the sum of two, and a square; a kind or two each."""
    generator = torch.Generator().manual_seed(seed)
    layers = len(counts)
    kinds = torch.cat(
        [kinds_of * i + torch.arange(n) * kinds_of // n for i, n in enumerate(counts)]
    )
    total = kinds_of * layers
    slopes = torch.zeros(layers + 2, total, dtype=torch.float64)
    for kind in range(total):
        slopes[kind // kinds_of, kind] = 1 + kind % kinds_of
    slopes[layers] = slopes[0] + slopes[layers - 1]  # a concatenation
    base = torch.zeros(layers + 2, dtype=torch.float64)
    base[0], base[-1] = 2.0, 1.0
    one = layers + 1
    pairs = [[i, i + 1] for i in range(layers - 1)]
    factors = [*pairs, [layers, 0], [0, 0], *([i, one] for i in range(layers)), [one, one]]
    coefficients = torch.rand(len(factors), generator=generator, dtype=torch.float64) + 0.1
    size = SlimSize("units", kinds, base, slopes, coefficients, torch.tensor(factors))
    owner = torch.arange(layers).repeat_interleave(torch.tensor(counts))
    limits = WidthLimits(
        owner,
        torch.ones(layers, dtype=torch.long),
        torch.tensor(counts),
        torch.ones(layers, dtype=torch.long),
    )
    return size, limits


def every_choice(strengths: Tensor, size: SlimSize, limits: WidthLimits) -> list[Tensor]:
    """Return the strongest of every kind, in all numbers that keep the strongest of a layer."""
    parts = [(size.kinds == kind).nonzero().flatten() for kind in range(int(size.kinds.max()) + 1)]
    orders = [own[strengths[own].argsort(descending=True, stable=True)] for own in parts]
    least = limits.ranks(strengths) < limits.least[limits.owner]
    found = []
    for numbers in itertools.product(*(range(len(own) + 1) for own in orders)):
        alive = torch.zeros(len(strengths), dtype=torch.bool)
        for own, number in zip(orders, numbers, strict=True):
            alive[own[:number]] = True
        if bool((alive | ~least).all()):
            found.append(alive)
    return found


def beginning(strengths: Tensor, alive: Tensor, least: Tensor) -> int:
    """Count how many of the strongest groups, behind those that have to stay, are all alive."""
    order = [g for g in strengths.argsort(descending=True, stable=True).tolist() if not least[g]]
    return next((n for n, group in enumerate(order) if not alive[group]), len(order))


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_within_a_group_of_the_best(kinds: int, seed: int) -> None:
    """By the same order: no choice that fits has a longer beginning of the strongest groups.

    Of those with as long a one, no group of any kind can be added to ours; and what it leaves of
    the budget is less than the dearest group of those that are left out.
    """
    size, limits = polynomial([4, 5, 3], seed, kinds)
    generator = torch.Generator().manual_seed(100 + seed)
    strengths = torch.rand(12, generator=generator, dtype=torch.float64)
    choices = every_choice(strengths, size, limits)
    sizes = torch.stack([size.of(alive) for alive in choices])
    least = limits.ranks(strengths) < limits.least[limits.owner]
    smallest, total = float(size.of(least)), float(size.total)
    for share in torch.linspace(0, 1, 23).tolist():
        budget = smallest + share * (total - smallest)
        alive = size.fitting(strengths, limits, torch.tensor(budget, dtype=torch.float64))
        left = float(size.of(alive))
        assert any(torch.equal(alive, other) for other in choices)
        assert left <= budget * (1 + 1e-9)
        fitting = [x for x, own in zip(choices, sizes.tolist(), strict=True) if own <= budget]
        best = max(beginning(strengths, other, least) for other in fitting)
        assert beginning(strengths, alive, least) >= best
        outside = (~alive).nonzero().flatten().tolist()
        more = [float(size.of(alive.index_fill(0, torch.tensor([g]), True))) for g in outside]
        assert min(more, default=math.inf) > budget
        assert budget - left < max((x - left for x in more), default=math.inf)

"""The multipliers of one matrix of segments: which way is taken, and the formulas of `envelope`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wgsef import few, millions
from lightning_wgsef.budgets import Competition, Problem
from lightning_wgsef.millions import FULL_STEP_SLACK
from lightning_wgsef.segments import LARGE, Piece

# Below this the width of the clip drowns in the rounding of the root.
_NARROWEST = 1e-8


def multipliers(
    problem: Problem, piece: Piece, steps: Tensor, debias: float, anchored: bool
) -> Tensor:
    """What `prox_multipliers` gives for the segments of ``piece``, one a row.

    Raises:
        ValueError: debias * step * weights exceeds 1.
    """
    column = piece.column(steps)
    special = _special(problem, piece, column, debias, anchored)
    if special is not None:
        return special
    return _multipliers(problem.competition(piece), column, debias, anchored)


def _multipliers(competition: Competition, steps: Tensor, debias: float, anchored: bool) -> Tensor:
    thresholds = competition.weighted(steps)
    _check_debiased_step(thresholds, debias)
    full = debias * thresholds >= 1 - FULL_STEP_SLACK
    if competition.weights is not None:
        live = competition.norms > 0
        full = (full | ~live).all(1, keepdim=True) & live.any(1, keepdim=True)
    if not competition.on_host or full.any():
        kept, _ = competition.within_budget()
        projection = kept * (1.0 if anchored else 1 / (1 + thresholds * (1 - debias)))
        if competition.on_host and full.all():
            return projection
    widths = (1 - debias * thresholds).clamp(min=_NARROWEST)
    shares = competition.shares(thresholds, widths)
    factors = _factors(shares, thresholds, debias)
    if anchored:
        factors = _anchored(competition, factors)
    if not competition.on_host or full.any():
        factors = torch.where(full, projection, factors)
    return factors


def _special(
    problem: Problem, piece: Piece, steps: Tensor, debias: float, anchored: bool
) -> Tensor | None:
    """Millions of groups in one segment, or many segments of a few, in their own way; else None."""
    plain = problem.weights is None and problem.costs is None
    if not plain or problem.norms.device.type != "cpu" or piece.positions is not None:
        return None
    k, step = float(piece.column(problem.budgets)[0]), float(steps[0])
    alike = piece.contests or (problem.budgets.stride(0) == 0 and steps.stride(0) == 0)
    inside = step > 0 and debias * step < 1 - FULL_STEP_SLACK
    norms = piece.matrix(problem.norms)
    if piece.rows == 1 and piece.width >= LARGE:
        _check_debiased_step(steps, debias)
        return millions.multipliers(norms[0], step, k, debias=debias, anchored=anchored).view(1, -1)
    if (
        piece.rows >= few.MANY
        and alike
        and inside
        and piece.width <= few.LONGEST
        and k == int(k) < piece.width
    ):
        return few.multipliers(norms, step, int(k), debias=debias, anchored=anchored)
    return None


def _factors(shares: Tensor, thresholds: Tensor, debias: float) -> Tensor:
    """The factors u / ((1 - debias t) u + t), and 1 where t = 0."""
    # Written so that u = 1 at debias 1 gives exactly 1.
    factors = shares / (shares + thresholds * (1 - debias * shares))
    if thresholds.device.type == "cpu" and bool((thresholds > 0).all()):
        return factors
    return torch.where(thresholds > 0, factors, 1)


def _anchored(competition: Competition, factors: Tensor) -> Tensor:
    """Divide by the factor of the last group within the budget and cut at 1."""
    last = competition.last_within_budget()
    anchor = torch.where(last >= 0, factors.gather(1, last.clamp(min=0)), 1)
    # Where nothing is kept, or the exact prox kills the last one, the others stay as they are.
    anchored = (factors / torch.where(anchor > 0, anchor, 1)).clamp_(max=1)
    if competition.weights is None:  # factors rise with strength: what is kept is at 1 already
        return anchored
    return torch.where(competition.within_budget()[0], 1, anchored)


def _check_debiased_step(thresholds: Tensor, debias: float) -> None:
    if thresholds.device.type == "cpu" and debias > 0:
        worst = debias * thresholds.max().item()
        if worst > 1 + FULL_STEP_SLACK:
            raise ValueError(
                f"debias * step * weights must not exceed 1 (the exact projection), got {worst:g}; "
                "take a smaller step or a smaller debias"
            )

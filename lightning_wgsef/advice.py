"""Warnings about the way to a budget, with what to try instead."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral

from lightning_wgsef.penalties import Envelope, Penalty
from lightning_wgsef.schedules import Homotopy, Schedule

_FEWEST = 4
"""Steps of a way that can be called one."""


def warn_of_cut(cut: Mapping[str, int], taken: int, penalty: Penalty, schedule: Schedule) -> None:
    """Say how many groups of every layer were cut to keep the budget, if any."""
    if any(cut.values()):
        homotopy = _with_budget(penalty, ", lam=Homotopy(), which arrives without a jump,")
        warnings.warn(
            f"lam = {schedule} had not reached the budget by step {taken}, three quarters of "
            f"training: the weakest groups were cut to keep it {dict(cut)}. Try a larger lam"
            f"{homotopy} or an earlier freeze=",
            stacklevel=3,
        )


def warn_of_short_way(schedule: Schedule, total: int | None) -> None:
    """Say that a homotopy has so few steps that it cuts the groups."""
    if not isinstance(schedule, Homotopy) or schedule.start == 1:
        return  # nothing that promises a way
    if isinstance(schedule.length, Integral):
        return  # whoever counts steps knows how many there are
    steps = schedule.steps(total)
    if steps < _FEWEST:
        warnings.warn(
            f"{schedule} has {steps} of {total} steps to reach the budget: groups are cut, not "
            "faded out. Train longer, with smaller batches, or with a larger length=",
            stacklevel=3,
        )


def warn_of_collapse(names: Sequence[str], penalty: Penalty, schedule: Schedule) -> None:
    """Say which layers fade as a whole."""
    others = _with_budget(penalty, ", debias=1.0 or lam=Homotopy()")
    warnings.warn(
        f"all groups of {', '.join(names)} have faded to less than a thousandth of their norm at "
        f"the start under lam = {schedule}: nothing holds them up against the penalty (common "
        f"behind a norm). Try a smaller lam{others}",
        stacklevel=3,
    )


def warn_of_other_budget(asked: float, saved: float) -> None:
    """Say that a run that is resumed keeps the budgets that it had."""
    warnings.warn(
        f"k stands for {asked:g} groups now, but the saved run goes on with its own {saved:g}. For "
        "another k start a new fit from the checkpoint's weights, without ckpt_path",
        stacklevel=3,
    )


def _with_budget(penalty: Penalty, advice: str) -> str:
    """Advice that the group lasso, which knows no budget, cannot follow."""
    return advice if isinstance(penalty, Envelope) else ""

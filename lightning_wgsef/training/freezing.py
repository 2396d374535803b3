"""Freeze rule: the mask is fixed at a step, at a share of training, or once it has converged."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real

import torch
from torch import Tensor

from lightning_wgsef.training.half_space import HalfSpace
from lightning_wgsef.training.schedules import (
    CubicRamp,
    Homotopy,
    Schedule,
    check_length,
    in_steps,
)

# Converged: for so many checks in a row the same groups were alive, with a sparsity gap of at most
# this share of the value in every layer.
PATIENCE = 4
TOLERANCE = 1e-6

# Share of training at which a mask that has not converged is fixed: the budget is a promise.
LATEST = 0.75


class FreezeRule:
    """Rule by which the mask of the groups of one optimizer is fixed.

    Args:
        freeze: "converged", a number of steps (int), a share of training (float), or None (never).
            "converged" is the last step of a homotopy; with other schedules it is when the live
            groups no longer change within the budget, at three quarters of training at the latest.
        schedule: step sizes over training.
        total_steps: how many steps training lasts, if known.

    Attributes:
        waits: can `update` find that the mask has converged?
        unchanged: for how many checks in a row the live groups have been the same.
        alive: the live groups of the last check, shape (m,).

    >>> from lightning_wgsef.training.schedules import Constant
    >>> rule = FreezeRule("converged", Constant(0.1), total_steps=400)
    >>> [rule.due(taken) for taken in (298, 299)]
    [False, True]
    >>> alive, within = torch.tensor([True, False]), torch.tensor([0.0])
    >>> [rule.update(alive, within, torch.tensor([1.0])) for _ in range(5)]
    [False, False, False, False, True]
    """

    def __init__(
        self, freeze: str | int | float | None, schedule: Schedule, total_steps: int | None
    ) -> None:
        self.freeze = freeze
        self.schedule = schedule
        self.total_steps = total_steps
        self.waits = freeze == "converged" and not schedule.homotopy
        self.unchanged = 0
        self.alive: Tensor | None = None

    @property
    def step(self) -> int | None:
        """Step with which the mask is fixed at the latest; None where no step is known.

        Raises:
            ValueError: a share of training of unknown length.
        """
        if self.freeze is None or (self.waits and self.total_steps is None):
            return None
        if self.waits:
            return in_steps("freeze", LATEST, self.total_steps)
        if isinstance(self.freeze, str):
            return self.schedule.steps(self.total_steps)
        return in_steps("freeze", self.freeze, self.total_steps)

    def due(self, taken: int) -> bool:
        """Return whether the step that follows ``taken`` steps fixes the mask."""
        step = self.step
        return step is not None and taken + 1 >= step

    def update(self, alive: Tensor, gap: Tensor, value: Tensor) -> bool:
        """Record live groups, shape (m,), gap and value, shape (S,); return: converged?"""
        settled = bool((gap <= TOLERANCE * value).all())
        same = self.alive is not None and torch.equal(alive, self.alive)
        self.unchanged = self.unchanged + 1 if settled and same else 0
        self.alive = alive
        return self.unchanged >= PATIENCE


def check_freeze(freeze: object) -> None:
    """Raise `ValueError` unless ``freeze`` is "converged", steps, a share of training, or None."""
    if isinstance(freeze, Real) and not isinstance(freeze, bool):
        check_length("freeze", freeze)
    elif freeze is not None and freeze != "converged":
        raise ValueError(
            "freeze must be 'converged', a number of steps (int), a share of training (float in "
            f"(0, 1]) or None, got {freeze!r}"
        )


def check_order(
    freeze: str | int | float | None,
    schedule: Schedule,
    ramp: CubicRamp | None,
    half_space: HalfSpace | None,
    total_steps: int | None = None,
) -> None:
    """Raise `ValueError` where the mask would be fixed before what leads up to it has ended.

    Numbers of steps can be compared with shares of training once ``total_steps`` is known.

    >>> check_order(0.2, Homotopy(length=0.5), None, None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: freeze=0.2 fixes the mask before Homotopy(length=0.5) has ended: groups would be...
    """
    if freeze is None:
        return
    end = freeze
    named = f"freeze={freeze}"
    if freeze == "converged" and isinstance(schedule, Homotopy):
        end, named = schedule.end, f"the end of Homotopy(length={schedule.end})"
    if isinstance(end, str):
        return
    for way in (schedule, ramp):
        length = way.end if isinstance(way, Homotopy) else getattr(way, "length", None)
        name = f"{type(way).__name__}(length={length})"
        if length is not None and _after(length, end, total_steps):
            raise ValueError(
                f"{named} fixes the mask before {name} has ended: groups would be cut in the "
                f"middle of the way. Leave one of the two out, or take freeze >= {length}"
            )
    start = None if half_space is None else half_space.start
    if start is not None and not _after(end, start, total_steps, unknown=True):
        raise ValueError(
            f"{named} fixes the mask before half_space=HalfSpace(start={start}) begins: "
            f"it would never act. Take start < {end}"
        )


def _after(one: int | float, other: int | float, total: int | None, unknown: bool = False) -> bool:
    """Return whether ``one`` is later than ``other``; ``unknown`` where that cannot be said yet."""
    if isinstance(one, Integral) != isinstance(other, Integral):
        if total is None:
            return unknown
        return in_steps("length", one, total) > in_steps("length", other, total)
    return one > other


def warn_of_late_freeze(rule: FreezeRule, total: int | None) -> None:
    """Say at the start that training of ``total`` steps ends before the mask is to be fixed."""
    step = rule.step
    if step is None or total is None or step <= total:
        return
    cause = str(rule.schedule) if rule.freeze == "converged" else f"freeze={rule.freeze}"
    warnings.warn(
        f"{cause} fixes the mask at step {step}, but training ends at step {total} (max_epochs or "
        "max_steps of the Trainer): the budget will not be kept. Train longer, or name a share of "
        "training (float) instead of a number of steps",
        stacklevel=3,
    )


def forecast(rule: FreezeRule, taken: int, dead: int, over: int, epoch: int | None = None) -> str:
    """Say whether the budget will be reached, and when the mask will be fixed.

    A homotopy ends at its budget. With other schedules groups are taken to die on at the rate of
    the steps so far.

    Args:
        rule: by which the mask is fixed.
        taken: steps so far.
        dead: how many groups have died.
        over: how many that live would be cut if the mask were fixed now.
        epoch: how many steps an epoch has, if known; epochs count from 0, as Lightning's.

    >>> forecast(FreezeRule("converged", Homotopy(), total_steps=400), 40, 0, 30, epoch=100)
    'the budget will be reached at step 200 (epoch 1) of 400, the mask fixed then'
    >>> from lightning_wgsef.training.schedules import Constant
    >>> rule = FreezeRule("converged", Constant(0.1), total_steps=400)
    >>> print(forecast(rule, taken=40, dead=3, over=30))
    the budget will not be reached: at the rate so far (3 groups in 40 steps) 11 groups will have \
to be cut when the mask is fixed at step 300 of 400
    >>> print(forecast(rule, taken=40, dead=20, over=30))
    at the rate so far (20 groups in 40 steps) the budget will be reached at step 100 of 400; the \
mask will be fixed once nothing changes any more, at step 300 of 400 at the latest
    """

    def at(step: int) -> str:
        within = "" if epoch is None else f" (epoch {(step - 1) // epoch})"
        return f"step {step}{within}" + ("" if rule.total_steps is None else f" of {total}")

    total, step = rule.total_steps or math.inf, rule.step
    arrives = rule.schedule.steps(rule.total_steps) if rule.schedule.homotopy else None
    if step is None:
        fixed = "the mask will not be fixed (freeze=None)"
    elif step > total:
        return f"the mask will not be fixed: that is due at step {step}, training ends at {total}"
    elif rule.waits:
        fixed = f"the mask will be fixed once nothing changes any more, at {at(step)} at the latest"
    else:
        fixed = f"the mask will be fixed at {at(step)}"
    if arrives is not None and arrives > total:
        return f"the budget will not be reached: that takes {arrives} steps; {fixed}"
    if arrives is not None:
        then = "the mask fixed then" if arrives == step else fixed
        return f"the budget will be reached at {at(arrives)}, {then}"
    if not over:
        return f"the budget is kept already; {fixed}"
    rate = f"at the rate so far ({dead} groups in {taken} steps)"
    reached = taken + math.ceil(over * taken / dead) if dead else math.inf
    if reached <= min(total, math.inf if step is None else step):
        return f"{rate} the budget will be reached at {at(int(reached))}; {fixed}"
    if step is None:
        return f"the budget will not be reached: {rate} too few die; {fixed}"
    left = over - dead * (step - taken) // taken
    return (
        f"the budget will not be reached: {rate} {left} groups will have to be cut when the mask "
        f"is fixed at {at(step)}"
    )

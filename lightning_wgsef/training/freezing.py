"""Freeze rule: the mask is fixed at a step, at a share of training, or once it has converged."""

from __future__ import annotations

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
    if half_space is not None and not _after(end, half_space.start, total_steps, unknown=True):
        raise ValueError(
            f"{named} fixes the mask before half_space=HalfSpace(start={half_space.start}) begins: "
            f"it would never act. Take start < {end}"
        )


def _after(one: int | float, other: int | float, total: int | None, unknown: bool = False) -> bool:
    """Return whether ``one`` is later than ``other``; ``unknown`` where that cannot be said yet."""
    if isinstance(one, Integral) != isinstance(other, Integral):
        if total is None:
            return unknown
        return in_steps("length", one, total) > in_steps("length", other, total)
    return one > other

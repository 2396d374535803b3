r"""Schedules of the proximal step size, and of the budget.

A schedule turns the number of steps already taken into the step size :math:`\tau` of the next
proximal step. `Constant` and `Warmup` follow the paper, :math:`\tau = \text{learning rate} \times
\lambda`; `Homotopy` drives :math:`\tau` itself from nearly 0 to 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar, Protocol

from torch import Tensor

from lightning_wgsef.utils.validation import check_count_or_share, check_number


class Schedule(Protocol):
    """Step sizes over training."""

    debias: ClassVar[float]
    """The default debias of the step, see `prox_multipliers`."""
    homotopy: ClassVar[bool]
    """True: the step is anchored and measured in the metric of the weights, and the mask freezes
    at the last step."""

    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        """Return the step size after ``taken`` of ``total`` steps at learning rate ``lr``."""

    def steps(self, total: int | None) -> int:
        """Return the number of steps until the schedule has reached its last value."""


@dataclass(frozen=True)
class Constant:
    r"""Schedule of the paper, :math:`\tau = \mathrm{lr} \cdot \lambda` at every step.

    Raises:
        ValueError: lam is negative or not finite.

    >>> Constant(0.5).step_size(taken=7, total=None, lr=0.1)
    0.05
    """

    lam: float
    debias: ClassVar[float] = 0.0
    homotopy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("lam", self.lam)

    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        """Return the step size, see `Schedule`."""
        return lr * self.lam

    def steps(self, total: int | None) -> int:
        """Return the number of steps, see `Schedule`."""
        return 0


@dataclass(frozen=True)
class Warmup:
    r"""Schedule like `Constant`, with :math:`\lambda` rising linearly from 0 over ``length``.

    Args:
        lam: the value reached.
        length: steps (int), or a share of training (float in (0, 1]).

    Raises:
        ValueError: an argument out of its range.

    >>> [Warmup(1.0, length=4).step_size(i, None, lr=1.0) for i in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    lam: float
    length: int | float = 0.1
    debias: ClassVar[float] = 0.0
    homotopy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("lam", self.lam)
        check_length("length", self.length)

    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        """Return the step size, see `Schedule`."""
        return lr * (self.lam * min(1.0, (taken + 1) / self.steps(total)))

    def steps(self, total: int | None) -> int:
        """Return the number of steps, see `Schedule`."""
        return in_steps("Warmup(length=...)", self.length, total)


@dataclass(frozen=True)
class Homotopy:
    r"""Schedule that raises :math:`\tau` geometrically from ``start`` to 1, the projection.

    Step i of n uses :math:`\tau = \mathrm{start}^{1 - i/n}`; the last one is the exact projection,
    after which the mask freezes. Nothing depends on the learning rate and nothing is tuned. With
    penalty weights :math:`w` the step is taken in their metric,
    :math:`\arg\min \tfrac12 \sum_j w_j \|\theta_j - v_j\|^2 + \tau R(\theta)`, so that it reaches
    the projection for all weights at once.

    Args:
        start: the step size that the ramp leaves from, in (0, 1].
        length: steps (int), or a share of training (float in (0, 1]); the rest of training
            fine-tunes the weights that stay.

    Raises:
        ValueError: an argument out of its range.

    >>> [round(Homotopy(1e-4, length=4).step_size(i, None, lr=0.1), 6) for i in range(5)]
    [0.001, 0.01, 0.1, 1.0, 1.0]
    """

    start: float = 1e-4
    length: int | float = 0.5
    debias: ClassVar[float] = 1.0
    homotopy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("start", self.start, highest=1.0, positive=True)
        check_length("length", self.length)

    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        """Return the step size, see `Schedule`."""
        steps = self.steps(total)
        return 1.0 if taken + 1 >= steps else float(self.start ** (1 - (taken + 1) / steps))

    def steps(self, total: int | None) -> int:
        """Return the number of steps, see `Schedule`."""
        return in_steps("Homotopy(length=...)", self.length, total)


@dataclass(frozen=True)
class CubicRamp:
    r"""Budget that falls to ``k`` as in gradual pruning (Zhu and Gupta 2017, equation 1).

    With :math:`C` what all groups cost, :math:`K(i) = k + (C - k) (1 - i/n)^3` after i of n steps.
    It goes where k goes: ``WGSEF(model, k=CubicRamp(0.25), ...)``. With ``lam=Homotopy(start=1)``,
    whose every step is the projection, this is gradual magnitude pruning.

    Args:
        k: the budget in the end, in any form that is accepted without a ramp.
        length: steps (int), or a share of training (float in (0, 1]).

    Raises:
        ValueError: ``length`` out of its range.

    >>> [float(CubicRamp(2, length=4).left(i, None)) for i in range(5)]
    [0.421875, 0.125, 0.015625, 0.0, 0.0]
    """

    k: int | float | Mapping[str, int | float] = 0.5
    length: int | float = 0.5

    def __post_init__(self) -> None:
        check_length("length", self.length)

    def left(self, taken: int, total: int | None) -> float:
        """Return the share of what is to be pruned that step ``taken`` leaves."""
        steps = in_steps("CubicRamp(length=...)", self.length, total)
        return float((1 - min(1.0, (taken + 1) / steps)) ** 3)


def as_schedule(lam: float | Schedule | None) -> Schedule:
    """Return ``lam`` as a schedule: a number is the paper's constant, None the default homotopy.

    Raises:
        ValueError: a number that is negative or not finite, or something else.

    >>> as_schedule(0.1)
    Constant(lam=0.1)
    """
    if lam is None:
        return Homotopy()
    if isinstance(lam, (int, float, Real)):
        check_number("lam", lam)
        return Constant(float(lam))
    if isinstance(lam, type) or not hasattr(lam, "step_size"):
        raise ValueError(f"lam must be a number or a schedule such as Homotopy(), got {lam!r}")
    return lam


def resolve_debias(debias: float | None, schedule: Schedule) -> float:
    """Return ``debias``, or the schedule's own.

    Raises:
        ValueError: it is not in [0, 1], or does not fit the schedule.
    """
    if debias is None:
        return schedule.debias
    check_number("debias", debias, highest=1.0)
    if schedule.homotopy and debias != 1:
        raise ValueError(
            f"debias must be 1 (or None) with {schedule}, which ends with exactly the groups of "
            f"a budget, got {debias!r}"
        )
    return debias


def check_length(name: str, length: object) -> None:
    """Raise `ValueError` unless ``length`` is a number of steps or a share of training.

    >>> check_length("length", 1.5)
    Traceback (most recent call last):
    ...
    ValueError: length must be a number of steps (int >= 1) or a share (float in (0, 1]), got 1.5
    """
    check_count_or_share(name, length, "steps")


def in_steps(name: str, length: int | float, total: int | None) -> int:
    """Return ``length`` in steps.

    Raises:
        ValueError: a share of a training run whose end is not known.
    """
    if isinstance(length, Integral):
        return int(length)
    if total is None:
        raise ValueError(
            f"{name} = {length} is a share of training, but how long training lasts is not known: "
            "give a number of steps (int), or say how long training lasts (max_epochs or max_steps "
            "of the Trainer; total_steps in a plain loop)"
        )
    return max(1, math.floor(length * total + 0.5))


# Steps below which a homotopy cuts groups rather than fades them out.
_FEWEST = 4


def warn_of_short_way(schedule: Schedule, total: int | None) -> None:
    """Warn of a homotopy of so few steps that it cuts the groups."""
    if not isinstance(schedule, Homotopy) or schedule.start == 1:
        return  # no homotopy, or the projection from the first step
    if isinstance(schedule.length, Integral):
        return  # whoever counts steps knows how many there are
    steps = schedule.steps(total)
    if steps < _FEWEST:
        warnings.warn(
            f"{schedule} has {steps} of {total} steps to reach the budget: groups are cut, not "
            "faded out. Train longer, with smaller batches, or with a larger length=",
            stacklevel=3,
        )

r"""Schedules of the proximal step: its size, and the budget on the way to the one that was named.

A schedule turns the number of steps already taken into the step size :math:`\tau` of the next
proximal step. `Constant` and `Warmup` follow the paper, :math:`\tau = \text{learning rate} \times
\lambda`; `Homotopy` starts there, raises :math:`\tau` to 1, the projection, and lets the
budget fall on the way.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import ClassVar

from torch import Tensor

from lightning_wgsef.utils.validation import check_count_or_share, check_number


class Schedule(ABC):
    """Base class of schedules: what the regularizer asks of one.

    Attributes:
        debias: the default debias of the step, see `prox_multipliers`.
        homotopy: True: the step is anchored and measured in the metric of the weights, and the mask
            freezes at the last step.
    """

    debias: ClassVar[float] = 0.0
    homotopy: ClassVar[bool] = False

    @abstractmethod
    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        """Return the step size after ``taken`` of ``total`` steps at learning rate ``lr``."""

    def steps(self, total: int | None) -> int:
        """Return the number of steps until the schedule has reached its last value."""
        return 0

    def left(self, taken: int, total: int | None) -> float:
        """Return the share of what is to be pruned that the step after ``taken`` leaves alive."""
        return 0.0


@dataclass(frozen=True)
class Constant(Schedule):
    r"""Schedule of the paper, :math:`\tau = \mathrm{lr} \cdot \lambda` at every step.

    Whether and when the budget is reached depends on :math:`\lambda`, on the network and on the
    optimizer; what is too much when the mask is fixed is cut. The paper tunes :math:`\lambda` and
    trains for hundreds of epochs. A plain number for ``lam`` arrives by itself, see `Homotopy`.

    Raises:
        ValueError: lam is negative or not finite.

    >>> Constant(0.5).step_size(taken=7, total=None, lr=0.1)
    0.05
    """

    lam: float

    def __post_init__(self) -> None:
        check_number("lam", self.lam)

    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        """Return the step size, see `Schedule`."""
        return lr * self.lam


@dataclass(frozen=True)
class Warmup(Schedule):
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
class Homotopy(Schedule):
    r"""Schedule that raises :math:`\tau` to 1 while the budget falls, from all groups to k.

    Two things move together over the n steps of the ramp, t from 0 to 1. The step size rises
    geometrically,

    .. math:: \tau(t) = \tau_0^{\,1-t},

    so that what has lost fades ever faster, and the last step is the exact projection, after which
    the mask freezes. The budget falls as in gradual pruning (Zhu and Gupta, 2017),

    .. math:: K(t) = k + (C - k) \max(0, 1 - t / 0.9)^3

    with C what all groups cost, so that groups leave one after another, the weakest first; the last
    tenth, at the budget itself, lets them die out. Nothing is tuned:

    - ``lam=None``: :math:`\tau_0 = 10/n`, at which a group that has lost is gone in about a tenth
      of the ramp, however long that is.
    - ``lam``: :math:`\tau_0 = \mathrm{lr} \cdot \lambda`, the paper's step at the start. A larger
      :math:`\lambda` makes groups compete earlier and harder. Where it is below 10/n, :math:`\tau`
      makes up for it, in a straight line, in the first fiftieth of the ramp: a small
      :math:`\lambda` arrives, too, and chooses the same groups.
    - ``start``: :math:`\tau_0` itself; with 1 every step is the projection, which is gradual
      magnitude pruning.

    With penalty weights :math:`w` the step is taken in their metric,
    :math:`\arg\min \tfrac12 \sum_j w_j \|\theta_j - v_j\|^2 + \tau R(\theta)`, so that it reaches
    the projection for all weights at once.

    Args:
        start: :math:`\tau_0`, in (0, 1]; None: by ``lam``, or by the length of the ramp.
        length: steps (int), or a share of training (float in (0, 1]); the rest of training
            fine-tunes the weights that stay. None: up to ``freeze`` where that is a number, else
            0.5.
        lam: the paper's :math:`\lambda` at the start, instead of ``start``.

    Raises:
        ValueError: an argument out of its range, or both ``lam`` and ``start``.

    >>> [round(Homotopy(length=40).step_size(i, None, lr=0.1), 3) for i in (-1, 9, 19, 29, 39)]
    [0.25, 0.354, 0.5, 0.707, 1.0]
    >>> [round(Homotopy(lam=1, length=200).step_size(i, None, lr=1e-3), 3) for i in (-1, 1, 3, 199)]
    [0.001, 0.026, 0.053, 1.0]
    >>> [round(Homotopy(length=40).left(i, None), 2) for i in (-1, 9, 19, 29, 39)]
    [1.0, 0.38, 0.09, 0.0, 0.0]
    """

    start: float | None = None
    length: int | float | None = None
    lam: float | None = None
    debias: ClassVar[float] = 1.0
    homotopy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.lam is not None:
            check_number("lam", self.lam)
        if self.start is not None:
            check_number("start", self.start, highest=1.0, positive=True)
        if self.lam is not None and self.start is not None:
            raise ValueError(
                f"lam and start both say where the ramp begins, got {self.lam} and {self.start}: "
                "leave one of them out"
            )
        if self.length is not None:
            check_length("length", self.length)

    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        """Return the step size, see `Schedule`."""
        steps = self.steps(total)
        left = 1 - (taken + 1) / steps
        if left <= 0:
            return 1.0
        natural = min(1.0, _FADES / steps)
        if self.start is not None or self.lam is None:
            return float((natural if self.start is None else self.start) ** left)
        caught_up = min(1.0, (1 - left) / _CATCHES_UP)
        if isinstance(lr, Tensor):
            ratio = (lr.double() * (self.lam / natural)).clamp(max=1 / natural)
            low = ratio.clamp(max=1)
            return (natural * ratio.clamp(min=1)) ** left * (low + (1 - low) * caught_up)
        share = min(lr * self.lam / natural, 1 / natural)
        behind = 1 - min(share, 1.0)
        return float((natural * max(share, 1.0)) ** left * (1 - behind * (1 - caught_up)))

    def steps(self, total: int | None) -> int:
        """Return the number of steps, see `Schedule`."""
        return in_steps("Homotopy(length=...)", self.end, total)

    @property
    def end(self) -> int | float:
        """Where the ramp ends: steps (int), or a share of training."""
        return _HALF if self.length is None else self.length

    def left(self, taken: int, total: int | None) -> float:
        """Return the share that is left, see `Schedule`."""
        return float(max(0.0, 1 - (taken + 1) / (_ARRIVES * self.steps(total))) ** 3)


# Of a homotopy: steps times step size at which losers fade in about a tenth of the ramp; the shares
# of the ramp in which a small lam catches up, and after which the budget is the one that was named;
# where a ramp without a length ends.
_FADES = 10.0
_CATCHES_UP = 0.02
_ARRIVES = 0.9
_HALF = 0.5


@dataclass(frozen=True)
class CubicRamp:
    r"""A budget that falls to ``k`` as in gradual pruning (Zhu and Gupta 2017, equation 1).

    With :math:`C` what all groups cost, :math:`K(i) = k + (C - k) (1 - i/n)^3` after i of n steps.
    It goes where k goes: ``WGSEF(model, k=CubicRamp(0.25), lam=Constant(0.1), ...)``, and takes the
    place of the fall that a `Homotopy` has itself. With ``lam=Homotopy(start=1)``, whose every step
    is the projection, this is gradual magnitude pruning.

    Args:
        k: the budget in the end, in any form that is accepted without a ramp.
        length: steps (int), or a share of training (float in (0, 1]).

    Raises:
        ValueError: ``length`` out of its range.

    >>> [float(CubicRamp(2, length=4).left(i, None)) for i in range(5)]
    [0.421875, 0.125, 0.015625, 0.0, 0.0]
    """

    k: int | float | str | Mapping[str, int | float] = 0.5
    length: int | float = 0.5

    def __post_init__(self) -> None:
        check_length("length", self.length)

    def left(self, taken: int, total: int | None) -> float:
        """The share of what is to be pruned that step ``taken`` leaves."""
        steps = in_steps("CubicRamp(length=...)", self.length, total)
        return float((1 - min(1.0, (taken + 1) / steps)) ** 3)


def as_schedule(
    lam: float | Schedule | None,
    freeze: str | int | float | None = "converged",
    has_budget: bool = True,
) -> Schedule:
    """Make a schedule of ``lam``: a number is where a `Homotopy` starts, None its own choice.

    A homotopy without a length ends where the mask is to be fixed. With a penalty that has no
    budget a number is `Constant`: there is nowhere to arrive.

    Raises:
        ValueError: a number that is negative or not finite, or something else.

    >>> as_schedule(0.1)
    Homotopy(start=None, length=None, lam=0.1)
    >>> as_schedule(None, freeze=0.3).length
    0.3
    """
    if lam is None:
        lam = Homotopy()
    elif isinstance(lam, (int, float, Real)):
        check_number("lam", lam)
        lam = Homotopy(lam=float(lam)) if has_budget else Constant(float(lam))
    if not isinstance(lam, Schedule):
        raise ValueError(
            "lam must be a number, None, or a schedule such as Homotopy() or Constant(0.01), got "
            f"{lam!r}"
        )
    if isinstance(freeze, (int, float)) and isinstance(lam, Homotopy) and lam.length is None:
        return replace(lam, length=freeze)
    return lam


def resolve_debias(debias: float | None, schedule: Schedule) -> float:
    """``debias``, or the schedule's own; `ValueError` if it is not in [0, 1] or does not fit."""
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
    """``length`` in steps.

    Raises:
        ValueError: a share of a training run whose end is not known.
    """
    if isinstance(length, Integral):
        return int(length)
    if total is None:
        raise ValueError(
            f"{name} = {length} is a share of training, but how long training lasts is not known: "
            "give a number of steps (int), or say how long training lasts (max_steps of the "
            "Trainer, or max_epochs with a loader that has a length; total_steps in a plain loop)"
        )
    return max(1, math.floor(length * total + 0.5))


_FEWEST = 4
"""Steps of a way that can be called one."""


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

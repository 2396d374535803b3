"""Schedules of the step size, and the numbers that say how long something lasts."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import raises_naming
from hypothesis import given
from hypothesis import strategies as st

from lightning_wgsef import Constant, Homotopy, Warmup
from lightning_wgsef.schedules import (
    as_schedule,
    check_freeze,
    check_length,
    in_steps,
    resolve_debias,
)

LENGTH = "must be a number of steps (int >= 1) or a share (float in (0, 1])"
BAD_LENGTHS = [0, -1, 0.0, -0.5, 1.5, 2.0, math.nan, math.inf, True, False, "10", None, [1]]
BAD_LAMS = [-1, -0.5, math.nan, math.inf, -math.inf, True, False]
lengths = st.integers(1, 500) | st.floats(1e-3, 1)

# --- Constant ----------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 10**6])
@pytest.mark.parametrize("total", [None, 5])
def test_constant(taken, total):
    assert Constant(0.5).step_size(taken, total, lr=0.1) == 0.1 * 0.5
    assert Constant(0.5).steps(total) == 0


def test_constant_takes_zero():
    assert Constant(0).step_size(3, None, lr=0.1) == 0


# --- Warmup ------------------------------------------------------------------------------------


def test_warmup_in_steps():
    schedule = Warmup(2.0, length=4)
    sizes = [schedule.step_size(taken, None, lr=0.5) for taken in range(7)]
    assert sizes == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert schedule.steps(None) == schedule.steps(100) == 4


def test_warmup_by_a_share():
    schedule = Warmup(2.0, length=0.25)
    assert schedule.steps(16) == 4
    assert [schedule.step_size(i, 16, lr=0.5) for i in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    with raises_naming("Warmup(length=...) = 0.25", "is not known", "max_epochs", "total_steps"):
        schedule.step_size(0, None, lr=0.5)


def test_warmup_defaults_to_a_tenth():
    assert Warmup(1.0).steps(1000) == 100


def test_a_warmup_of_one_step_is_constant():
    schedule = Warmup(0.3, length=1)
    assert [schedule.step_size(i, None, lr=0.1) for i in range(3)] == [0.1 * 0.3] * 3


@given(lam=st.floats(0, 1e3), length=lengths, total=st.integers(1, 1000))
def test_warmup_rises_to_the_constant(lam, length, total):
    schedule = Warmup(lam, length)
    sizes = [schedule.step_size(taken, total, lr=0.1) for taken in range(total + 1)]
    assert sizes == sorted(sizes)
    assert 0 <= sizes[0] <= sizes[-1] <= 0.1 * lam
    if total >= schedule.steps(total):
        assert sizes[-1] == Constant(lam).step_size(total, total, lr=0.1)


@pytest.mark.parametrize("schedule", [Constant(0.5), Warmup(0.5, length=4)])
def test_a_learning_rate_may_be_a_tensor(schedule):
    """One for every layer, as an attachment gives it; the result stays on its device."""
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    sizes = schedule.step_size(1, None, lr=rates)
    wanted = [schedule.step_size(1, None, lr=rate) for rate in rates.tolist()]
    assert isinstance(sizes, torch.Tensor)
    assert sizes.tolist() == pytest.approx(wanted, rel=1e-15)
    assert rates.tolist() == [0.1, 0.2]


# --- Homotopy ----------------------------------------------------------------------------------


def test_homotopy_is_geometric():
    schedule = Homotopy(1e-4, length=4)
    sizes = [schedule.step_size(taken, None, lr=0.1) for taken in range(6)]
    assert sizes == pytest.approx([1e-3, 1e-2, 1e-1, 1, 1, 1], rel=1e-12)
    assert sizes[3:] == [1, 1, 1]  # exactly: this is the projection


def test_homotopy_defaults_to_half_of_training():
    schedule = Homotopy()
    assert schedule.steps(1000) == 500
    assert schedule.step_size(498, 1000, lr=0.1) < 1
    assert schedule.step_size(499, 1000, lr=0.1) == 1
    with raises_naming("Homotopy(length=...) = 0.5", "is not known"):
        schedule.step_size(0, None, lr=0.1)


def test_homotopy_does_not_look_at_the_learning_rate():
    schedule = Homotopy(length=10)
    sizes = {schedule.step_size(3, None, lr=lr) for lr in (0.0, 0.1, torch.tensor(5.0))}
    assert len(sizes) == 1
    assert isinstance(sizes.pop(), float)


@given(start=st.floats(1e-12, 1), length=lengths, total=st.integers(1, 1000))
def test_homotopy_rises_to_one(start, length, total):
    schedule = Homotopy(start, length)
    steps = schedule.steps(total)
    sizes = [schedule.step_size(taken, total, lr=0.1) for taken in range(steps + 2)]
    assert sizes == sorted(sizes)
    assert min(start, 1) <= sizes[0]
    assert sizes[steps - 1 :] == [1, 1, 1]
    ratios = np.diff(np.log(sizes[:steps]))
    assert np.allclose(ratios, -math.log(start) / steps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [1, 1.0, 1e-300])
def test_homotopy_at_the_ends_of_its_range(start):
    sizes = [Homotopy(start, length=2).step_size(taken, None, lr=0.1) for taken in range(2)]
    assert sizes == pytest.approx([math.sqrt(start), 1])


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("lam", BAD_LAMS)
@pytest.mark.parametrize("make", [Constant, Warmup, as_schedule])
def test_bad_lam(make, lam):
    with raises_naming("lam must be a finite number, at least 0", f"got {lam!r}"):
        make(lam)


@pytest.mark.parametrize("start", [0, 0.0, -0.1, 1.5, 2, math.nan, math.inf, True, "1", None])
def test_bad_start(start):
    with raises_naming("start must be a finite number, positive and at most 1", f"got {start!r}"):
        Homotopy(start)


@pytest.mark.parametrize("length", BAD_LENGTHS, ids=repr)
def test_bad_lengths(length):
    with raises_naming(f"length {LENGTH}", f"got {length!r}"):
        Warmup(1.0, length)
    with raises_naming(f"length {LENGTH}", f"got {length!r}"):
        Homotopy(length=length)
    with raises_naming(f"patience {LENGTH}", f"got {length!r}"):
        check_length("patience", length)


@pytest.mark.parametrize("length", [1, 10**9, 1e-9, 0.5, 1.0, np.float64(0.5)])
def test_good_lengths(length):
    assert check_length("length", length) is None


@pytest.mark.parametrize("schedule", [Constant(0.1), Warmup(0.1), Homotopy()])
def test_schedules_do_not_change(schedule):
    name = dataclasses.fields(schedule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, name, 0.5)
    assert dataclasses.replace(schedule) == schedule


# --- the arguments of the regularizer ----------------------------------------------------------


def test_as_schedule():
    assert as_schedule(None) == Homotopy()
    assert as_schedule(0) == Constant(0)
    assert as_schedule(0.3) == Constant(0.3)
    assert as_schedule(np.float64(0.3)) == Constant(0.3)
    assert as_schedule(np.float32(0.5)) == as_schedule(Fraction(1, 2)) == Constant(0.5)
    for schedule in (Constant(1.0), Warmup(0.1), Homotopy(length=7)):
        assert as_schedule(schedule) is schedule


def test_a_schedule_of_ones_own():
    class Mine:
        debias = 0.0
        homotopy = False

        def step_size(self, taken, total, lr):
            return 0.1

        def steps(self, total):
            return 0

    mine = Mine()
    assert as_schedule(mine) is mine


@pytest.mark.parametrize(
    "lam", ["0.1", [0.1], {}, object()], ids=["text", "list", "mapping", "object"]
)
def test_what_is_no_schedule(lam):
    with raises_naming("lam must be a number or a schedule such as Homotopy()", f"got {lam!r}"):
        as_schedule(lam)


@pytest.mark.parametrize("lam", [Homotopy, Constant])
def test_a_schedule_without_its_parentheses(lam):
    with raises_naming("lam must be a number or a schedule such as Homotopy()", lam.__name__):
        as_schedule(lam)


@pytest.mark.parametrize("freeze", ["converged", None, 1, 100, 0.5, 1.0])
def test_good_freeze(freeze):
    assert check_freeze(freeze) is None


@pytest.mark.parametrize("freeze", [0, -1, 0.0, 1.5, math.nan, math.inf])
def test_freeze_out_of_range(freeze):
    with raises_naming(f"freeze {LENGTH}", f"got {freeze!r}"):
        check_freeze(freeze)


@pytest.mark.parametrize("freeze", ["convergence", "", True, False, [10], ("converged",)])
def test_what_is_no_freeze(freeze):
    with raises_naming("freeze must be 'converged'", "(int)", "None", f"got {freeze!r}"):
        check_freeze(freeze)


def test_debias_defaults_to_the_schedule():
    assert resolve_debias(None, Constant(0.1)) == 0
    assert resolve_debias(None, Warmup(0.1)) == 0
    assert resolve_debias(None, Homotopy()) == 1


@pytest.mark.parametrize("debias", [0, 0.0, 0.3, 1, 1.0])
def test_debias_is_kept(debias):
    assert resolve_debias(debias, Constant(0.1)) == debias
    assert resolve_debias(debias, Warmup(0.1)) == debias


@pytest.mark.parametrize("schedule", [Constant(0.1), Homotopy()])
@pytest.mark.parametrize("debias", [-0.1, 1.1, 2, math.nan, math.inf, True, "1"])
def test_bad_debias(debias, schedule):
    with raises_naming(
        "debias must be a finite number, at least 0 and at most 1", f"got {debias!r}"
    ):
        resolve_debias(debias, schedule)


@pytest.mark.parametrize("debias", [0, 0.0, 0.5, 0.999])
def test_a_homotopy_is_unbiased(debias):
    with raises_naming("debias must be 1 (or None)", "Homotopy(start=0.0001", f"got {debias!r}"):
        resolve_debias(debias, Homotopy())
    assert resolve_debias(1, Homotopy()) == 1


# --- lengths in steps --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "total", "steps"),
    [
        (7, None, 7),
        (7, 3, 7),  # a number of steps is not cut
        (0.5, 10, 5),
        (0.25, 10, 3),  # 2.5 rounds up
        (0.24, 10, 2),
        (0.01, 10, 1),  # at least one
        (1.0, 10, 10),
        (0.1, 1, 1),
    ],
)
def test_in_steps(length, total, steps):
    assert in_steps("length", length, total) == steps


@given(length=st.floats(1e-6, 1), total=st.integers(1, 10**9))
def test_a_share_stays_within_training(length, total):
    steps = in_steps("length", length, total)
    assert 1 <= steps <= total
    assert abs(steps - length * total) <= 0.5 or steps == 1


def test_a_share_of_an_unknown_length():
    with raises_naming(
        "freeze = 0.5", "share of training", "is not known", "max_epochs or max_steps"
    ):
        in_steps("freeze", 0.5, None)

"""A budget that falls with a cube: the formula, and gradual magnitude pruning."""

import dataclasses
import io
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.benchmark.baselines.classical import GradualMagnitude
from lightning_wgsef import (
    WGSEF,
    Constant,
    CubicRamp,
    HalfSpace,
    Homotopy,
    Warmup,
    WGSEFCallback,
)
from lightning_wgsef.training.freezing import check_freeze
from lightning_wgsef.training.schedules import (
    Schedule,
    as_schedule,
    check_length,
    in_steps,
    resolve_debias,
)
from tests.helpers.groups import batches, dense_network, raises_naming, train
from tests.helpers.networks.scope import CHANNELS, pictures
from tests.helpers.networks.scope import loader as random_pictures
from tests.helpers.trainers import loader, make_module, make_trainer

PROJECTING = {"lam": Homotopy(start=1.0, length=10)}


def ramp(least, total, taken, length):
    """Zhu and Gupta 2017, equation 1, in budgets: those after ``taken`` of ``length`` steps."""
    return least + (total - least) * (1 - min(1, taken / length)) ** 3


@pytest.mark.parametrize(
    ("k", "least"), [(2, [2, 2]), (0.5, [3, 3]), ({"2": 1, "3": 0.34}, [1, 2])]
)
@pytest.mark.parametrize("length", [10, 4, 0.5])
def test_groups_left_after_every_step(k, least, length):
    """As many as the budget has room for; a layer of 5 groups and one of 6."""
    model = dense_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    budget = CubicRamp(k, length)
    regularizer = WGSEF(model, budget, **PROJECTING, total_steps=20).attach(optimizer)
    (part,) = regularizer.pruners
    steps = length if isinstance(length, int) else 10
    for number, batch in enumerate(batches(12), start=1):
        budgets = [
            ramp(own, total, number, steps) for own, total in zip(least, (5, 6), strict=True)
        ]
        wanted = [math.floor(budget) for budget in budgets]
        assert part.budgets().tolist() == pytest.approx(budgets if number <= 11 else least)
        train(model, optimizer, [batch])
        alive = [int((model[i].weight.norm(dim=0) > 0).sum()) for i in (2, 3)]
        assert alive == wanted
        assert regularizer.frozen == (number >= 10)
    assert alive == least


@pytest.mark.parametrize("grouping", ["filter", "channel", "element"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_is_gradual_magnitude_pruning(grouping, optimizer):
    """Bit for bit: under a homotopy that starts at its end, every step is the projection."""
    networks = []
    for ours in (True, False):
        model = make_module(optimizer=optimizer)
        if ours:
            schedule = Homotopy(start=1.0, length=0.5)
            callback = WGSEFCallback(k=CubicRamp(0.25, 0.5), lam=schedule, grouping=grouping)
        else:
            callback = GradualMagnitude(length=0.5, k=0.25, grouping=grouping)
        make_trainer([callback]).fit(model, loader())
        networks.append(model)
        if ours:
            assert callback.regularizer.frozen
            for layer in callback.regularizer.groups.layers:
                left = int(callback.regularizer.masks[layer.name].sum())
                assert left == layer.budget == int(0.25 * layer.count + 0.5)
    first, second = (network.state_dict() for network in networks)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_costs(scope):
    """Budgets are not rounded then; what is left never costs more."""
    model = dense_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    own = torch.tensor([3.0, 1.0, 2.0, 4.0, 2.0]), torch.tensor([1.0, 2.5, 1.0, 3.0, 1.0, 1.5])
    more = {"costs": torch.cat(own), "scope": scope, **PROJECTING}
    regularizer = WGSEF(model, CubicRamp(0.5, length=10), **more).attach(optimizer)
    (part,) = regularizer.pruners
    totals = [12.0, 10.0] if scope == "layer" else [22.0]
    for number, batch in enumerate(batches(12), start=1):
        wanted = [ramp(total / 2, total, number, 10) for total in totals]
        assert part.budgets().tolist() == pytest.approx(wanted, rel=1e-12)
        train(model, optimizer, [batch])
        spent = [
            float(costs[model[i].weight.detach().norm(dim=0) > 0].sum())
            for i, costs in zip((2, 3), own, strict=True)
        ]
        spent = spent if scope == "layer" else [sum(spent)]
        for least, cost, budget in zip([4.0, 3.0], spent, wanted, strict=False):
            assert budget - least < cost <= budget + 1e-9
    assert regularizer.frozen


def test_flops_of_a_model_under_a_trainer():
    model = pictures()
    ramped = CubicRamp(0.5, length=0.5)
    schedule = Homotopy(start=1.0, length=0.5)
    callback = WGSEFCallback(k=ramped, lam=schedule, costs="flops", scope="global")
    make_trainer([callback]).fit(model, random_pictures())
    groups, masks = callback.regularizer.groups, callback.regularizer.masks
    alive = torch.cat(list(masks.values()))
    spent, dearest = float(groups.size.of(alive)), float(groups.size.costs(alive).max())
    assert float(groups.budgets) - dearest < spent <= float(groups.budgets)
    assert list(masks) == list(CHANNELS)


def test_with_a_constant_lam_the_mask_is_that_of_the_last_budget():
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    budget = CubicRamp(2, length=8)
    regularizer = WGSEF(model, budget, lam=Constant(20.0), freeze=12).attach(optimizer)
    (part,) = regularizer.pruners
    train(model, optimizer, batches(11))
    assert part.budgets().tolist() == [2, 2]
    train(model, optimizer, batches(12)[11:])
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [2, 2]
    assert regularizer.groups.budgets.tolist() == [2, 2]


def test_resume_goes_on_where_the_budget_was():
    def run(data, state=None):
        model = dense_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        regularizer = WGSEF(model, CubicRamp(2, length=10), **PROJECTING).attach(optimizer)
        if state is not None:
            model.load_state_dict(state[0])
            regularizer.load_state_dict(state[1])
        train(model, optimizer, data)
        return model, regularizer

    whole = run(batches(14))[0]
    half = run(batches(14)[:6])
    resumed, regularizer = run(batches(14)[6:], [part.state_dict() for part in half])
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert regularizer.frozen


@pytest.mark.parametrize("length", [0, -3, 1.5, 0.0, "x", True, None])
def test_lengths(length):
    with raises_naming("length must be a number of steps", repr(length)):
        CubicRamp(0.5, length=length)


@pytest.mark.parametrize(
    "make",
    [WGSEFCallback, lambda **more: WGSEF(dense_network(), **more)],
    ids=["callback", "plain"],
)
def test_budgets_that_are_none(make):
    for k in (0, 1.5, -2, "x", True, None):
        with raises_naming("k must be a number of groups", repr(k)):
            make(k=CubicRamp(k))
    with raises_naming("k is an empty mapping"):
        make(k=CubicRamp({}))
    with raises_naming("k['2'] must be a number of groups", "CubicRamp("):
        make(k={"2": CubicRamp(0.5)})
    with raises_naming("k must be one number with scope='global'"):
        make(k=CubicRamp({"2": 1}), scope="global")
    with raises_naming("k must be a number of groups", "CubicRamp"):
        make(k=CubicRamp)


def test_more_than_a_layer_has_and_shares_of_unknown_length():
    with raises_naming("k = 6", "5 groups of layer '2'"):
        WGSEF(dense_network(), CubicRamp(6))
    model = dense_network()
    regularizer = WGSEF(model, CubicRamp(2), lam=Constant(0.1), freeze=None)
    with raises_naming("CubicRamp(length=...) = 0.5 is a share of training"):
        regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1))


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
    """One for every layer, as a pruner gives it; the result stays on its device."""
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
    assert schedule.step_size(-1, 1000, lr=0.1) == 10 / 500
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


@given(lam=st.floats(0, 1e4), rate=st.floats(0, 1), length=lengths, total=st.integers(1, 10_000))
def test_a_number_starts_as_the_papers_step_and_arrives(lam, rate, length, total):
    """Whatever lam and the learning rate are: it rises, and from a fiftieth on no lam is behind."""
    schedule = as_schedule(lam)
    assert isinstance(schedule, Homotopy)
    schedule = dataclasses.replace(schedule, length=length)
    steps = schedule.steps(total)
    natural = Homotopy(length=length)
    sizes = [schedule.step_size(taken, total, lr=rate) for taken in range(-1, steps + 1)]
    assert sizes[0] == pytest.approx(min(rate * lam, 1), rel=1e-9, abs=1e-15)
    assert sizes[1] > 0  # lam = 0, or a learning rate that warms up from 0, is on the way, too
    assert np.all(np.diff(sizes) >= -1e-12)
    assert sizes[-2:] == [1, 1]
    for taken in range(math.ceil(0.02 * steps), steps):
        least = natural.step_size(taken, total, lr=rate)
        assert sizes[taken + 1] >= least * (1 - 1e-9)


def test_a_larger_lam_is_never_behind_a_smaller_one():
    curves = [
        [Homotopy(lam=lam, length=50).step_size(i, None, lr=0.1) for i in range(50)]
        for lam in (0, 1e-4, 1e-2, 1, 5, 1e3)
    ]
    for lower, higher in itertools.pairwise(curves):
        assert all(a <= b for a, b in zip(lower, higher, strict=True))
    assert curves[-1] == [1.0] * 50  # the projection from the first step


def test_a_learning_rate_for_every_layer():
    schedule = Homotopy(lam=2.0, length=20)
    rates = torch.tensor([1e-5, 0.1, 10.0], dtype=torch.float64)
    for taken in (0, 2, 9, 18, 19, 25):
        sizes = torch.as_tensor(schedule.step_size(taken, None, lr=rates)).expand(3)
        wanted = [schedule.step_size(taken, None, lr=rate) for rate in rates.tolist()]
        assert sizes.tolist() == pytest.approx(wanted, rel=1e-12)


def test_the_budget_falls_and_arrives_a_tenth_before_the_end():
    schedule = Homotopy(length=100)
    left = [schedule.left(taken, None) for taken in range(-1, 100)]
    wanted = [(1 - min(1, i / 90)) ** 3 for i in range(101)]
    assert left == pytest.approx(wanted, abs=1e-15)
    assert left[90:] == [0.0] * 11
    assert Constant(0.1).left(0, 100) == Warmup(0.1).left(5, 100) == 0


def test_a_start_and_a_lam():
    with raises_naming("lam", "start", "0.1", "0.5", "leave one of them out"):
        Homotopy(start=0.5, lam=0.1)


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


@pytest.mark.parametrize("start", [0, 0.0, -0.1, 1.5, 2, math.nan, math.inf, True, "1"])
def test_bad_start(start):
    with raises_naming("start must be a finite number, positive and at most 1", f"got {start!r}"):
        Homotopy(start)


@pytest.mark.parametrize("length", BAD_LENGTHS, ids=repr)
def test_bad_lengths(length):
    with raises_naming(f"length {LENGTH}", f"got {length!r}"):
        Warmup(1.0, length)
    if length is not None:
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
    assert as_schedule(0) == Homotopy(lam=0.0)
    assert as_schedule(0.3) == as_schedule(np.float64(0.3)) == Homotopy(lam=0.3)
    assert as_schedule(np.float32(0.5)) == as_schedule(Fraction(1, 2)) == Homotopy(lam=0.5)
    assert as_schedule(0.3, has_budget=False) == Constant(0.3)
    for schedule in (Constant(1.0), Warmup(0.1), Homotopy(length=7)):
        assert as_schedule(schedule) is schedule


@pytest.mark.parametrize("lam", [None, 0.1, Homotopy(1e-3)])
def test_a_homotopy_ends_where_the_mask_is_to_be_fixed(lam):
    assert as_schedule(lam).length is None
    assert as_schedule(lam, 0.2).length == 0.2
    assert as_schedule(lam, 30).length == 30
    assert as_schedule(lam, None).length is None
    assert as_schedule(Homotopy(length=7), 30).length == 7


HALF = HalfSpace(0.0, start=0.5)
CONTRADICTIONS = {
    "freeze inside the homotopy": ({"lam": Homotopy(length=0.5), "freeze": 0.2}, "freeze=0.2"),
    "in steps": ({"lam": Homotopy(length=50), "freeze": 20}, "Homotopy(length=50)"),
    "steps and a share": ({"lam": Homotopy(length=50), "freeze": 0.2}, "Homotopy(length=50)"),
    "inside the warm-up": ({"lam": Warmup(0.1, 0.4), "freeze": 0.2}, "Warmup(length=0.4)"),
    "inside the ramp": ({"k": CubicRamp(0.5, 0.6), "freeze": 0.5}, "CubicRamp(length=0.6)"),
    "homotopy inside the ramp": (
        {"k": CubicRamp(0.5, 0.6), "lam": Homotopy(length=0.3)},
        "the end of Homotopy(length=0.3)",
    ),
    "the default homotopy inside the ramp": (
        {"k": CubicRamp(0.5, 0.6)},
        "the end of Homotopy(length=0.5)",
    ),
    "constant inside the ramp": (
        {"k": CubicRamp(0.5, 60), "lam": Constant(0.1), "freeze": 0.5},
        "CubicRamp(length=60)",
    ),
    "half space after it": (
        {"lam": Constant(0.1), "freeze": 0.5, "half_space": HALF},
        "HalfSpace(start=0.5)",
    ),
    "half space after the homotopy": (
        {"lam": Homotopy(length=40), "half_space": HALF},
        "HalfSpace(start=0.5)",
    ),
}


@pytest.mark.parametrize("given", CONTRADICTIONS)
def test_what_contradicts_is_said_before_training(given):
    arguments, words = CONTRADICTIONS[given]
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with raises_naming(words):
        WGSEF(model, **arguments, total_steps=100).attach(optimizer)


def test_what_does_not_contradict_is_taken():
    model = dense_network()
    for more in (
        {"lam": Homotopy(length=0.3), "freeze": 0.5},
        {"lam": Homotopy(length=30), "freeze": 0.5},
        {"k": CubicRamp(0.5, 0.5)},
        {"k": CubicRamp(0.5, 5)},
        {"lam": Constant(0.1), "half_space": HALF, "freeze": 0.8},
        {"lam": 0.1, "freeze": 0.2},
        {"lam": 0.1, "freeze": None},
        {"half_space": 0.1},
        {"half_space": HalfSpace(), "freeze": 0.2},
        {"half_space": 0.1, "lam": Homotopy(length=1)},
        {"half_space": 0.1, "lam": Constant(0.1)},
        {"half_space": 0.1, "freeze": None},
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = WGSEF(model, **more, total_steps=100).attach(optimizer)
        assert not regularizer.frozen
        regularizer.detach()


def test_a_schedule_of_ones_own():
    class Mine(Schedule):
        def step_size(self, taken, total, lr):
            return 0.1

    mine = Mine()
    assert as_schedule(mine) is mine
    assert (mine.debias, mine.homotopy, mine.steps(10), mine.left(0, 10)) == (0, False, 0, 0)


@pytest.mark.parametrize(
    "lam", ["0.1", [0.1], {}, object()], ids=["text", "list", "mapping", "object"]
)
def test_what_is_no_schedule(lam):
    with raises_naming(
        "lam must be a number, None, or a schedule such as Homotopy()", f"got {lam!r}"
    ):
        as_schedule(lam)


@pytest.mark.parametrize("lam", [Homotopy, Constant])
def test_a_schedule_without_its_parentheses(lam):
    with raises_naming(
        "lam must be a number, None, or a schedule such as Homotopy()", lam.__name__
    ):
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
    with raises_naming("debias must be 1 (or None)", "Homotopy(start=None", f"got {debias!r}"):
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
        "freeze = 0.5",
        "share of training",
        "is not known",
        "max_steps of the Trainer, or max_epochs",
    ):
        in_steps("freeze", 0.5, None)


@pytest.mark.parametrize(
    ("more", "begins"),
    [
        ({}, 25),
        ({"freeze": 0.2}, 10),
        ({"lam": Homotopy(length=40)}, 20),
        ({"lam": Constant(0.1)}, 37),
        ({"freeze": None}, 50),
    ],
)
def test_a_half_space_begins_half_way_to_the_mask(more, begins):
    """The steps before it leave a group that turns round alone, those after it make it zero."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    )
    weight = model[0].weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    WGSEF(model, 1.0, grouping="filter", half_space=0.0, total_steps=100, **more).attach(optimizer)
    steps = 0
    while bool(weight.any()):
        optimizer.zero_grad()
        weight.square().sum().backward()  # w - 2 w: every group turns round
        optimizer.step()
        steps += 1
    assert steps == begins + 1


RAMPS = {
    "the default": {},
    "a small number": {"lam": 1e-4},
    "a large number": {"lam": 5.0},
    "a start": {"lam": Homotopy(start=1e-3, length=0.6)},
    "up to the freeze": {"lam": 1e-2, "freeze": 0.8},
    "a warm-up": {"lam": Warmup(0.5, 0.4)},
    "a budget alone": {"k": CubicRamp(2, 0.6), "lam": Constant(0.1), "freeze": 0.7},
    "projections": {"k": CubicRamp(2, 0.6), "lam": Homotopy(start=1, length=0.6)},
    "half space": {"half_space": 0.2},
    "one budget for all": {"scope": "global", "metric": "group"},
}


@pytest.mark.parametrize("stop", [3, 13])
@pytest.mark.parametrize("ramp", RAMPS)
def test_resume_in_the_middle_of_a_ramp_is_bit_identical(ramp, stop):
    """Under a learning rate that rises, with the statistics of a norm behind the filters."""
    data = batches(40)

    def run(data, *states):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 6, bias=False),
            torch.nn.BatchNorm1d(6),
            torch.nn.ReLU(),
            torch.nn.Linear(6, 2),
        ).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=20)
        arguments = {"k": 2, "grouping": "filter", "total_steps": 40, **RAMPS[ramp]}
        regularizer = WGSEF(model, **arguments).attach(optimizer)
        parts = (model, optimizer, rate, regularizer)
        for part, state in zip(parts, states, strict=False):
            part.load_state_dict(state)
        for batch in data:
            train(model, optimizer, [batch])
            rate.step()
        return parts

    whole = run(data)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run(data[:stop])], file)
    file.seek(0)
    resumed = run(data[stop:], *torch.load(file, weights_only=True))
    for name, values in whole[0].state_dict().items():
        assert torch.equal(values, resumed[0].state_dict()[name]), name
    assert whole[3].frozen
    assert resumed[3].frozen
    assert {name: int(x.sum()) for name, x in resumed[3].masks.items()} == {"0": 2}

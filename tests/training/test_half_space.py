"""The half-space step against its definition, and when it begins."""

import io

import pytest
import torch

from lightning_wgsef import (
    WGSEF,
    Constant,
    GroupLasso,
    HalfSpace,
    WGSEFCallback,
    group_parameters,
    prox_multipliers,
)
from lightning_wgsef.training.half_space import inside_half_space
from tests.helpers.groups import conv_network, dense_network, raises_naming
from tests.helpers.oracles.preconditioned_training import owners, same

LASSO = GroupLasso()


def push(model, number):
    """Gradients that shrink, grow or turn round rows and columns, and noise."""
    random = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        rate = torch.zeros_like(parameter)
        for axis, size in enumerate(parameter.shape[:2]):
            shape = [size if a == axis else 1 for a in range(parameter.dim())]
            rate += 2.5 * torch.randn(shape, generator=random, dtype=torch.float64)
        noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        parameter.grad = rate * parameter.detach() + 0.1 * noise


def slow_half_space(groups, before, after, epsilon):
    """Zero every group with <after, before> < epsilon |before|^2, and those that were zero."""
    killed = 0
    for layer in groups.layers:
        for group in range(layer.count):
            places = [owners(member) == group for member in layer.members]
            old = torch.cat([before[m.name][p] for m, p in zip(layer.members, places, strict=True)])
            new = torch.cat([after[m.name][p] for m, p in zip(layer.members, places, strict=True)])
            square = sum(x * x for x in old.tolist())
            product = sum(x * y for x, y in zip(new.tolist(), old.tolist(), strict=True))
            if square == 0 or product < epsilon * square:
                killed += int(bool(new.any()))
                for member, place in zip(layer.members, places, strict=True):
                    member.parameter.data[place] = 0
    return killed


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("penalty", [None, LASSO])
@pytest.mark.parametrize("grouping", ["filter", "channel"])
def test_the_loop_in_lockstep(epsilon, penalty, grouping):
    """From the sixth step on; a filter is its weights, its bias and its norm together."""
    models = conv_network().double(), conv_network().double()
    for model in models:
        with torch.no_grad():  # leaves zero in the warm-up, or stays there
            model.conv2.weight[:, 0] = 0
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2) for model in models]
    half = HalfSpace(epsilon, start=5)
    more = {"penalty": penalty, "half_space": half, "freeze": None}
    WGSEF(models[0], 0.5, Constant(0.2), grouping, **more).attach(optimizers[0])
    groups, killed, revived = group_parameters(models[1], grouping, 0.5), 0, 0
    for number in range(20):
        before = {m.name: m.parameter.detach().clone() for m in groups.layout.members}
        dead = groups.norms() == 0
        for model, optimizer in zip(models, optimizers, strict=True):
            push(model, number)
            optimizer.step()
        norms = groups.norms()
        lasso = (1 - 0.2 * 0.2 / norms).clamp(min=0).nan_to_num(0)
        envelope = prox_multipliers(norms, 0.2 * 0.2, groups.budgets, segments=groups.segments)
        groups.scale_(envelope if penalty is None else lasso)
        if number >= 5:
            after = {m.name: m.parameter.detach().clone() for m in groups.layout.members}
            killed += slow_half_space(groups, before, after, epsilon)
            assert not groups.norms()[dead].any()
        revived += int((dead & (groups.norms() > 0)).sum())
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert killed > 0
    assert revived > 0 or grouping == "filter"


def run(steps, *, network=dense_network, states=(), **arguments):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    more = {"k": 3, "lam": Constant(0.1), "freeze": None, **arguments}
    regularizer = WGSEF(model, **more).attach(optimizer)
    parts = model, optimizer, regularizer
    for part, state in zip(parts, states, strict=bool(states)):
        part.load_state_dict(state)
    for number in steps:
        push(model, number)
        optimizer.step()
    return parts


@pytest.mark.parametrize("steps", [1, 5, 6, 12])
def test_warm_up(steps):
    """Up to the fifth step there is nothing of it."""
    plain, _, _ = run(range(steps))
    half, _, _ = run(range(steps), half_space=HalfSpace(0.9, start=5))
    assert same(plain, half) == (steps <= 5)


def test_a_share_of_training_is_a_number_of_steps():
    for share, steps in ((0.25, 5), (0.5, 10), (1.0, 20), (0.01, 1)):
        first, _, _ = run(range(20), half_space=HalfSpace(0.5, start=share), total_steps=20)
        second, _, _ = run(range(20), half_space=HalfSpace(0.5, start=steps))
        assert same(first, second)


def test_a_number_is_its_epsilon():
    """From half of training on, as no mask is fixed."""
    first, _, regularizer = run(range(20), half_space=0.1, total_steps=20)
    second, _, _ = run(range(20), half_space=HalfSpace(epsilon=0.1, start=0.5), total_steps=20)
    assert regularizer.half_space == HalfSpace(0.1)
    assert same(first, second)
    assert not same(first, run(range(20))[0])
    half = HalfSpace(0.2, start=3)
    assert run([], half_space=half)[2].half_space is half
    assert run([])[2].half_space is None
    assert run([], half_space=0, total_steps=9)[2].half_space == HalfSpace(0.0)


@pytest.mark.parametrize("stop", [3, 5, 9])
@pytest.mark.parametrize("penalty", [None, LASSO])
def test_resume_is_bit_identical(stop, penalty):
    more = {"half_space": HalfSpace(0.3, start=5), "penalty": penalty, "freeze": 14}
    whole = run(range(18), **more)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run(range(stop), **more)], file)
    file.seek(0)
    resumed = run(range(stop, 18), states=torch.load(file, weights_only=True), **more)
    assert same(whole[0], resumed[0])
    assert whole[2].frozen
    assert resumed[2].frozen


def test_after_the_freeze_nothing_more_is_projected():
    """Live groups may turn round, dead ones are zero."""
    model, optimizer, regularizer = run(range(8), half_space=HalfSpace(0.9, start=1), freeze=3)
    masks = regularizer.masks
    assert regularizer.frozen
    for number in range(8, 20):
        push(model, number)
        optimizer.step()
        for name, norms in regularizer.groups.split(regularizer.groups.norms()).items():
            assert torch.equal(norms > 0, masks[name])


def test_steps_without_gradients_change_nothing():
    model, optimizer, regularizer = run(range(8), half_space=HalfSpace(0.3, start=1))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert regularizer.pruners[0].taken == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_projects_at_once(dtype):
    """A group that turns round is zero after the same step; the others only wait."""
    model = dense_network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    half = HalfSpace(0.1, start=1)
    WGSEF(model, 4, Constant(1e-6), half_space=half, freeze=None).attach(optimizer)
    for number in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        turned = model[3].weight.detach()[:, 2] * 2.0
        model[3].weight.grad[:, 2] = turned if number else 0
        optimizer.step()
        assert (model[3].weight.norm(dim=0) == 0).tolist() == [False, False, bool(number)] + [
            False
        ] * 3


def test_detaching_takes_both_hooks_away():
    _, optimizer, regularizer = run(range(3), half_space=HalfSpace(0.3, start=1))
    regularizer.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


makers = pytest.mark.parametrize(
    "make", [WGSEFCallback, lambda **more: WGSEF(dense_network(), **more)]
)


@pytest.mark.parametrize("epsilon", [-0.1, 1, 1.0, 1.5, "x", True, None, float("nan")])
def test_epsilons(epsilon):
    with raises_naming("epsilon must be a number in [0, 1)", repr(epsilon)):
        HalfSpace(epsilon)


@makers
@pytest.mark.parametrize("given", [-0.1, 1, 1.5, "x", True, False, HalfSpace, [0.1]])
def test_half_spaces(make, given):
    with raises_naming("half_space must be None, an epsilon in [0, 1)", repr(given)):
        make(lam=Constant(0.1), half_space=given)


@pytest.mark.parametrize("start", [0, -1, 1.5, 0.0, "x", True])
def test_starts(start):
    with raises_naming("start must be a number of steps", repr(start)):
        HalfSpace(0.1, start=start)


def test_a_share_of_unknown_length():
    model = dense_network()
    regularizer = WGSEF(model, 3, Constant(0.1), half_space=0.1)
    with raises_naming("HalfSpace(start=...) = 0.5 is a share of training"):
        regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("shape", [(4, 4), (4, 8)])
def test_tiles_are_seen_as_tiles(shape):
    """The first tile turns round, and no other."""
    rows, columns = shape
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows), torch.nn.Linear(rows, 1))
    groups = group_parameters(model, "block:2x2", include="0")
    before = {member.name: member.weights.clone() for member in groups.layout.members}
    model[0].weight.data[:2, :2].neg_()
    inside = inside_half_space(groups, before, 0.0)
    assert inside.tolist() == [0.0] + [1.0] * (len(groups) - 1)

"""Proximal steps that bfloat16 and float16 would round away: they wait until they can be seen."""

import io
import itertools
import math

import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, Constant, Homotopy, prox_multipliers
from tests.helpers.oracles.preconditioned_training import owners, same
from tests.helpers.products import every_value

STEPS = 1000
# A step shrinks winners by this share, and the weakest loser by five times as much: below half a
# unit, which is 2^-9 (float16: 2^-12) of the largest numbers that have it.
SHRINK = {torch.bfloat16: 0.00037, torch.float16: 0.00037 / 8}
NORMS = (0.3, 0.6, 0.65, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1)
FLOAT32 = 2.0**-23
every_dtype = pytest.mark.parametrize("dtype", SHRINK, ids=str)


def network(dtype):
    """Layer "1" has 12 channels of 40 weights, with `NORMS`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.Linear(12, 40)).double()
    with torch.no_grad():
        weight = model[1].weight
        weight *= torch.tensor(NORMS).double() / weight.norm(dim=0)
    return model.to(dtype)


def still(model, optimizer, _=0):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def moving(model, optimizer, number):
    random = torch.Generator().manual_seed(number)
    inputs = torch.randn(16, 3, generator=random).to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr=lr, eps=1e-3)


def waiting(regularizer):
    """For every group the factor that waits to be applied; 1 where none does."""
    factors = regularizer.state_dict()["attachments"][0]["remainder"]
    return torch.ones(len(regularizer.groups)).double() if factors is None else factors.double()


def column_norms(weight):
    return weight.detach().double().norm(dim=0)


def half_unit(dtype):
    """The largest relative error of rounding to the nearest."""
    return torch.finfo(dtype).eps / 2


@every_value("dtype, debias", itertools.product(SHRINK, [0.0, 0.5]))
def test_a_thousand_steps_that_rounding_would_lose(dtype, debias):
    """A proximal step of a convex penalty brings two points no farther from each other.

    Therefore the distance to exact weights is at most the sum of what is rounded away, half a unit
    of the groups that are multiplied in a step. What waits for later is at most 4 units.
    """
    model, plain = network(dtype), network(dtype)
    lost, start, shrink = plain[1].weight, column_norms(plain[1].weight), SHRINK[dtype]
    norms, bound = start, STEPS * FLOAT32 * float(start.norm())  # norms and what waits: float32
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    regularizer = WGSEF(model, 10, Constant(shrink), debias=debias, freeze=None).attach(optimizer)
    for _ in range(STEPS):
        old = model[1].weight.detach().clone()
        still(model, optimizer)
        norms = norms * prox_multipliers(norms, shrink, 10, debias=debias)
        moved = (model[1].weight != old).any(0)
        bound += float(column_norms(old)[moved].norm()) * half_unit(dtype)
        factors = prox_multipliers(column_norms(lost), shrink, 10, debias=debias)
        with torch.no_grad():
            lost *= factors.to(dtype)
    stored, later = column_norms(model[1].weight), waiting(regularizer)
    assert (stored * later - norms).norm() <= bound
    assert bound <= 0.75 * (start - norms).norm()
    assert (later > 1 - 8 * half_unit(dtype)).all()
    assert torch.equal(stored == 0, norms == 0)
    assert (norms == 0).tolist() == [dtype == torch.bfloat16] + [False] * 11
    assert same(plain, network(dtype))  # plain multiplication has lost everything


class Watched:
    """A regularizer, and beside it at every step the exact one on the same weights."""

    def __init__(self, model, optimizer, grouping, k, lam):
        self.model, self.lam, self.optimizer = model, lam, optimizer
        optimizer.register_step_post_hook(self.remember)
        self.regularizer = WGSEF(model, k, Constant(lam), grouping, freeze=None).attach(optimizer)
        self.died = self.moved = 0

    def remember(self, *_):
        (layer,) = self.regularizer.groups.layers
        self.later = waiting(self.regularizer)
        self.old = [member.parameter.detach().double() for member in layer.members]

    def step(self, step, number):
        """The largest error of a weight, in half units of it; dead groups are exactly zero."""
        step(self.model, self.optimizer, number)
        (layer,), later = self.regularizer.groups.layers, waiting(self.regularizer)
        squares = torch.zeros(layer.count).double()
        for member, old in zip(layer.members, self.old, strict=True):
            squares.index_add_(0, owners(member).flatten(), old.square().flatten())
        size = self.optimizer.param_groups[0]["lr"] * self.lam
        factors = prox_multipliers(squares.sqrt() * self.later, size, layer.budget)
        self.died += int((factors == 0).sum())
        worst = 0.0
        for member, old in zip(layer.members, self.old, strict=True):
            owner, dtype = owners(member), member.parameter.dtype
            now, exact = member.parameter.detach().double(), old * (self.later * factors)[owner]
            assert not now[(factors == 0)[owner]].any()
            error = (now * later[owner] - exact).abs()
            # Factors are computed in float32, and numbers below the normal ones have other units.
            error = error - 20 * FLOAT32 * old.abs() - torch.finfo(dtype).tiny
            self.moved += int((now != old).sum())
            units = exact.abs() * half_unit(dtype)
            worst = max(worst, float(torch.where(error > 0, error / units, 0).max()))
        return worst


@every_dtype
@pytest.mark.parametrize("grouping", ["filter", "channel"])
def test_every_multiplication_rounds_by_half_a_unit(dtype, grouping):
    """While Adam moves the weights, whole steps of which wait."""
    model = network(dtype)
    watched = Watched(model, adam(model, 2e-4), grouping, 0.4, 10.0)
    worst = [watched.step(moving, number) for number in range(200)]
    assert watched.died > 0
    assert watched.moved > 0
    assert max(worst) <= 1


def test_members_of_several_precisions():
    """A filter of bfloat16 with a bias of float32: neither loses more than half its unit."""
    model = network(torch.bfloat16)
    model[0].bias.data = torch.linspace(0.1, 0.9, 12)
    watched = Watched(model, torch.optim.SGD(model.parameters(), lr=1.0), "filter", 4, 1e-3)
    worst = [watched.step(still, number) for number in range(300)]
    assert watched.moved > 0
    assert max(worst) <= 1


@every_dtype
@pytest.mark.parametrize("step", [still, moving])
@pytest.mark.parametrize(
    "lam", [Constant(0.5), Homotopy(1e-4, length=60)], ids=["constant", "homotopy"]
)
def test_resume_is_bit_identical(dtype, step, lam):
    def run(numbers, *states):
        model = network(dtype)
        optimizer = adam(model)
        freeze = "converged" if isinstance(lam, Homotopy) else 60
        regularizer = WGSEF(model, 4, lam, freeze=freeze).attach(optimizer)
        if states:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in states], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            for part, state in zip((model, optimizer, regularizer), saved, strict=True):
                part.load_state_dict(state)
        for number in numbers:
            step(model, optimizer, number)
        return model, optimizer, regularizer

    whole, half = run(range(70)), run(range(35))
    assert (waiting(half[2]) < 1).any()
    resumed = run(range(35, 70), *half)
    assert same(whole[0], resumed[0])
    assert resumed[2].frozen
    assert torch.equal(resumed[2].masks["1"], whole[2].masks["1"])


@every_dtype
@pytest.mark.parametrize("lam", [Constant(0.5), Homotopy(length=40)], ids=["constant", "homotopy"])
@pytest.mark.parametrize("metric", ["identity", "group"])
def test_the_freeze_leaves_exact_zeros_and_nothing_waits(dtype, lam, metric):
    model = network(dtype)
    optimizer = adam(model)
    freeze = "converged" if isinstance(lam, Homotopy) else 40
    regularizer = WGSEF(model, 4, lam, metric=metric, freeze=freeze).attach(optimizer)
    for number in range(39):
        moving(model, optimizer, number)
    assert not regularizer.frozen
    for number in range(39, 45):
        moving(model, optimizer, number)
        assert regularizer.frozen
        mask = regularizer.masks["1"]
        assert int(mask.sum()) == 4
        assert not model[1].weight[:, ~mask].any()
        assert torch.equal(column_norms(model[1].weight) > 0, mask)
        assert (waiting(regularizer) == 1).all()


@every_dtype
def test_what_waits_is_applied_at_the_freeze(dtype):
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    regularizer = WGSEF(model, 10, Constant(SHRINK[dtype]), freeze=20).attach(optimizer)
    for _ in range(19):
        still(model, optimizer)
    later, old = waiting(regularizer)[2:], model[1].weight.detach().double()[:, 2:]
    assert (later < 1 - half_unit(dtype)).all()
    still(model, optimizer)
    assert regularizer.frozen
    now = model[1].weight.detach().double()[:, 2:]
    assert ((now - old * later).abs() <= 2 * half_unit(dtype) * old.abs()).all()
    assert (now != old).any(0).all()


@every_dtype
def test_the_diagonal_metric_falls_back_to_that_of_groups(dtype):
    models = network(dtype), network(dtype)
    first, second = (
        WGSEF(models[0], 4, Constant(0.5), metric="auto"),
        WGSEF(models[1], 4, Constant(0.5), metric="group"),
    )
    optimizers = adam(models[0]), adam(models[1])
    with pytest.warns(UserWarning, match=r"metric='auto' .* too coarse for: metric='group'"):
        first.attach(optimizers[0])
    second.attach(optimizers[1])
    for number in range(30):
        for model, optimizer in zip(models, optimizers, strict=True):
            moving(model, optimizer, number)
    assert same(*models)
    scaled = network(dtype)  # by groups: no warning
    WGSEF(scaled, 4, Homotopy(length=9), metric="auto").attach(adam(scaled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_waits_for_nothing(dtype):
    model, shrink = network(dtype), 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    regularizer = WGSEF(model, 12, Constant(shrink)).attach(optimizer)
    for count in range(1, 4):
        still(model, optimizer)
        assert regularizer.state_dict()["attachments"][0]["remainder"] is None
        expected = column_norms(network(dtype)[1].weight) * math.exp(-count * shrink)
        torch.testing.assert_close(column_norms(model[1].weight), expected, rtol=3e-7, atol=0)

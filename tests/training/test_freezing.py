"""The freeze: when the mask is fixed, and what becomes of moments and dead groups."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import (
    WGSEF,
    Constant,
    GroupLasso,
    Groups,
    Homotopy,
    Warmup,
    WGSEFCallback,
    group_parameters,
)
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.members import Member
from lightning_wgsef.training import freezing
from lightning_wgsef.training.freezing import FreezeRule
from lightning_wgsef.training.masks import apply_masks, clear_moments
from tests.helpers.groups import (
    OF_ANY_LAYER,
    batches,
    columns,
    conv_network,
    dense_network,
    kept,
    raises_naming,
    train,
)

# --- moments -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"momentum_buffer"}),
    "Adam": (lambda p: torch.optim.Adam(p, 0.1), {"exp_avg", "exp_avg_sq"}),
    "AdamW": (
        lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
        {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    ),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, 0.1, centered=True, momentum=0.9),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def train_on_noise(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 8, 8)).square().mean().backward()
        optimizer.step()


@every_optimizer
@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
def test_clear_moments(name, grouping):
    make, moments = OPTIMIZERS[name]
    model = conv_network()
    optimizer = make(model.parameters())
    train_on_noise(model, optimizer)
    groups = group_parameters(model, grouping)
    masks = kept(groups, 0, 2, len(groups) - 1)
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    weights = copy.deepcopy(model.state_dict())
    clear_moments(groups, masks, optimizer)

    dead = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in model.parameters()}
    for layer in groups.layers:
        for member in layer.members:
            dead[id(member.parameter)] |= ~member.along(masks[layer.name], True)
    assert sum(int(mask.sum()) for mask in dead.values()) > 0
    for parameter, old in before.items():
        state, gone = optimizer.state[parameter], dead[id(parameter)]
        assert moments <= state.keys() == old.keys()
        for key, value in state.items():
            if key in moments:
                assert value[gone].count_nonzero() == 0
                assert torch.equal(value[~gone], old[key][~gone])
            else:
                assert value == old[key]  # the number of steps
    after = model.state_dict()
    assert all(torch.equal(after[key], weights[key]) for key in weights)


@every_optimizer
def test_dead_weights_do_not_come_back(name):
    """With moments cleared and no gradient the optimizer leaves them at zero by itself."""
    make, _ = OPTIMIZERS[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(model.parameters())
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    groups = group_parameters(model)
    masks = kept(groups, 1, 2)
    apply_masks(groups, masks)
    clear_moments(groups, masks, optimizer)
    model[1].weight.grad[:, [1, 2]] = 0
    optimizer.step()
    assert groups.norms().count_nonzero() == 2


def test_the_number_of_steps_of_a_single_weight_is_kept():
    """Adam's count has as many entries as this weight, but not its shape."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), capturable=False)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    groups = group_parameters(model, "element", 1)
    clear_moments(groups, {"0": torch.tensor([False])}, optimizer)
    state = optimizer.state[model[0].weight]
    assert state["step"] == 1
    assert state["exp_avg"].item() == 0


def test_clear_moments_before_the_first_step():
    model = conv_network()
    optimizer = torch.optim.Adam(model.parameters())
    groups = group_parameters(model)
    clear_moments(groups, kept(groups, 0), optimizer)
    assert len(optimizer.state) == 0


def test_clear_moments_of_another_models_optimizer():
    model, other = conv_network(), conv_network(seed=1)
    optimizer = torch.optim.Adam(other.parameters())
    train_on_noise(other, optimizer, steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    groups = group_parameters(model)
    clear_moments(groups, kept(groups, 0), optimizer)
    after = optimizer.state_dict()["state"]
    assert after.keys() == before["state"].keys()
    for number, state in before["state"].items():
        assert all(torch.equal(after[number][key], value) for key, value in state.items())


# --- convergence -------------------------------------------------------------------------------

ALIVE = torch.tensor([True, True, False, False])
OTHER = torch.tensor([True, False, True, False])
WITHIN, ABOVE = torch.tensor([0.0, 1e-7]), torch.tensor([0.0, 1e-3])
VALUE = torch.tensor([1.0, 1.0])


@pytest.fixture
def patience(monkeypatch):
    """How many checks in a row have to find the same groups."""
    return lambda number: monkeypatch.setattr(freezing, "PATIENCE", number)


def rule():
    return FreezeRule("converged", Constant(0.1), total_steps=None)


def updates(rule, *seen):
    return [rule.update(alive, gap, VALUE) for alive, gap in seen]


def test_converged_after_as_many_equal_checks_as_patience(patience):
    assert updates(rule(), *[(ALIVE, WITHIN)] * 5) == [False] * 4 + [True]
    patience(3)
    assert updates(rule(), *[(ALIVE, WITHIN)] * 5) == [False] * 3 + [True] * 2


def test_another_set_starts_again(patience):
    patience(2)
    tried = rule()
    seen = [(ALIVE, WITHIN)] * 2 + [(OTHER, WITHIN)] * 3 + [(ALIVE, WITHIN)]
    assert updates(tried, *seen) == [False, False, False, False, True, False]
    assert tried.unchanged == 0
    assert torch.equal(tried.alive, ALIVE)


def test_as_many_groups_are_not_the_same_groups(patience):
    patience(1)
    assert ALIVE.sum() == OTHER.sum()
    assert updates(rule(), (ALIVE, WITHIN), (OTHER, WITHIN)) == [False, False]


def test_a_gap_in_one_layer_starts_again(patience):
    patience(2)
    seen = [(ALIVE, WITHIN), (ALIVE, WITHIN), (ALIVE, ABOVE), (ALIVE, WITHIN), (ALIVE, WITHIN)]
    assert updates(rule(), *seen) == [False, False, False, False, True]


def test_the_gap_is_relative_to_the_value(patience, monkeypatch):
    patience(1)
    monkeypatch.setattr(freezing, "TOLERANCE", 0.1)
    tried, gap = rule(), torch.tensor([1.0])
    assert not tried.update(ALIVE, gap, torch.tensor([10.0]))
    assert tried.update(ALIVE, gap, torch.tensor([10.0]))
    assert not tried.update(ALIVE, gap, torch.tensor([9.9]))


def test_nothing_left_is_settled(patience):
    """Value and gap are both zero: 0 <= 0."""
    patience(1)
    tried, nothing = rule(), torch.zeros(2)
    assert not tried.update(~ALIVE & ALIVE, nothing, nothing)
    assert tried.update(~ALIVE & ALIVE, nothing, nothing)


def test_nan_is_not_settled(patience):
    patience(1)
    broken = torch.tensor([0.0, float("nan")])
    assert updates(rule(), *[(ALIVE, broken)] * 3) == [False] * 3


def test_goes_on_from_its_fields(patience):
    """As a resumed run does."""
    patience(3)
    first, second = rule(), rule()
    updates(first, *[(ALIVE, WITHIN)] * 3)
    second.unchanged, second.alive = first.unchanged, first.alive
    assert updates(second, (ALIVE, WITHIN)) == [True]


@pytest.mark.parametrize(
    ("freeze", "schedule", "total", "step", "waits"),
    [
        (None, Constant(0.1), 100, None, False),
        (None, Homotopy(), 100, None, False),
        (7, Constant(0.1), None, 7, False),
        (0.25, Constant(0.1), 100, 25, False),
        (0.25, Homotopy(), 100, 25, False),
        ("converged", Homotopy(length=0.5), 100, 50, False),
        ("converged", Homotopy(length=9), None, 9, False),
        ("converged", Constant(0.1), 100, 75, True),
        ("converged", Warmup(0.1, length=0.9), 100, 75, True),
        ("converged", Constant(0.1), None, None, True),
    ],
)
def test_the_step_that_fixes_the_mask(freeze, schedule, total, step, waits):
    """By a homotopy's end, at three quarters of training at the latest, or where it is told."""
    tried = FreezeRule(freeze, schedule, total)
    assert tried.step == step
    assert tried.waits is waits
    due = [taken for taken in range(101) if tried.due(taken)]
    assert due == ([] if step is None else list(range(step - 1, 101)))


@pytest.mark.parametrize(
    ("freeze", "schedule"), [(0.5, Constant(0.1)), ("converged", Homotopy(length=0.5))]
)
def test_a_share_of_an_unknown_length(freeze, schedule):
    with raises_naming("is a share of training", "not known"):
        FreezeRule(freeze, schedule, None).due(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
)
def test_dead_groups_stay_dead_after_the_freeze(make) -> None:
    model = dense_network()
    optimizer = make(model.parameters())
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=10)).attach(optimizer)

    def step(inputs: Tensor, targets: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    for batch in batches(10):
        step(*batch)
    assert regularizer.frozen
    masks = regularizer.masks
    assert [int(mask.sum()) for mask in masks.values()] == [2, 2]
    for weight, mask in zip(columns(model), masks.values(), strict=True):
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert value[:, ~mask].count_nonzero() == 0
                assert value[:, mask].count_nonzero() > 0
    before = [weight.detach().clone() for weight in columns(model)]
    for batch in batches(10):
        step(*batch)
        for weight, mask in zip(columns(model), masks.values(), strict=True):
            assert torch.equal(weight.norm(dim=0) > 0, mask)
    assert all(not torch.equal(a, b) for a, b in zip(before, columns(model), strict=True))


def test_constant_lam_freezes_when_converged() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=1, lam=Constant(0.5)).attach(optimizer)
    train(model, optimizer, batches(200))
    assert not regularizer.frozen  # a first look and four at the same set are asked for
    train(model, optimizer, batches(400))
    assert regularizer.frozen
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [1, 1]
    assert regularizer.gap().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("weights", "arguments", "alive"),
    [
        ([1.0, 1e-3, 1e-3], {"k": 2}, [True, True, False]),
        ([1.0, 1e-3, 1e-3], {"k": 2, "debias": 1.0}, [True, True, False]),
        ([1.0, 1.0, 1.0, 1e-3], {"k": 0.8, "costs": torch.ones(4)}, [True, True, True, False]),
    ],
)
def test_convergence_keeps_the_budget(weights, arguments, alive) -> None:
    """Groups beyond it that are too weak to count in the gap go when the mask is fixed."""
    model = nn.Sequential(nn.Linear(2, len(weights)), nn.Linear(len(weights), 1, bias=False))
    model[1].weight.data.copy_(torch.tensor([weights]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = WGSEF(model, lam=Constant(0.1), include="1", **arguments).attach(optimizer)
    for _ in range(400):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert regularizer.frozen
    assert regularizer.masks["1"].tolist() == alive
    assert (model[1].weight != 0).tolist() == [alive]


@pytest.mark.parametrize("lam", [20.0, 50.0])
def test_groups_that_the_optimizer_moves_again_were_not_cut(lam: float) -> None:
    """Between two proximal steps none is zero: a budget that is kept gives no warning."""
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = WGSEF(model, k=0.25, lam=Constant(lam), debias=1.0, total_steps=40).attach(
        optimizer
    )
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 16, 8, generator=generator)
    targets = torch.stack([x[:, :4] * x[:, 4:] for x in inputs])
    train(model, optimizer, list(zip(inputs, targets, strict=True)))  # a warning is an error
    assert regularizer.frozen
    assert {name: int(mask.sum()) for name, mask in regularizer.masks.items()} == {"2": 8, "4": 4}


@pytest.mark.parametrize(
    ("penalty", "advice"),
    [(None, "Take a number for lam or None: either arrives"), (GroupLasso(), "Try a larger lam")],
)
def test_a_cut_is_reported_with_advice_that_can_be_followed(penalty, advice: str) -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    arguments = {"k": 2, "lam": Constant(1e-3), "penalty": penalty, "total_steps": 8}
    WGSEF(model, **arguments).attach(optimizer)
    with pytest.warns(UserWarning, match="had not reached the budget by step 6") as caught:
        train(model, optimizer, batches(8))
    assert advice in str(caught[0].message)
    assert ("arrives" in str(caught[0].message)) == (penalty is None)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"lam": Constant(1e-6), "freeze": 6}, "Take a number for lam or None"),
        ({"lam": Warmup(1e-6), "freeze": 0.5}, "Take a number for lam or None"),
        ({"lam": Homotopy(start=1e-9, length=4)}, "Give the ramp more steps"),
    ],
)
def test_a_freeze_that_cuts_more_than_a_tenth_warns_whatever_its_cause(
    arguments: dict[str, Any], advice: str
) -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    WGSEF(model, k=2, total_steps=12, **arguments).attach(optimizer)
    with pytest.warns(UserWarning, match="weakest groups were cut to keep it") as caught:
        train(model, optimizer, batches(12))
    assert advice in str(caught[0].message)
    assert "three quarters" not in str(caught[0].message)


def test_a_freeze_that_cuts_less_than_a_tenth_of_the_groups() -> None:
    """One of 11; a warning is an error."""
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    k = {"2": 4, "3": 6}
    regularizer = WGSEF(model, k=k, lam=Constant(1e-6), freeze=6).attach(optimizer)
    train(model, optimizer, batches(8))
    assert {name: int(x.sum()) for name, x in regularizer.masks.items()} == k


@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_freeze_at_a_given_step_projects_onto_the_budget() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=2, lam=Constant(1e-6), freeze=0.5, total_steps=10).attach(
        optimizer
    )
    train(model, optimizer, batches(4))
    assert not regularizer.frozen
    train(model, optimizer, batches(1))
    assert regularizer.frozen
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [2, 2]


def test_never_freezing() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=5), freeze=None).attach(optimizer)
    train(model, optimizer, batches(10))
    assert not regularizer.frozen
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [2, 2]


def test_debiased_constant_stops_at_the_projection() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=2, lam=Constant(1e9), debias=1.0).attach(optimizer)
    kept = [weight.detach().norm(dim=0).topk(2).values for weight in columns(model)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norms = [weight.detach().norm(dim=0) for weight in columns(model)]
    assert [int((norm > 0).sum()) for norm in norms] == [2, 2]
    for norm, expected in zip(norms, kept, strict=True):
        torch.testing.assert_close(norm.topk(2).values, expected, rtol=0, atol=0)
    assert regularizer.pruners[0].step_size.item() == 1.0


def test_collapse_is_reported_once_with_layer_and_lam() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    WGSEF(model, k=2, lam=Constant(5.0), include=["2"]).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(200):
            optimizer.step()
    assert len(caught) == 1
    assert re.match(r"all groups of 2 have .*Constant\(lam=5.0\)", str(caught[0].message))


def weighted(model: nn.Module) -> Groups:
    """Columns of layer 3: the first two matter more, the last one costs more."""
    weights = torch.tensor([100.0, 100.0, 1.0, 1.0, 1.0, 1.0])
    costs = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 3.0])
    member = Member("3.weight", model[3].weight, axes=(1,))
    return Groups([GroupedLayer("3", "weighted", 6, (member,), weights=weights, costs=costs)])


@pytest.mark.parametrize("lam", [Homotopy(length=3), Constant(0.0)])
@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_weights_and_costs_of_ones_own_groups_decide_who_stays(lam) -> None:
    model = dense_network()
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([1.0, 1.1, 2.0, 2.1, 1.9, 3.5]).expand(2, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer = WGSEF(model, k=3, lam=lam, grouping=weighted, freeze=3).attach(optimizer)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    # strength a * sqrt(w / c): 10, 11, 2, 2.1, 1.9, 2.02 -> the first two, then 2.1
    assert regularizer.masks["3"].tolist() == [True, True, False, True, False, False]
    assert regularizer.gap().item() == 0


def test_resume_is_bit_identical_and_loads_weights_only(tmp_path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, WGSEF]:
        model = dense_network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        regularizer = WGSEF(model, k=2, lam=Homotopy(length=60)).attach(optimizer)
        return model, optimizer, regularizer

    whole, optimizer, _ = start()
    train(whole, optimizer, batches(80))
    for stop in (30, 60, 70):
        model, optimizer, regularizer = start()
        train(model, optimizer, batches(80)[:stop])
        path = tmp_path / "state.ckpt"
        parts = (model, optimizer, regularizer)
        torch.save([part.state_dict() for part in parts], path)
        resumed = start()
        for part, state in zip(resumed, torch.load(path, weights_only=True), strict=True):
            part.load_state_dict(state)
        train(*resumed[:2], batches(80)[stop:])
        for a, b in zip(whole.parameters(), resumed[0].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [5, 11])
@pytest.mark.parametrize(("k", "warned"), [(1, True), (2, False), (3, True)])
def test_a_resumed_run_keeps_its_budget_with_a_warning(k: int, warned: bool, steps: int) -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=10)).attach(optimizer)
    train(model, optimizer, batches(steps))
    other = dense_network()
    other.load_state_dict(model.state_dict())
    resumed = WGSEF(other, k=k, lam=Homotopy(length=10))
    resumed.attach(torch.optim.SGD(other.parameters(), lr=0.01))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(regularizer.state_dict())
    words = f"k stands for {2 * k} groups now, but the saved run goes on with its own 4"
    assert any(words in str(x.message) for x in caught) == warned
    assert all(torch.equal(resumed.masks[n], mask) for n, mask in regularizer.masks.items())


def test_state_of_another_model_is_refused() -> None:
    model = dense_network()
    state = (
        WGSEF(model, lam=Constant(0.1))
        .attach(torch.optim.SGD(model.parameters(), lr=0.1))
        .state_dict()
    )
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 7))
    regularizer = WGSEF(other, lam=Constant(0.1)).attach(
        torch.optim.SGD(other.parameters(), lr=0.1)
    )
    with pytest.raises(ValueError, match=r"saved state is of other groups.*'2': 5"):
        regularizer.load_state_dict(state)


def test_masks_from_zeros_and_from_a_checkpoint(tmp_path) -> None:
    model = dense_network()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    loaded = dense_network()
    loaded.load_state_dict(model.state_dict())
    for masks, start in (("from_zeros", model), (tmp_path / "pruned.pt", loaded)):
        optimizer = torch.optim.AdamW(start.parameters(), lr=0.01)
        regularizer = WGSEF(start, masks=masks).attach(optimizer)
        assert regularizer.frozen
        assert start[2].weight[:, 1].count_nonzero() == 0
        train(start, optimizer, batches(5))
        assert regularizer.masks["2"].tolist() == [True, False, True, True, True]
        assert (start[2].weight.norm(dim=0) > 0).tolist() == regularizer.masks["2"].tolist()
        assert regularizer.gap().tolist() == [0, 0]
        assert regularizer.groups.budgets.tolist() == [4, 6]
    with pytest.raises(ValueError, match="no group is zero"):
        WGSEF(dense_network(), masks="from_zeros")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"k": 0.25}, "k=0.25"),
        ({"k": 4}, "k=4"),
        ({"lam": 0.1}, "lam=0.1"),
        ({"half_space": 0.5}, "half_space=0.5"),
        ({"freeze": None}, "freeze=None"),
        ({"debias": 1.0, "lam": Constant(0.1)}, "lam=Constant(lam=0.1), debias=1.0"),
        ({"metric": "auto"}, "metric='auto'"),
    ],
)
@pytest.mark.parametrize("make", [WGSEFCallback, lambda **given: WGSEF(dense_network(), **given)])
def test_what_masks_leave_nothing_to_find_for(make, arguments, named: str) -> None:
    with raises_naming("masks='from_zeros'", f"{named} would not be used", "leave out"):
        make(masks="from_zeros", **arguments)


OF_ZEROS: dict[str, Any] = {
    "a layer that is dead": ({}, [1, 7]),
    "in weights": ({"costs": {"2": torch.full((5,), 8.0), "3": torch.full((8,), 3.0)}}, [8, 21]),
    "one budget": ({"scope": "global"}, [1 + 7]),
    "7:8": ({"grouping": "7:8", "include": "3"}, [7]),
}


@pytest.mark.parametrize("case", OF_ZEROS)
def test_what_stays_is_the_budget_of_given_masks(case: str) -> None:
    """A budget is a positive number, so that a dead layer has room for its cheapest group."""
    arguments, budgets = OF_ZEROS[case]
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight.zero_()
        model[3].weight[:, 0] = 0
    dead = "2: zero as a whole, and kept so"
    if "include" in arguments:  # of "7:8" layer 3 alone is grouped
        dead = "zero weights of 2.weight .* are in no zero group"
    with pytest.warns(UserWarning, match=dead):
        regularizer = WGSEF(model, masks="from_zeros", **arguments)
    assert regularizer.groups.budgets.tolist() == budgets
    regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert regularizer.gap().tolist() == [0] * len(budgets)

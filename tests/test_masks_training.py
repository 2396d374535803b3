"""Masks in training: moments are cleared, and when masks count as settled."""

import copy

import pytest
import torch
from helpers import OF_ANY_LAYER, conv_network, kept
from torch import nn

from lightning_wgsef import group_parameters
from lightning_wgsef.masks import Convergence, apply_masks, clear_moments

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


def train(model, optimizer, steps=3):
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
    train(model, optimizer)
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
    train(other, optimizer, steps=1)
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


def looks(convergence, *seen):
    return [convergence.look(alive, gap, VALUE) for alive, gap in seen]


def test_converged_after_as_many_equal_looks_as_patience():
    assert looks(Convergence(patience=3), *[(ALIVE, WITHIN)] * 5) == [False] * 3 + [True] * 2
    assert looks(Convergence(), *[(ALIVE, WITHIN)] * 5) == [False] * 4 + [True]


def test_another_set_starts_again():
    convergence = Convergence(patience=2)
    seen = [(ALIVE, WITHIN)] * 2 + [(OTHER, WITHIN)] * 3 + [(ALIVE, WITHIN)]
    assert looks(convergence, *seen) == [False, False, False, False, True, False]
    assert convergence.unchanged == 0
    assert torch.equal(convergence.alive, ALIVE)


def test_as_many_groups_are_not_the_same_groups():
    convergence = Convergence(patience=1)
    assert ALIVE.sum() == OTHER.sum()
    assert looks(convergence, (ALIVE, WITHIN), (OTHER, WITHIN)) == [False, False]


def test_a_gap_in_one_layer_starts_again():
    convergence = Convergence(patience=2)
    seen = [(ALIVE, WITHIN), (ALIVE, WITHIN), (ALIVE, ABOVE), (ALIVE, WITHIN), (ALIVE, WITHIN)]
    assert looks(convergence, *seen) == [False, False, False, False, True]


def test_the_gap_is_relative_to_the_value():
    convergence = Convergence(tolerance=0.1, patience=1)
    gap = torch.tensor([1.0])
    assert not convergence.look(ALIVE, gap, torch.tensor([10.0]))
    assert convergence.look(ALIVE, gap, torch.tensor([10.0]))
    assert not convergence.look(ALIVE, gap, torch.tensor([9.9]))


def test_nothing_left_is_settled():
    """Value and gap are both zero: 0 <= 0."""
    convergence, nothing = Convergence(patience=1), torch.zeros(2)
    assert not convergence.look(~ALIVE & ALIVE, nothing, nothing)
    assert convergence.look(~ALIVE & ALIVE, nothing, nothing)


def test_nan_is_not_settled():
    convergence = Convergence(patience=1)
    broken = torch.tensor([0.0, float("nan")])
    assert looks(convergence, *[(ALIVE, broken)] * 3) == [False] * 3


def test_goes_on_from_its_fields():
    """As a resumed run does."""
    first = Convergence(patience=3)
    looks(first, *[(ALIVE, WITHIN)] * 3)
    second = Convergence(patience=3, unchanged=first.unchanged, alive=first.alive)
    assert looks(second, (ALIVE, WITHIN)) == [True]

"""What slim vouches for holds for other inputs than the example's: lengths, masks, modes, ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import slim
from lightning_wgsef.network.variations import variations
from tests.helpers.groups import raises_naming


def outputs(network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(*inputs)


def difference(one: nn.Module, other: nn.Module, *inputs: torch.Tensor) -> float:
    return float((outputs(one, *inputs) - outputs(other, *inputs)).abs().max())


PADDING = {
    "lengths": (torch.tensor([6, 6]), torch.tensor([6, 2])),
    "bool": (torch.ones(2, 6, dtype=torch.bool), torch.tensor([[1, 1, 0, 0, 0, 0]] * 2).bool()),
    "int": (torch.ones(2, 6, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)),
    "float": (torch.ones(2, 6), torch.tensor([[1.0, 1, 1, 1, 0, 0]] * 2)),
}


class MaskedBlock(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask):
        return (x + self.inner(x)) * mask


class Blocks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.i, self.o = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 3, 3, padding=1)
        self.block = MaskedBlock(nn.Conv1d(8, 8, 1))

    def forward(self, x, padding):
        if self.kind == "lengths":
            mask = (torch.arange(x.shape[2])[None] < padding[:, None])[:, None]
        else:
            mask = padding[:, None].to(x.dtype)
        return self.o(self.block(self.i(x), mask))


@pytest.mark.parametrize("kind", PADDING)
def test_a_block_that_masks_stays(kind):
    full, padded = PADDING[kind]
    network, x = Blocks(kind).eval(), torch.randn(2, 4, 6)
    for parameter in network.block.parameters():
        nn.init.zeros_(parameter)
    small = slim(network, (x, full))
    assert difference(network, small, x, padded) < 1e-5
    assert "other inputs" in small.slimming.kept["block"]


class Routed(nn.Module):
    def __init__(self, chooses):
        super().__init__()
        self.i, self.o, self.chooses = nn.Linear(6, 16), nn.Linear(8, 3), chooses
        self.experts = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))

    def forward(self, x, *more):
        return self.o(F.relu(self.experts[int(self.chooses(x, *more))](F.relu(self.i(x)))))


ROUTES = {
    "sign": (lambda x: x.sum() < 0, (torch.ones(1, 6),), (-torch.ones(1, 6),)),
    "label": (
        lambda x, y: y[0] == 0,
        (torch.randn(2, 6), torch.tensor([1, 0])),
        (torch.randn(2, 6), torch.tensor([0, 1])),
    ),
    "flag": (
        lambda x, flag: flag.any(),
        (torch.randn(2, 6), torch.tensor([False])),
        (torch.randn(2, 6), torch.tensor([True])),
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_the_other_way_is_found(route):
    chooses, example, other = ROUTES[route]
    network = Routed(chooses).eval()
    network.i.weight.data[:8] = 0
    network.i.bias.data[:8] = 0
    small = slim(network, example)
    assert difference(network, small, *other) < 1e-5
    assert small.i.out_features == 16


def never(x):
    return x.sum() > 1e6


def test_what_runs_on_no_input_stays_with_what_it_may_read():
    network = Routed(never).eval()
    network.i.weight.data[:8] = 0
    network.i.bias.data[:8] = 0
    small = slim(network, torch.randn(2, 6))
    assert small.i.out_features == 16
    assert "ran on no input" in small.slimming.kept["i"]
    assert "check=" in small.slimming.kept["experts.1"]
    assert difference(network, small, torch.full((1, 6), 1e7)) < 1e-5


def test_a_part_beside_the_network_costs_nothing():
    """A discriminator of other widths reads nothing of the generator's hidden features."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o, self.D = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(7, 1)

        def forward(self, x):
            return self.o(F.relu(self.a(x)))

    network = Beside().eval()
    network.o.weight.data[:, :4] = 0
    small = slim(network, torch.randn(2, 6))
    assert small.a.out_features == 4
    assert list(small.slimming.kept) == ["D"]


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.aux = nn.Linear(10, 3)

    def forward(self, x):
        h = F.relu(self.b(F.relu(self.a(x))))
        return (self.o(h), self.aux(h)) if self.training else (self.o(h),)


def test_a_branch_of_training_costs_its_own_set_only():
    network = Auxiliary().eval()
    network.b.weight.data[:, :4] = 0
    network.o.weight.data[:, :5] = 0
    small = slim(network, torch.randn(3, 6))
    assert (small.a.out_features, small.b.out_features) == (4, 10)
    x = torch.randn(5, 6)
    for one, other in zip(network.train()(x), small.train()(x), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


class Sampling(nn.Module):
    """Random in evaluation, by torch, by Python and by numpy."""

    def __init__(self, draw):
        super().__init__()
        self.e, self.d, self.o, self.draw = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3), draw
        self.mu = nn.Linear(8, 4)

    def forward(self, x):
        mu = self.mu(F.relu(self.e(x)))
        return self.o(F.relu(self.d(mu + self.draw(mu))))


def _python(mu):
    import random

    return random.random()


def _numpy(mu):
    import numpy

    return float(numpy.random.rand())


@pytest.mark.parametrize("draw", [torch.randn_like, _python, _numpy])
def test_random_in_evaluation(draw):
    network = Sampling(draw).eval()
    network.mu.weight.data[:, :4] = 0
    network.o.weight.data[:, :6] = 0
    state = torch.get_rng_state()
    small = slim(network, torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert (small.e.out_features, small.d.out_features) == (4, 2)


def test_compiled_parts_run_eagerly():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    network[2].weight.data[:, :6] = 0
    compiled = nn.Sequential(torch.compile(network, backend="eager"), nn.Linear(3, 2)).eval()
    small = slim(compiled, torch.randn(2, 6))
    assert small[0]._orig_mod[0].out_features == 2


def test_a_constant_of_one_length_is_none():
    """It depends on the lengths, which are equal in the example."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(6, 8), nn.Linear(9, 3)

        def forward(self, x, lengths):
            share = (lengths / 7.0)[:, None]
            return self.o(torch.cat([F.relu(self.a(x)), share], 1))

    network = Counts().eval()
    network.a.weight.data[:4] = 0
    small = slim(network, (torch.randn(2, 6), torch.tensor([7, 7])))
    assert difference(network, small, torch.randn(2, 6), torch.tensor([7, 2])) < 1e-5


# --- check= ---------------------------------------------------------------------------------------


def _rarely(x):
    return x.abs().max() > 50


def routed_by_size():
    network = Routed(_rarely).eval()
    network.i.weight.data[:8] = 0
    network.i.bias.data[:8] = 0
    return network


@pytest.mark.parametrize("kind", ["tensor", "list", "loader"])
def test_more_inputs_are_tried(kind):
    large = torch.full((4, 6), 100.0)
    check = {
        "tensor": large,
        "list": [torch.randn(2, 6), (large,)],
        "loader": DataLoader(TensorDataset(large, torch.zeros(4)), batch_size=2),
    }[kind]
    small = slim(routed_by_size(), torch.randn(2, 6), check=check)
    assert "experts.1" not in small.slimming.kept
    assert "does not run without them" in small.slimming.kept["i"]


def test_a_check_that_does_not_fit_is_named():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with raises_naming(r"check[1] must be what Sequential takes", "(2, 5)"):
        slim(network, torch.randn(2, 6), check=[torch.randn(2, 6), torch.randn(2, 5)])
    with raises_naming("check must be inputs, or a loader of them, got 3"):
        slim(network, torch.randn(2, 6), check=3)


# --- variations -----------------------------------------------------------------------------------


def test_values_stay_in_their_range():
    given = (
        torch.randn(3, 4),
        torch.tensor([9, 9, 9]),
        torch.tensor([2, 5, 3]),
        torch.ones(3, 5, dtype=torch.long),
        torch.ones(3, 5, dtype=torch.bool),
        "mean",
    )
    examples, fixed = variations(given, lambda _: True)
    assert fixed == []
    assert len(examples) == 3
    for _, lengths, tokens, mask, flags, word in examples:
        assert word == "mean"
        assert 1 <= int(lengths.min()) <= int(lengths.max()) == 9
        assert 2 <= int(tokens.min()) <= int(tokens.max()) <= 5
        assert bool(((mask == 0) | (mask == 1)).all())
        assert flags.dtype == torch.bool
    assert any(int(x[1].min()) < 9 for x in examples)
    assert any(not bool(x[3].all()) for x in examples)
    assert any(not bool(x[4].all()) for x in examples)


def test_a_network_that_refuses_is_asked_again():
    def sorted_lengths(example):
        lengths = example[1]
        return bool((lengths[:-1] >= lengths[1:]).all())

    examples, fixed = variations((torch.randn(3, 4), torch.tensor([9, 9, 9])), sorted_lengths)
    assert fixed == []
    assert all(sorted_lengths(x) for x in examples)
    assert any(int(x[1].min()) < 9 for x in examples)


def test_what_cannot_be_varied_is_said():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x, steps):
            if steps.tolist() != [1, 4]:
                raise ValueError("other steps")
            return self.o(F.relu(self.a(x)))

    network = Picky().eval()
    network.o.weight.data[:, :4] = 0
    small = slim(network, {"x": torch.randn(2, 6), "steps": torch.tensor([1, 4])})
    assert small.a.out_features == 4
    assert small.slimming.fixed == ["steps"]
    assert "own values only: steps" in str(small.slimming)

"""A slim network: smaller as expected by hand, the same outputs, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from lightning_wgsef.network.slim_modules import Skip, SlimAttention
from lightning_wgsef.slimming.slim import slim
from tests.helpers.networks.slim import (
    IMAGE,
    SEQUENCE,
    VECTOR,
    Block,
    Residual,
    check,
    convolutions,
    drawn,
    outputs,
    pruned,
    shapes,
    transformer,
)


@pytest.mark.parametrize("grouping", ["filter", "structure"])
def test_filters(grouping):
    network = convolutions(nn.BatchNorm2d(8), nn.ReLU())
    pruned(network, grouping, 0, 2, 7, example=IMAGE if grouping == "structure" else None)
    small = slim(network, IMAGE)
    assert shapes(small) == {"0.weight": (5, 3, 3, 3), "3.weight": (4, 5, 1, 1)}
    assert torch.equal(small[0].weight, network[0].weight[[1, 3, 4, 5, 6]])
    assert small.slimming.kept == {}
    check(network, IMAGE, small)


def test_channels_that_nobody_reads_take_their_producer_along():
    network = convolutions(nn.BatchNorm2d(8), nn.Sigmoid())
    pruned(network, "channel", 1, 6)
    small = slim(network, IMAGE)
    assert shapes(small) == {"0.weight": (6, 3, 3, 3), "3.weight": (4, 6, 1, 1)}
    check(network, IMAGE, small)


def test_one_round_makes_room_for_the_next():
    """The second layer reads nothing but a filter of the first that goes."""
    network = drawn(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()))
    network.append(nn.Linear(4, 2))
    with torch.no_grad():
        network[2].weight[:3, 0] = 0  # only the last row reads unit 0,
        network[4].weight[:, 3] = 0  # and nobody reads the last row
    small = slim(network, VECTOR)
    assert shapes(small) == {"0.weight": (4, 6), "2.weight": (3, 4), "4.weight": (2, 3)}
    assert len(small.slimming.plans) >= 1
    check(network, VECTOR, small)


def test_what_stays_at_first_and_goes_later_is_not_reported():
    """The border keeps the constant of "0" until nobody reads the layer behind it."""
    convolution = nn.Conv2d(8, 4, 3, padding=1)
    network = drawn(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), convolution, nn.Tanh(), nn.Conv2d(4, 2, 1))
    )
    with torch.no_grad():
        network[0].weight[2] = 0
        convolution.weight[1:, 2] = 0  # only filter 0 reads it,
        network[4].weight[:, 0] = 0  # which nobody reads
    small = slim(network, IMAGE)
    assert shapes(small) == {
        "0.weight": (7, 3, 3, 3),
        "2.weight": (3, 7, 3, 3),
        "4.weight": (2, 3, 1, 1),
    }
    assert small.slimming.kept == {}
    check(network, IMAGE, small)


def test_residual_sums_go_as_a_whole():
    network = drawn(Residual())
    pruned(network, "structure", 0, 3, 6 + 2, 6 + 8 + 7, example=IMAGE)
    small = slim(network, IMAGE)
    assert shapes(small) == {
        "stem.weight": (4, 3, 3, 3),
        "block.inner.weight": (7, 4, 3, 3),
        "block.outer.weight": (4, 7, 1, 1),
        "other.inner.weight": (7, 4, 3, 3),
        "other.outer.weight": (4, 7, 1, 1),
        "last.weight": (2, 4),
    }
    check(network, IMAGE, small)


def test_filters_of_one_part_of_a_sum_stay():
    network = pruned(drawn(Residual()), "filter", 0, 1)  # of the stem
    small = slim(network, IMAGE)
    assert shapes(small) == shapes(network)
    check(network, IMAGE, small)


def test_whole_blocks():
    network = drawn(Residual())
    pruned(network, "layer", 0, example=IMAGE)
    small = slim(network, IMAGE)
    assert isinstance(small.block, Skip)
    assert isinstance(small.other, Block)
    check(network, IMAGE, small)


def test_heads_and_hidden_units():
    network = transformer()
    pruned(network, {"*self_attn": "head", "*linear1": "hidden"}, 1, 4, 5, 8 + 2, 8 + 16)
    small = slim(network, SEQUENCE)
    first, second = small.layers
    assert isinstance(first.self_attn, SlimAttention)
    assert (first.self_attn.num_heads, second.self_attn.num_heads) == (3, 2)
    assert (first.linear1.out_features, second.linear1.out_features) == (15, 15)
    assert small.slimming.difference[1] is None or small.slimming.difference[1] < 1e-5
    one, two = outputs(network, SEQUENCE), outputs(small, SEQUENCE)
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_hooks_flags_and_model_survive(training):
    network = convolutions(nn.BatchNorm2d(8), nn.ReLU()).train(training)
    network[1].eval()
    network[0].bias.requires_grad_(False)
    pruned(network, "filter", 1)
    calls = []
    network[2].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(network.state_dict())
    small = slim(network, IMAGE)
    modes = [module.training for module in small.modules()]
    assert modes == [training, training, False, training, training, training]
    assert [m.training for m in network.modules()] == modes
    assert not small[0].bias.requires_grad
    assert small[0].weight.requires_grad
    calls.clear()
    small(IMAGE)
    assert calls == [1]
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert shapes(network)["0.weight"] == (8, 3, 3, 3)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner = nn.Embedding(9, 6), nn.Linear(6, 8)
            self.outer, self.head = nn.Linear(8, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens):
            x = self.words(tokens)
            return self.head(x + self.outer(relu(self.inner(x))))

    network = Tied()
    pruned(network, "filter", 1, 2)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    small = slim(network, tokens)
    assert small.head.weight is small.words.weight
    assert small.inner.weight.shape == (6, 6)
    check(network, tokens, small)

"""What the graph library, torch or somebody's network throws becomes a reason with a name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from lightning_wgsef import group_parameters, slim
from lightning_wgsef.network.example_input import model_copy
from tests.helpers.groups import raises_naming


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.p = nn.Linear(8, 16)
        self.g = getattr(nn, kind)(16, 12, batch_first=True)
        self.f = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x, lengths):
        x = nn.utils.rnn.pack_padded_sequence(F.relu(self.p(x)), lengths, batch_first=True)
        states = self.g(x)[1]
        return self.f(states[0][-1] if isinstance(states, tuple) else states[-1])


class Loop(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.p, self.g = nn.Linear(8, 16), getattr(nn, kind)(16, 12)
        self.f = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.g(F.relu(self.p(x[:, step])), state)
        return self.f(state[0] if isinstance(state, tuple) else state)


PACKED = (torch.randn(3, 7, 8), torch.tensor([7, 5, 3]))
NETWORKS = {
    "packed GRU": (Packed("GRU"), PACKED),
    "packed LSTM": (Packed("LSTM"), PACKED),
    "packed RNN": (Packed("RNN"), PACKED),
    "loop of GRUCell": (Loop("GRUCell"), torch.randn(3, 4, 8)),
    "loop of LSTMCell": (Loop("LSTMCell"), torch.randn(3, 4, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("grouping", ["structure", "filter", "channel"])
def test_recurrence_is_a_reason(name, grouping):
    network, example = NETWORKS[name]
    groups = group_parameters(network, grouping, example_input=example)
    own = [layer.name for layer in groups.layers]
    assert ("f.0" if grouping != "channel" else "f.2") in own


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rest_becomes_smaller(name):
    network, example = NETWORKS[name]
    network = model_copy(network).eval()
    network.f[2].weight.data[:, :8] = 0
    small = slim(network, example)
    assert small.f[0].out_features == 8


def test_what_cannot_be_copied_is_named():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    network.handle = (x for x in "ab")
    with raises_naming("'handle' (generator)", "make copy.deepcopy(model) work"):
        slim(network, torch.ones(1, 4))


def test_pruning_of_torch_is_named_with_its_end():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for layer in (network[0], network[2]):
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    network(torch.ones(1, 4))
    with raises_naming("0: its weight", "torch.nn.utils.prune.remove(module, 'weight')"):
        group_parameters(network, "channel")
    with raises_naming("'0.weight'", "torch.nn.utils.prune.remove(module, 'weight')"):
        slim(network, torch.ones(1, 4))


def test_data_is_shared_by_copies():
    network = nn.Linear(4, 2)
    network.data = torch.zeros(2_000_000)
    network.samples = list(range(5_000))
    network.sizes = [1, 2]
    copied = model_copy(network)
    assert copied.data is network.data
    assert copied.samples is network.samples
    assert copied.sizes is not network.sizes
    assert copied.weight is not network.weight


def test_a_frozen_backbone_can_be_named():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).requires_grad_(False)
    with raises_naming("1: frozen: 1.weight has no gradient", "include=['1']"):
        group_parameters(network, "channel")
    assert group_parameters(network, "channel", include=["1"]).layers[0].name == "1"

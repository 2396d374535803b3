"""Example inputs with a meaning, outputs that are not finite, networks that draw at random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import slim
from lightning_wgsef.network.example_input import accepted_variation
from tests.helpers.removal import drawn, removal

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(4, 6, generator=GENERATOR)


def mlp(inputs: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 4))


class Boxes(nn.Module):
    """Widths x1 - x0 >= 0 are looked up, as LayoutLM does."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.net = nn.Embedding(50, 6), mlp()

    def forward(self, boxes: Tensor) -> Tensor:
        outputs: Tensor = self.net(self.width(boxes[..., 1] - boxes[..., 0]))
        return outputs


BOXES = torch.tensor([[[0, 5], [3, 30], [10, 12]], [[1, 2], [8, 9], [4, 44]]])


class Packed(nn.Module):
    """Lengths in descending order, as pack_padded_sequence wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.net = nn.LSTM(5, 6, batch_first=True), mlp()

    def forward(self, steps: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True)
        outputs: Tensor = self.net(self.rnn(packed)[1][0][-1])
        return outputs


PACKED = (torch.randn(4, 7, 5, generator=GENERATOR), torch.tensor([7, 6, 5, 2]))


class Nodes(nn.Module):
    """A graph convolution: edges are pairs of numbers of nodes, and there are no more nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            own = layer(nodes)
            found = torch.zeros_like(own).index_add(0, edges[1], own[edges[0]])
            nodes = torch.relu(found + own)
        outputs: Tensor = self.c(nodes)
        return outputs


NODES = (torch.randn(6, 5, generator=GENERATOR), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]))


@pytest.mark.parametrize(
    ("network", "example", "grouping"),
    [
        (Boxes(), BOXES, {"net.2": "channel"}),
        (Packed(), PACKED, {"net.2": "channel"}),
        (Packed(), PACKED, "structure"),
        (Packed(), PACKED, "hidden"),
        (Nodes(), NODES, "channel"),
        (Nodes(), NODES, "filter"),
        (Nodes(), NODES, "structure"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_variations_that_a_network_refuses_are_dropped(
    network: nn.Module, example: object, grouping: object
) -> None:
    assert not removal(network, example, grouping).obstacles


def test_what_may_be_varied_is() -> None:
    found = accepted_variation(Packed().eval(), PACKED)
    assert found is not None
    steps, lengths = found
    assert not torch.equal(steps, PACKED[0])
    assert torch.equal(lengths, PACKED[1])
    boxes = accepted_variation(Boxes(), BOXES)
    assert boxes is not None
    assert torch.equal(boxes[0], BOXES.roll(1, 0)), "the samples in another order, boxes whole"


def test_a_network_that_takes_its_example_alone() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, rows: Tensor) -> Tensor:
            if not torch.equal(rows.float(), ROWS):
                raise RuntimeError("another input")
            outputs: Tensor = self.net(rows)
            return outputs

    network = drawn(Only())
    assert accepted_variation(network, ROWS) is None
    network.net[2].weight.data[:, :9] = 0
    small = slim(network, ROWS)
    assert small.net[0].out_features == 7
    assert small.slimming.difference[1] is not None, "the example itself is trained on"


class Masked(nn.Module):
    """Logits that are -inf by design, and an output that is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("mask", torch.tensor([False, True, False, False]))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.net(rows)
        return outputs.masked_fill(self.mask, -torch.inf), outputs * torch.nan


@pytest.mark.parametrize("grouping", ["channel", "structure"])
def test_what_is_not_finite_in_both_is_equal(grouping: str) -> None:
    found = removal(Masked(), ROWS, grouping)
    assert found.small.net[0].out_features == 8
    assert found.small.slimming.difference[0] < 1e-5


def test_not_finite_in_one_of_both_is_a_difference() -> None:
    network = drawn(Masked())
    network.net[2].weight.data[:, 0] = 0
    network.net[0].weight.data[0] = torch.nan  # 0 times NaN reaches every output
    assert slim(network, ROWS).slimming.kept


class Noisy(nn.Module):
    """Random in both modes, as with stochastic depth that nobody switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = mlp(), nn.Linear(6, 4)

    def forward(self, rows: Tensor) -> Tensor:
        keep = torch.rand(len(rows), 1, dtype=rows.dtype) > 0.5
        outputs: Tensor = self.other(rows) + keep * self.net(rows)
        return outputs


def test_random_numbers_are_the_same_on_both_sides() -> None:
    found = removal(Noisy(), ROWS, {"net.2": "channel"})
    assert found.small.net[0].out_features == 8
    evaluated, trained = found.small.slimming.difference
    assert evaluated < 1e-5
    assert trained < 1e-5


def test_random_numbers_of_others_are_left_alone() -> None:
    network = drawn(Noisy())
    state = torch.get_rng_state()
    slim(network, ROWS)
    assert torch.equal(torch.get_rng_state(), state)


class Cancelling(nn.Module):
    """Float32's rounding of a large mean is most of what an InstanceNorm leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 64, 1), nn.Conv1d(64, 8, 1)
        self.norm, self.last = nn.InstanceNorm1d(8), nn.Conv1d(8, 4, 1)

    def forward(self, steps: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(steps))) + 1e4
        outputs: Tensor = self.last(self.norm(hidden))
        return outputs


@pytest.mark.parametrize("grouping", ["structure", "filter", "channel"])
def test_float64_decides_where_rounding_is_large(grouping: str) -> None:
    steps = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    found = removal(
        Cancelling(), steps, grouping, include="*first" if grouping != "channel" else "*second"
    )
    assert not found.obstacles
    assert found.small.first.out_channels == 32

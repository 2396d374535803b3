"""Channels through products of matrices: handed on where no sum runs along them, else refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import group_parameters
from lightning_wgsef.network import dependency_graph
from tests.helpers.removal import removal

NODES = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
EDGES = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)).softmax(1)
OUTPUTS = "its channels are the network's outputs"
BMM = "its channels are mixed by BmmBackward0"


class Graph(nn.Module):
    """Two layers of a graph convolution: features times weights, edges times features."""

    def __init__(self, spread) -> None:
        super().__init__()
        self.spread = spread
        self.a, self.b, self.out = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 3)
        self.register_buffer("edges", EDGES)

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        edges = self.edges if edges is None else edges
        for layer in (self.a, self.b):
            x = torch.relu(self.spread(edges, layer(x)))
        found: Tensor = self.out(x)
        return found


class Learned(Graph):
    """The edges are learned, too."""

    def __init__(self) -> None:
        super().__init__(torch.matmul)
        self.one, self.other = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        return super().forward(x, (self.one @ self.other).softmax(-1))


class Repeated(Graph):
    """Many products without a layer between, and layers that are used more than once."""

    def __init__(self) -> None:
        super().__init__(torch.matmul)
        self.again = nn.Linear(12, 12)

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        x = first = self.a(x)
        for _ in range(350):  # more than recursion would follow
            x = 0.9 * (self.edges @ x) + 0.1 * first
        for _ in range(2):
            x = torch.relu(self.edges @ self.again(x)) + x
        found: Tensor = self.out(self.edges @ self.b(x))
        return found


class ChannelsFirst(nn.Module):
    """Time series of the nodes of a graph, by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(7, 12, 1), nn.Conv1d(12, 16, 1), nn.Conv1d(16, 3, 1)
        self.register_buffer("edges", torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x) @ self.edges)
        found: Tensor = self.out(torch.relu(self.b(x) @ self.edges))
        return found


class Attention(nn.Module):
    """One head: what it weighs keeps its channels, what the weights are made of does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        found: Tensor = self.out(weights @ self.v(x))
        return found


class NonLocal(nn.Module):
    """A non-local block, as in networks for videos."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.theta, self.phi, self.g = (nn.Conv2d(8, 4, 1) for _ in range(3))
        self.back, self.out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        mixed = (theta.transpose(1, 2) @ phi).softmax(-1) @ g.transpose(1, 2)
        mixed = mixed.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        found: Tensor = self.out(torch.relu(x + self.back(mixed)))
        return found


def einsum(equation):
    return lambda edges, x: torch.einsum(equation, edges, x)


IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
BOTH = {"a": 12, "b": 16}
NETWORKS = {
    "one graph": (lambda: Graph(torch.mm), NODES[0], BOTH),
    "a batch": (lambda: Graph(torch.matmul), NODES, BOTH),
    "a batch of steps": (lambda: Graph(torch.matmul), NODES[:, None].repeat(1, 3, 1, 1), BOTH),
    "given edges": (lambda: Graph(torch.matmul), (NODES, EDGES), BOTH),
    "edges of every sample": (lambda: Graph(torch.bmm), (NODES, EDGES.repeat(2, 1, 1)), BOTH),
    "learned edges": (Learned, NODES, BOTH),
    "repeated": (Repeated, NODES, BOTH),
    "channels first": (ChannelsFirst, NODES, BOTH),
    "einsum": (lambda: Graph(einsum("ij,jc->ic")), NODES[0], BOTH),
    "einsum of a batch": (lambda: Graph(einsum("ij, bjc -> bic")), NODES, BOTH),
    "attention": (Attention, NODES, {"v": 12}),
    "a non-local block": (NonLocal, IMAGES, {"stem": 8, "g": 4}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_no_sum_runs_along_are_taken_out(name: str) -> None:
    make, example, expected = NETWORKS[name]
    found = removal(make(), example, "structure")  # compares the outputs
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == expected
    widths = {layer: len(found.small.get_submodule(layer).weight) for layer in expected}
    assert widths == {n: count // 2 for n, count in expected.items()}


class TwoLayers(nn.Module):
    def __init__(self, product, width=7, out=7) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(out, 3)
        self.own, self.product = nn.Parameter(torch.randn(width, width)), product

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.product(self, x))
        return found


MIXED = {
    "own weights": (lambda net, x: torch.relu(net.a(x)) @ net.own + net.b(x), ["a"]),
    "a Gram matrix": (lambda net, x: net.a(x).transpose(1, 2) @ net.b(x), ["a", "b"]),
    "its own product": (lambda net, x: net.a(x) @ net.a(x) + net.b(x), ["a"]),
    "left and right": (lambda net, x: x[..., :7] @ net.a(x) + net.a(x) @ net.b(x), ["a"]),
    "linear attention": (
        lambda net, x: net.b(x) @ (net.a(x).sigmoid().transpose(1, 2) @ net.a(x)),
        ["a", "b"],
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_channels_that_a_sum_runs_along_are_left_out(name: str) -> None:
    product, mixed = MIXED[name]
    with pytest.raises(ValueError, match="no layer that grouping='structure' can group") as error:
        group_parameters(TwoLayers(product), "structure", example_input=NODES)
    for layer in mixed:
        assert f"\n  {layer}: {BMM}" in str(error.value)


def test_a_wrong_operand_is_seen_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(nodes):
        return {x: x.inputs[0] for x in nodes if "Bmm" in type(x.grad_fn).__name__}

    monkeypatch.setattr(dependency_graph, "carried_operands", first)
    network = TwoLayers(lambda net, x: torch.relu(net.a(x)) @ net.own)
    del network.b  # which it does not run
    with pytest.raises(ValueError, match="a: the network does not run without them"):
        group_parameters(network, "structure", example_input=NODES)

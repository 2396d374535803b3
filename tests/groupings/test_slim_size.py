"""The size of the slim network as widths say it, against what slim makes, counted."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_wgsef import Groups, group_parameters, slim
from lightning_wgsef.groupings.slim_size import slim_size
from lightning_wgsef.groups.size import WidthLimits
from lightning_wgsef.network.example_input import with_batch_size
from lightning_wgsef.network.flops import layer_flops
from tests.helpers.groups import mlp, raises_naming
from tests.helpers.networks.real import real_network
from tests.helpers.networks.slim import Residual
from tests.helpers.removal import drawn


class Encoder(nn.Module):
    """torch's own attention and MLP, behind a projection."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.body = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


class Recurrent(nn.Module):
    """A convolution over time, and LSTM and GRU on it, of which torch fuses the first on CPUs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 9, 3, padding=1)
        self.first = nn.LSTM(9, 7, 2, batch_first=True, bidirectional=True)
        self.second, self.last = nn.GRU(14, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        steps = torch.relu(self.conv(x)).transpose(1, 2)
        return self.last(self.second(self.first(steps)[0])[0][:, -1])


def grouped():
    """Parts of a grouped convolution, a depthwise one, and a layer that reads flattened images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )


class Inverted(nn.Module):
    """As in MobileNetV2: a wide depthwise convolution between two narrow ones, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.wide, self.norm = nn.Conv2d(5, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.narrow = nn.Conv2d(12, 5, 1)
        self.last = nn.Linear(5 + 12, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        inside = torch.relu(self.depth(torch.relu(self.norm(self.wide(x)))))
        both = torch.cat([torch.relu(x + self.narrow(inside)), inside], 1)
        return self.last(both.mean((2, 3)))


OWN = {
    "torch": (Encoder, torch.randn(2, 5, 3)),
    "grouped": (grouped, torch.randn(1, 3, 8, 8)),
    "recurrent": (Recurrent, torch.randn(2, 4, 5)),
    "residual": (Residual, torch.rand(1, 3, 6, 6)),
    "inverted residual": (Inverted, torch.rand(1, 3, 6, 6)),
    "blocks": (Residual, torch.rand(1, 3, 6, 6)),
}

CASES = [
    ("LeNet-5", "structure"),
    ("LeNet-5", "channel"),
    ("VGG16-BN", "filter"),
    ("residual", "structure"),
    ("inverted residual", "structure"),
    ("DenseNet40", "structure"),
    ("UNet", "channel"),
    ("ConvNeXt", "layer"),
    ("ViT", {"*.attention": "head", "*.mlp": "hidden"}),
    ("BERT", "head"),
    ("GPT-2", "head"),
    ("Llama", "head"),
    ("T5", "hidden"),
    ("torch", {"*attn": "head", "*linear1": "hidden"}),
    ("grouped", "structure"),
    ("recurrent", "structure"),
    ("blocks", "layer"),
]


def counted(network, example):
    values = {id(x): x for x in [*network.parameters(), *network.buffers()]}.values()
    return {
        "flops": layer_flops(network, with_batch_size(example, 2))[1] / 2,
        "params": sum(p.numel() for p in network.parameters()),
        "bytes": sum(x.numel() * x.element_size() for x in values),
    }


@pytest.mark.parametrize(("name", "grouping"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_what_slim_makes_has_the_size_that_was_foretold(name, grouping):
    """Random numbers alive of every layer, down to one; exactly, operations of a sample too."""
    if name in OWN:
        torch.manual_seed(0)
        make, example = OWN[name]
        network = make()
    else:
        network, example = real_network(name)
    network = drawn(network)
    layers = group_parameters(network, grouping, 1.0, example_input=example).layers
    layers = [layer for layer in layers if layer.removable]
    sizes = {x: slim_size(network, layers, x, example) for x in ("flops", "params", "bytes")}
    dense = counted(network, example)
    assert {name: float(size.total) for name, size in sizes.items()} == dense
    generator = torch.Generator().manual_seed(3)
    alive = []
    for layer in layers:
        kept = 1 + int(torch.randint(layer.count, (), generator=generator))
        order = torch.randperm(layer.count, generator=generator)
        alive.append(order < kept)
    alive = torch.cat(alive)
    Groups(layers).scale_(alive.float())
    small = counted(slim(network, example), example)
    assert {name: float(size.of(alive)) for name, size in sizes.items()} == small
    assert small["params"] < dense["params"]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_operations_of_recurrent_layers(kind):
    """Two a weight and time step of a sample; what torch fuses, it does not count."""
    layer = getattr(nn, kind)(5, 4, 2, bidirectional=True)
    weights = sum(p.numel() for name, p in layer.named_parameters() if "weight" in name)
    assert layer_flops(layer, torch.randn(6, 3, 5))[1] == 2 * 6 * 3 * weights


def test_the_cost_of_a_group_is_what_it_saves():
    """To first order: a product of two widths of its own layer has a mixed term."""
    network = mlp(4, 6, 5, 3)
    layers = group_parameters(
        network, "filter", example_input=torch.ones(1, 4), include=["0", "2"]
    ).layers
    size = slim_size(network, layers, "params", torch.ones(1, 4))
    alive = torch.arange(11) != 3  # five of six, and all five
    costs = size.costs(alive)
    assert costs.tolist() == [4 + 1 + 5] * 6 + [5 + 1 + 3] * 5
    less = alive & (torch.arange(11) != 10)
    assert float(size.of(alive) - size.of(less)) == costs[10]


def fitting_by_hand(strengths, counts, limits, size, budget):
    """Numbers of each layer: the least, steps by mean square while they fit, what still fits."""
    order, kept, most, steps = [], [], [], []
    for part, (least, highest, multiple) in zip(strengths, limits, strict=True):
        own = sorted(part.tolist(), reverse=True)
        alive = sum(x > 0 for x in own) // multiple * multiple
        kept.append(least)
        most.append(max(least, min(highest, alive)))
        steps.append(multiple)
        for start in range(least, most[-1], multiple):
            mean = sum(x * x for x in own[start : start + multiple]) / multiple
            order.append((-mean, len(kept) - 1, start))
    order.sort()

    def fits(layer):
        more = [n + steps[i] * (i == layer) for i, n in enumerate(kept)]
        alive = torch.cat([torch.arange(c) < n for c, n in zip(counts, more, strict=True)])
        return float(size.of(alive)) <= budget

    while order and fits(order[0][1]):
        kept[order[0][1]] += steps[order.pop(0)[1]]
    for layer in dict.fromkeys(layer for _, layer, _ in order):
        while kept[layer] < most[layer] and fits(layer):
            kept[layer] += steps[layer]
    return kept


@pytest.mark.parametrize(
    "limits",
    [
        [(1, 6, 1), (1, 5, 1)],
        [(3, 6, 1), (2, 4, 1)],
        [(2, 6, 2), (1, 5, 1)],
        [(2, 4, 2), (3, 3, 3)],
    ],
)
def test_what_fits_a_budget_in_the_order_of_strengths(limits):
    """Against loops, at budgets on both sides of every size that there is."""
    network = mlp(4, 6, 5, 3)
    layers = group_parameters(network, "structure", example_input=torch.ones(1, 4)).layers
    layers = [
        replace(layer, least=least, most=most, multiple=multiple)
        for layer, (least, most, multiple) in zip(layers, limits, strict=True)
    ]
    size = slim_size(network, layers, "flops", torch.ones(1, 4))
    found_limits = WidthLimits.of(layers, torch.device("cpu"))
    every = [
        float(size.of(torch.cat([torch.arange(6) < a, torch.arange(5) < b])))
        for a in range(1, 7)
        for b in range(1, 6)
    ]
    least = float(
        size.of(torch.cat([torch.arange(6) < limits[0][0], torch.arange(5) < limits[1][0]]))
    )
    for seed, dead in ((0, []), (1, []), (2, [1, 7, 8])):
        strengths = torch.rand(11, generator=torch.Generator().manual_seed(seed)).double()
        strengths[dead] = 0
        strengths[2] = strengths[9] = 0.5
        parts = strengths.split([6, 5])
        for budget in sorted({*every, *(x - 1 for x in every)}):
            found = size.fitting(strengths, found_limits, torch.tensor(budget).double())
            kept = [int(part.sum()) for part in found.split([6, 5])]
            assert kept == fitting_by_hand(parts, [6, 5], limits, size, budget)
            assert float(size.of(found)) <= max(budget, least)
            for part, own in zip(parts, found.split([6, 5]), strict=True):
                if 0 < int(own.sum()) < len(own):
                    assert part[own].min() >= part[~own].max()


@pytest.mark.parametrize(
    ("grouping", "words"),
    [
        ("element", ["'0' (groups of 'element' stay in place)", "exclude="]),
        ("filter", ["'0' ('1' (Sigmoid) turns 0 into 0.5)", "exclude=['0'", "'structure'"]),
    ],
)
def test_groups_that_stay_in_place(grouping, words):
    network = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    example = torch.ones(1, 4)
    groups = group_parameters(network, grouping, example_input=example)
    with raises_naming("slim", *words):
        slim_size(network, groups.layers, "params", example)


def test_a_size_that_widths_do_not_tell():
    """A network that does one product more as soon as it is narrow."""

    class Narrow(nn.Sequential):
        def forward(self, x):
            x = self[1](self[0](x))
            return x + self[1].weight.sum() * (x @ x.mT @ x if len(self[0].weight) < 6 else 1)

    network = Narrow(nn.Linear(4, 6), nn.Linear(6, 2))
    example = torch.ones(3, 4)
    layers = group_parameters(network, "hidden").layers
    layers = layers or group_parameters(network, "structure", example_input=example).layers
    with raises_naming("widths", "exclude=['0']"):
        slim_size(network, layers, "flops", example)

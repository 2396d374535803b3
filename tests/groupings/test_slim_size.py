"""The size of the slim network as widths say it, against what slim makes, counted."""

import pytest
import torch
from torch import nn

from lightning_wgsef import Groups, group_parameters, slim
from lightning_wgsef.groupings.slim_size import slim_size
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


def test_what_fits_a_budget_in_the_order_of_strengths():
    """Against a loop over all beginnings; then nothing more fits, and the smaller never loses."""
    network = mlp(4, 6, 5, 3)
    layers = group_parameters(network, "structure", example_input=torch.ones(1, 4)).layers
    size = slim_size(network, layers, "flops", torch.ones(1, 4))
    strengths = torch.rand(11, generator=torch.Generator().manual_seed(0)).double()
    strengths[2] = strengths[8] = 0.5
    order = sorted(range(11), key=lambda j: -strengths[j])
    first = torch.zeros(11, dtype=torch.bool)
    for kept in ([], [0, 6], order[-2:]):
        first = torch.isin(torch.arange(11), torch.tensor(kept, dtype=torch.long))
        own = kept + [j for j in order if j not in kept]
        sets = [torch.isin(torch.arange(11), torch.tensor(own[:n] or [-1])) for n in range(12)]
        sizes = [float(size.of(one)) for one in sets]
        for budget in sorted({*sizes, *(x + 1 for x in sizes), 0.5}):
            longest = max([n for n in range(12) if sizes[n] <= budget and n >= len(kept)] or [0])
            longest = max(longest, len(kept))
            found = size.fitting(strengths, first, torch.tensor(budget).double())
            assert bool(found[sets[longest]].all())
            assert float(size.of(found)) <= max(budget, sizes[len(kept)])
            for j in (~found).nonzero().flatten():
                more = found.index_fill(0, j, True)
                assert float(size.of(more)) > budget
                alike = [i for i in range(11) if (i < 6) == (j < 6) and i != j and found[i]]
                assert all(strengths[i] >= strengths[j] or i in kept for i in alike)


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

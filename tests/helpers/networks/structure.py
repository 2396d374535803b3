"""Small networks to find the structure of, and a slow twin that cuts channels out of them.

Their activations are smooth, so that every channel matters whatever its weights are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from tests.helpers.networks.transformers import drawn


@dataclass
class Tie:
    """What the channels of one layer of groups are tied to, by name of parameter.

    Attributes:
        made: axis, and for each group its positions on it, of what makes the channels.
        read: the same of what reads them, which a removed channel takes along.
        normalised: channels are normalised with each other, so that none leaves without a trace.
    """

    made: dict
    read: dict = field(default_factory=dict)
    reserved: str = ""
    normalised: bool = False


def own(count, first=0):
    """Group j has position first + j."""
    return [[first + j] for j in range(count)]


def runs(count, length):
    """Group j has positions length j, .., length j + length - 1."""
    return [list(range(length * j, length * (j + 1))) for j in range(count)]


def parts(count, number):
    """Group j has position j in each of ``number`` parts."""
    return [[j + count * part for part in range(number)] for j in range(count)]


def made(places, *layers, axis=0):
    """Weights and biases of the layers whose outputs are at these places."""
    found = {f"{layer}.weight": (axis, places) for layer in layers}
    return found | {f"{layer}.bias": (0, places) for layer in layers}


def weights(places, *layers, axis=0):
    return {f"{layer}.weight": (axis, places) for layer in layers}


def read(places, *layers, axis=1):
    """The weights of the layers whose inputs are at these places."""
    return weights(places, *layers, axis=axis)


def run(network, example):
    """The one output of a network."""
    if isinstance(example, dict):
        found = network(**example)
    else:
        found = network(*example) if isinstance(example, tuple) else network(example)
    return next(iter(found.values())) if isinstance(found, dict) else found


def randomised(network):
    """The network in float64 and evaluation mode, with no weight, bias or statistic at rest."""
    network = drawn(network.double())
    generator = torch.Generator().manual_seed(2)
    for name, values in network.named_buffers():
        if name.endswith("running_mean"):
            values.normal_(generator=generator)
        elif name.endswith("running_var"):
            values.uniform_(0.5, 2, generator=generator)
    return network


def removed(network, tie, group):
    """A copy without the channels of a group: the slow twin, which knows of no graph."""
    network = copy.deepcopy(network)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, (axis, places) in [*tie.made.items(), *tie.read.items()]:
        statistics = [name.replace(".weight", f".running_{kind}") for kind in ("mean", "var")]
        for cut in {name, *statistics} & tensors.keys():
            _cut(tensors[cut], axis, places[group])
    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(module.weight.shape)
        if isinstance(module, nn.InstanceNorm2d):
            module.num_features = len(module.weight)
        if isinstance(module, nn.GroupNorm):
            whole = module.num_groups == module.num_channels
            module.num_groups = len(module.weight) if whole else module.num_groups
        if getattr(module, "in_channels", None) == getattr(module, "groups", 0):  # depthwise
            module.groups = len(module.weight)
    return network


def _cut(tensor, axis, places):
    """Take slices out in place, so that a tensor cut twice, or shared, stays the same object."""
    kept = [place for place in range(tensor.shape[axis]) if place not in places]
    tensor.data = tensor.data.index_select(axis, torch.tensor(kept))


class Residual(nn.Module):
    """A stem, a block with an identity, one with a 1x1 shortcut, and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        for block, outputs in (("a", 4), ("b", 5)):
            self.add_module(f"{block}_conv1", nn.Conv2d(4, 6, 3, padding=1, bias=False))
            self.add_module(f"{block}_norm1", nn.BatchNorm2d(6))
            self.add_module(f"{block}_conv2", nn.Conv2d(6, outputs, 3, padding=1, bias=False))
            self.add_module(f"{block}_norm2", nn.BatchNorm2d(outputs))
        self.b_shortcut = nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 3)

    def branch(self, block, x):
        modules = dict(self.named_children())
        x = functional.silu(modules[f"{block}_norm1"](modules[f"{block}_conv1"](x)))
        return modules[f"{block}_norm2"](modules[f"{block}_conv2"](x))

    def forward(self, x):
        x = functional.silu(self.norm(self.conv(x)))
        x = functional.silu(x + self.branch("a", x))
        x = functional.silu(self.b_shortcut(x) + self.branch("b", x))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    """An inverted residual block, as in MobileNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.wide = nn.Conv2d(4, 6, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.each = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm2 = nn.BatchNorm2d(6)
        self.narrow = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        inner = functional.silu(self.norm1(self.wide(x)))
        x = x + self.narrow(functional.hardswish(self.norm2(self.each(inner))))
        return self.fc(x.mean((2, 3)))


class Concatenated(nn.Module):
    """A dense block: the second convolution reads the first, the norm reads both."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.c = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        a = self.a(x)
        return self.c(functional.silu(self.norm(torch.cat([a, self.b(a)], 1))))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.bottom = nn.Conv2d(4, 5, 3, padding=1)
        self.up = nn.ConvTranspose2d(5, 6, 2, stride=2)
        self.decoder = nn.Conv2d(10, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = functional.silu(self.encoder(x))
        below = functional.silu(self.bottom(functional.max_pool2d(x, 2)))
        x = torch.cat([functional.silu(self.up(below)), x], 1)
        return self.last(functional.silu(self.decoder(x)))


class Shared(nn.Module):
    """One convolution that is used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.twice = nn.Conv2d(4, 4, 3)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = functional.silu(self.stem(x))
        return self.last(functional.silu(self.twice(functional.silu(self.twice(x)))))


class ConvNeXt(nn.Module):
    """Patches, one block with its dense layers on the last axis, and a classifier."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, stride=4)
        self.each = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(4)
        self.wide = nn.Linear(4, 6)
        self.narrow = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.patches(x)
        inner = self.norm(self.each(x).permute(0, 2, 3, 1))
        inner = self.scale * self.narrow(functional.gelu(self.wide(inner)))
        return self.fc((x + inner.permute(0, 3, 1, 2)).mean((2, 3)))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(
            8, 2, 6, dropout=0.0, activation="gelu", batch_first=True
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.fc(self.block(x)[:, 0])


class Embedded(nn.Module):
    """Tokens, a residual block without a norm, and logits; with ``tied`` of the same weights."""

    def __init__(self, tied=False, norm=None):
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.wide = nn.Linear(4, 6)
        self.narrow = nn.Linear(6, 4)
        self.norm = nn.Identity() if norm is None else norm
        self.last = nn.Linear(4, 9)
        if tied:
            self.last.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens)
        return self.last(self.norm(x + self.narrow(functional.silu(self.wide(x)))))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3)
        self.vector = nn.Linear(5, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, image, vector):
        return {"logits": self.last(self.image(image).mean((2, 3)) + self.vector(vector))}

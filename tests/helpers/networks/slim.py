"""Networks for the tests of `slim`, how groups of them become zero, and what must be equal."""

import copy

import torch
from torch import nn
from torch.nn.functional import relu

from lightning_wgsef import group_parameters
from tests.helpers.groups import without

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTOR = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def drawn(network, seed=0):
    """With random biases, norms and statistics: fresh ones are zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.1 if name.endswith("running_var") else noise)
    return network


def pruned(network, grouping, *dead, example=None):
    """With groups of these numbers set to zero."""
    without(group_parameters(network, grouping, example_input=example), list(dead))
    return network


def outputs(network, example, training=False):
    twin = copy.deepcopy(network).train(training)
    with torch.no_grad():
        return twin(example)


def check(network, example, small):
    """The slim network is the other's equal, in both modes."""
    for training in (False, True):
        one, two = outputs(network, example, training), outputs(small, example, training)
        assert torch.allclose(one, two, atol=1e-5, rtol=1e-5)
    assert small.slimming.difference[0] <= 1e-5


def shapes(network):
    return {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1}


def convolutions(*between, last=None):
    return drawn(
        nn.Sequential(nn.Conv2d(3, 8, 3), *between, last or nn.Conv2d(8, 4, 1), nn.Flatten())
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.block = Block()
        self.other = Block()
        self.last = nn.Linear(6, 2)

    def forward(self, images):
        x = relu(self.norm(self.stem(images)))
        return self.last(self.other(self.block(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm1 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.outer, self.norm2 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        return relu(x + self.norm2(self.outer(relu(self.norm1(self.inner(x))))))


def transformer():
    layer = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.1, batch_first=True)
    return drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


SEQUENCE = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def silent(network, *filters):
    """Zero the weights of some filters of the first layer, and nothing else."""
    with torch.no_grad():
        network[0].weight[list(filters)] = 0
    return network

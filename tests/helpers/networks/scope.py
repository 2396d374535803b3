"""Networks whose layers compete for one budget, their costs by hand, and the set that must stay."""

import pytorch_lightning as pl
import torch
from torch import nn

from examples.data.batches import Batches
from lightning_wgsef import Homotopy

IMAGES = torch.ones(1, 1, 8, 8)
# Two for every weight and place: 8 x 8 places, behind the pooling 4 x 4, then one.
FLOPS = {"conv1": 2 * 72 * 64, "conv2": 2 * 1152 * 64, "conv3": 2 * 1728 * 16, "fc": 2 * 120}
CHANNELS = {"conv2": 8, "conv3": 16, "fc": 12}
# Of the network whose layers read a, b and c channels, which those before them make.
SIZES = {
    None: lambda a, b, c: a + b + c,
    "params": lambda a, b, c: 12 * a + 9 * a * b + 3 * b + 9 * b * c + 3 * c + 10 * c + 10,
    "flops": lambda a, b, c: 2 * (64 * 9 * a * (1 + b) + 16 * 9 * b * c + 10 * c),
}


def dense_costs(costs):
    """What a group of each layer costs while all others are there: its product's slope."""
    size, full = SIZES[costs], list(CHANNELS.values())
    less = [[n - (i == j) for j, n in enumerate(full)] for i in range(3)]
    return {name: size(*full) - size(*own) for name, own in zip(CHANNELS, less, strict=True)}


COSTS = {costs: dense_costs(costs) for costs in SIZES}


class Pictures(pl.LightningModule):
    """Random pictures of 8 x 8 in 10 classes; conv1, conv2, conv3, each with a norm, and fc."""

    example_input_array = IMAGES

    def __init__(self, scales=None):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)
        with torch.no_grad():
            for name, scale in (scales or {}).items():
                getattr(self, name).weight *= scale

    def forward(self, images):
        x = torch.relu(self.norm1(self.conv1(images)))
        x = nn.functional.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        return self.fc(torch.relu(self.norm3(self.conv3(x))).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def pictures(scales=None):
    pl.seed_everything(0, verbose=False)
    return Pictures(scales)


def loader(batches=15):
    random = torch.Generator().manual_seed(1)
    images = torch.randn(16 * batches, 1, 8, 8, generator=random)
    labels = torch.randint(10, (16 * batches,), generator=random)
    return Batches(images, labels, 16, shuffle=True)


def still(model, optimizer, steps=1):
    """Steps with gradients of zero."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def projected(regularizer, model):
    """Masks after one projection of the weights as they are."""
    assert isinstance(regularizer.schedule, Homotopy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer.attach(optimizer)
    still(model, optimizer, regularizer.schedule.length)
    assert regularizer.frozen
    return {name: mask.tolist() for name, mask in regularizer.masks.items()}


def expected(norms, costs, budget):
    """What stays: the strongest group of every layer, then others while they fit the budget.

    Strength is norm^2 / cost over the mean norm^2 of the layer.
    """
    rated, kept = [], {name: [False] * len(own) for name, own in norms.items()}
    for name, own in norms.items():
        mean = sum(norm**2 for norm in own) / len(own)
        strengths = [norm**2 / mean / c for norm, c in zip(own, costs[name], strict=True)]
        first = strengths.index(max(strengths))
        kept[name][first] = True
        budget -= costs[name][first]
        rated += [(s, name, j) for j, s in enumerate(strengths) if j != first]
    for _, name, number in sorted(rated, reverse=True):
        budget -= costs[name][number]
        if budget < -1e-9:
            break
        kept[name][number] = True
    return kept


def expected_of_size(norms, costs, budget):
    """What stays of a size: as `expected` does, and behind it, layer by layer, what still fits."""
    names, size = list(norms), SIZES[costs]
    rated = []
    for name, own in norms.items():
        mean = sum(norm**2 for norm in own) / len(own)
        strengths = [norm**2 / mean / COSTS[costs][name] for norm in own]
        order = sorted(range(len(own)), key=lambda j: -strengths[j])
        rated += [(strengths[j], name, place) for place, j in enumerate(order) if place]
    rated.sort(reverse=True)
    counts = dict.fromkeys(names, 1)

    def fits(name):
        return size(*(n + (other == name) for other, n in counts.items())) <= budget

    left = list(rated)
    while left and fits(left[0][1]):
        counts[left.pop(0)[1]] += 1
    for name in dict.fromkeys(name for _, name, _ in left):
        while counts[name] < len(norms[name]) and fits(name):
            counts[name] += 1
    return {
        name: [norm >= sorted(own, reverse=True)[counts[name] - 1] for norm in own]
        for name, own in norms.items()
    }


def channel_norms(model):
    weights = {name: getattr(model, name).weight.detach().double() for name in CHANNELS}
    return {name: w.transpose(0, 1).flatten(1).norm(dim=1).tolist() for name, w in weights.items()}

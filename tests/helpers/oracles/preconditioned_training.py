"""A slow twin of training with the metric prox, and small float64 networks for it to train.

The twin computes D from the optimizer's state by the formulas of the papers, lays every layer out
as one vector, and calls `prox_metric`, which is compared with an oracle elsewhere.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_wgsef import prox_metric

OPTIMIZERS = {
    "Adam": lambda p, **more: Adam(p, **{"lr": 0.01, **more}),
    "AdamW": lambda p, **more: AdamW(p, **{"lr": 0.01, "weight_decay": 0.1, **more}),
    "amsgrad": lambda p, **more: AdamW(p, **{"lr": 0.01, "amsgrad": True, **more}),
    "RMSprop": lambda p, **more: RMSprop(p, **{"lr": 0.01, "momentum": 0.5, **more}),
    "Adagrad": lambda p, **more: Adagrad(p, **{"lr": 0.01, "eps": 1e-8, **more}),
    "SGD": lambda p, **more: SGD(p, **{"lr": 0.02, "momentum": 0.9, **more}),
}


def network(conv2=None):
    """conv1 and norm1 of 6 filters, conv2 of 8, fc of 32 inputs; one for each call."""
    torch.manual_seed(0)
    modules = OrderedDict(
        conv1=nn.Conv2d(2, 6, 3),
        norm1=nn.BatchNorm2d(6),
        bend1=nn.Tanh(),
        conv2=nn.Conv2d(6, 8, 3) if conv2 is None else conv2(),
        bend2=nn.Tanh(),
        flat=nn.Flatten(),
        fc=nn.LazyLinear(3),
    )
    model = nn.Sequential(modules)
    model(torch.zeros(2, 2, 6, 6))
    return model.double()


def wide_network():
    """Layer "2" has 600 x 700 weights: more than one block."""
    torch.manual_seed(0)
    layers = (nn.Linear(2, 700), nn.Tanh(), nn.Linear(700, 600), nn.Tanh(), nn.Linear(600, 3))
    return nn.Sequential(*layers).double()


def batches(count, *shape):
    random = torch.Generator().manual_seed(1)
    shape = shape or (2, 6, 6)

    def some(*sizes):
        return torch.randn(16, *sizes, generator=random, dtype=torch.float64)

    return [(some(*shape), some(3)) for _ in range(count)]


def train(model, optimizer, batch):
    dtype = next(model.parameters()).dtype
    inputs, targets = (x.to(dtype) for x in batch)
    optimizer.zero_grad()
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()


def settings(optimizer, parameter):
    (found,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return found


def denominators(optimizer, parameter):
    """D: what the optimizer divides its averaged gradient by; 1 where it took no step."""
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, SGD) or not state:
        return torch.ones_like(parameter)
    group = settings(optimizer, parameter)
    if isinstance(optimizer, Adagrad):
        return state["sum"] ** 0.5 + group["eps"]
    if isinstance(optimizer, RMSprop):
        return state["square_avg"] ** 0.5 + group["eps"]
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return (square / (1 - group["betas"][1] ** float(state["step"]))) ** 0.5 + group["eps"]


def owners(member):
    """The group of every weight, -1 for none, shaped like the parameter."""
    numbers = torch.arange(member.slices) if member.index is None else member.index
    shape = [n if a in member.axes else 1 for a, n in enumerate(member.parameter.shape)]
    return numbers.view(shape).expand(member.parameter.shape)


@torch.no_grad()
def laid_out(layer, optimizer):
    """Values, D and the group of every weight of the layer, shape (n,); and where they belong."""
    places = [(m.parameter, owners(m)) for m in layer.members]
    inside = [owner >= 0 for _, owner in places]
    values = torch.cat([p[i] for (p, _), i in zip(places, inside, strict=True)])
    metric = torch.cat(
        [denominators(optimizer, p)[i] for (p, _), i in zip(places, inside, strict=True)]
    )
    index = torch.cat([owner[i] for (_, owner), i in zip(places, inside, strict=True)])
    return values, metric, index, [(p, i) for (p, _), i in zip(places, inside, strict=True)]


def averaged(metric, index, count):
    """The mean over its group for every weight."""
    zero = torch.zeros(count, dtype=metric.dtype)
    sums, sizes = zero.index_add(0, index, metric), zero.index_add(0, index, metric * 0 + 1)
    return (sums / sizes)[index]


def layer_step(layer, optimizer, lam):
    largest = max(layer.members, key=lambda member: member.parameter.numel())
    return settings(optimizer, largest.parameter)["lr"] * lam


def exact(layer, optimizer, lam, debias, by_group=False):
    """The weights after the proximal step, shape (n,)."""
    values, metric, index, _ = laid_out(layer, optimizer)
    if by_group:
        metric = averaged(metric, index, layer.count)
    more = {"weights": layer.weights, "costs": layer.costs, "debias": debias}
    more |= {"segments": torch.zeros(layer.count, dtype=torch.long)}
    return prox_metric(
        values, metric, index, layer_step(layer, optimizer, lam), layer.budget, **more
    )


@torch.no_grad()
def prox(groups, optimizer, lam, debias=0.0, by_group=False):
    """Replace the weights of every layer."""
    for layer in groups.layers:
        after = exact(layer, optimizer, lam, debias, by_group)
        for parameter, inside in laid_out(layer, optimizer)[3]:
            count = int(inside.sum())
            parameter[inside], after = after[:count], after[count:]


def difference(ours, twin):
    """The largest difference of two weights, as a share of the largest weight."""
    pairs = list(zip(ours.parameters(), twin.parameters(), strict=True))
    largest = max(float(b.detach().abs().max()) for _, b in pairs)
    return max(float((a - b).detach().abs().max()) for a, b in pairs) / largest


def same(ours, twin):
    """Are all weights and buffers equal, bit for bit?"""
    pairs = zip(ours.state_dict().values(), twin.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)

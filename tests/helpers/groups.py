"""What several test files share: small networks, slow twins, and what an error says."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import GroupedLayer, Groups, Member
from lightning_wgsef.groupings.registry import GROUPINGS
from lightning_wgsef.reports.sparsity import LayerReport, SparsityReport

Module = TypeVar("Module", bound=nn.Module)
# How many groups there are, and where their weights lie.
Layout = tuple[int, tuple[Member, ...]]
# The groupings that need no more than a convolution or a dense layer.
OF_ANY_LAYER = {name: GROUPINGS[name] for name in ("channel", "element", "filter", "filter_shape")}


@contextmanager
def raises_naming(*words: str) -> Iterator[None]:
    """The block raises a plain ValueError whose message has all these words."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        yield
    assert caught.type is ValueError
    missing = [word for word in words if word not in str(caught.value)]
    assert missing == [], str(caught.value)


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter(values.to(dtype))


def owners(member: Member) -> np.ndarray:
    """The group of every single weight, -1 for none."""
    shape = member.parameter.shape
    groups = np.empty(shape, dtype=int)
    sizes = [shape[axis] for axis in member.axes]
    for place in np.ndindex(*shape):
        number = int(np.ravel_multi_index([place[axis] for axis in member.axes], sizes))
        groups[place] = number if member.index is None else int(member.index[number])
    return groups


def slow_norms(layer: GroupedLayer, values: Mapping[str, Tensor] | None = None) -> list[float]:
    squares = [0.0] * layer.count
    for member in layer.members:
        tensor = member.parameter if values is None else values[member.name]
        weights = tensor.detach().double().numpy()
        for place, group in np.ndenumerate(owners(member)):
            if group >= 0:
                squares[group] += float(weights[place]) ** 2
    return [math.sqrt(square) for square in squares]


def slow_scaled(layer: GroupedLayer, factors: Sequence[float]) -> dict[str, Tensor]:
    """Every parameter of the layer by its name, with each of its weights scaled."""
    scaled = {m.name: m.parameter.detach().double().numpy().copy() for m in layer.members}
    for member in layer.members:
        for place, group in np.ndenumerate(owners(member)):
            if group >= 0:
                scaled[member.name][place] *= factors[group]
    return {name: torch.as_tensor(weights) for name, weights in scaled.items()}


def dense_rows(dtype: torch.dtype) -> Layout:
    weight, bias = parameter(3, 5, dtype=dtype), parameter(3, dtype=dtype, seed=1)
    return 3, (Member("fc.weight", weight, (0,)), Member("fc.bias", bias, (0,)))


def dense_columns(dtype: torch.dtype) -> Layout:
    return 5, (Member("fc.weight", parameter(3, 5, dtype=dtype), (1,)),)


def filters_with_norm(dtype: torch.dtype) -> Layout:
    vectors = [
        Member(name, parameter(4, dtype=dtype, seed=seed), (0,))
        for seed, name in enumerate(("conv.bias", "norm.weight", "norm.bias"), start=1)
    ]
    return 4, (Member("conv.weight", parameter(4, 3, 2, 2, dtype=dtype), (0,)), *vectors)


def some_in_no_group(dtype: torch.dtype) -> Layout:
    index = torch.tensor([1, -1, 0, -1])
    return 2, (Member("fc.weight", parameter(4, 3, dtype=dtype), (0,), index),)


def layer_of(
    layout: Callable[[torch.dtype], Layout], dtype: torch.dtype = torch.float32, **more: Any
) -> GroupedLayer:
    count, members = layout(dtype)
    return GroupedLayer(layout.__name__, "mine", count, members, **more)


def without(groups: Groups, number: int) -> None:
    """Zero one group."""
    factors = torch.ones(len(groups))
    factors[number] = 0
    groups.scale_(factors)


def mlp(*widths: int) -> nn.Sequential:
    """Dense layers "0", "2", .. with ReLU between them."""
    modules = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def names(groups: Groups) -> list[str]:
    return [layer.name for layer in groups.layers]


def members(groups: Groups, layer: str) -> list[str]:
    return [m.name for x in groups.layers if x.name == layer for m in x.members]


def stages() -> nn.Sequential:
    """Layers a.0, a.2, b.0, b.2 and head, of 3, 4, 5, 6 and 7 channels."""
    return nn.Sequential(OrderedDict(a=mlp(3, 4, 5), b=mlp(5, 6, 7), head=nn.Linear(7, 2)))


def conv_network(seed: int = 0) -> nn.Sequential:
    """Layers conv1, norm1, conv2 and fc; no weight is zero."""
    torch.manual_seed(seed)
    modules = OrderedDict(
        conv1=nn.Conv2d(2, 6, 3),
        norm1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 4, 3),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(4, 3),
    )
    model = nn.Sequential(modules)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.1, 1).mul_(torch.randint(2, parameter.shape) * 2 - 1)
    return model


def pruned() -> nn.Sequential:
    """Channels 1 and 4 of conv2 and channel 0 of fc are zero."""
    model = conv_network()
    with torch.no_grad():
        model.conv2.weight[:, [1, 4]] = 0
        model.fc.weight[:, 0] = 0
    return model


PRUNED = {
    "conv2": [True, False, True, True, False, True],
    "fc": [False, True, True, True],
}


def lists(masks: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    assert all(mask.dtype == torch.bool for mask in masks.values())
    return {name: mask.tolist() for name, mask in masks.items()}


def kept(groups: Groups, *dead: int) -> dict[str, Tensor]:
    """Masks in which the groups with these numbers, over all layers, are dead."""
    alive = torch.ones(len(groups), dtype=torch.bool)
    alive[list(dead)] = False
    return groups.split(alive)


def ones(model: Module) -> Module:
    """The model with all weights 1: every zero in it was put there."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    return model


def rows(report: SparsityReport) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in report.layers}


def dense_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Linear(6, 2)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 4, generator=generator, dtype=dtype) for _ in range(count)]
    return [(x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)) for x in inputs]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list) -> None:
    for inputs, targets in data:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()


def columns(model: nn.Sequential) -> list[Tensor]:
    return [model[2].weight, model[3].weight]

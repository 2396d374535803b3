"""Half of the groups of a network zero, and taken out: what the table promises, and the outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef import Groups, group_parameters, slim
from lightning_wgsef.network.example_input import mapped, model_copy, tensors

NEGLIGIBLE = 1e-9  # in float64, of the largest output


@dataclass
class Removal:
    """Groups of a network, the network with half of them zero, and what `slim` made of it."""

    groups: Groups
    zeroed: nn.Module
    small: nn.Module

    @property
    def share(self) -> float:
        """Parameters that are left, as a share."""
        before, after = self.small.slimming.parameters
        return after / before

    @property
    def obstacles(self) -> dict[str, str]:
        """Why groups are not removable, by name of the layer."""
        return {x.name: x.obstacle for x in self.groups.layers if not x.removable}


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in evaluation mode with all weights and statistics drawn, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if not tensor.is_floating_point() or (
                name not in dict(network.named_parameters()) and "running" not in name
            ):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() < 2:
                tensor.copy_(0.3 * noise + float(name.endswith("weight")))
            else:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
    return network.eval()


def as_double(value: Any) -> Any:
    """In float64, if it is a tensor of floats."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def zero_beyond_budgets(groups: Groups) -> list[Tensor]:
    """Zero groups at random until every layer has its budget; 1 for those that stay, by layer."""
    generator = torch.Generator().manual_seed(1)
    factors = []
    for layer in groups.layers:
        alive = torch.randperm(layer.count, generator=generator)[: int(layer.budget)]
        factors.append(torch.zeros(layer.count).index_fill_(0, alive, 1.0))
    groups.scale_(torch.cat(factors))
    return factors


def removal(
    network: nn.Module, example: Any, grouping: Any, *, k: float = 0.5, **options: Any
) -> Removal:
    """Zero half of the groups at random, take them out, and compare in float64.

    Where groups are said to be removable they are gone, and the outputs are the same.
    """
    torch.manual_seed(0)
    groups = group_parameters(drawn(network), grouping, k, example_input=example, **options)
    factors = zero_beyond_budgets(groups)
    small = slim(network, example)
    for layer, kept in zip(groups.layers, factors, strict=True):
        if layer.removable and not bool(kept.all()):
            assert layer.name not in small.slimming.kept, small.slimming.kept[layer.name]
    if any(x.removable for x in groups.layers):
        assert small.slimming.parameters[1] < small.slimming.parameters[0], groups
    assert difference(network, small, example) < NEGLIGIBLE
    return Removal(groups, network, small)


def difference(one: nn.Module, other: nn.Module, example: Any) -> float:
    """The largest difference of outputs in float64, as a share of the largest."""
    inputs = mapped(as_double, example)
    found = []
    for network in (one, other):
        twin = model_copy(network).double().eval()
        torch.manual_seed(0)
        with torch.no_grad():
            returned = twin(**inputs) if isinstance(inputs, dict) else twin(*inputs)
        found.append([x for x in tensors(returned) if x.is_floating_point()])
    shares = [0.0]
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        unequal = (a != b) & ~(a.isnan() & b.isnan())
        if unequal.any():
            shares.append(float((a - b)[unequal].abs().max() / a[a.isfinite()].abs().max()))
    return max(shares)

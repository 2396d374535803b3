"""Costs of groups: weights, operations or time, measured in one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.flops import layer_flops
from lightning_wgsef.network.latency import layer_latencies

Costs = Literal["flops", "latency", "params"] | Tensor | Mapping[str, Tensor] | None

_NAMES = ("flops", "latency", "params")

_KNOWN = ", ".join(map(repr, _NAMES))


def group_costs(
    model: nn.Module, groups: Groups, costs: str, example_input: Any | None = None
) -> tuple[dict[str, Tensor], float]:
    r"""Measure what every group of ``model`` costs, and what everything outside of groups costs.

    ``"params"`` counts the weights of a group. ``"flops"`` and ``"latency"`` share what a layer
    costs in one forward pass, C, by the number n of a group's weights in the largest member:

    .. math:: c_j = C \, n_j / \sum_i n_i

    Returns the costs in every grouped layer, float64 of shape (count,), and the rest. Together they
    are the cost of the model (for medians of times: about). ``example_input`` is a tensor, or a
    tuple of the arguments of ``forward``; ``"params"`` needs none.

    Raises:
        ValueError: an unknown name, no or an unfit example_input, a group that costs nothing.

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> group_costs(network, group_parameters(network), "flops", torch.ones(1, 4))
    ({'1': tensor([4., 4., 4.], dtype=torch.float64)}, 24.0)
    """
    if not isinstance(costs, str) or costs not in _NAMES:
        raise ValueError(f"costs must be one of {_KNOWN}, got {costs!r}")
    if costs != "params" and example_input is None:
        raise ValueError(f"costs={costs!r} needs an example_input, a tensor or a tuple of them")
    measured: Mapping[str, float]
    whole: float
    if costs == "params":
        found = {layer.name: layer.sizes() for layer in groups.layers}
        measured = {name: float(sizes.sum()) for name, sizes in found.items()}
        whole = sum(parameter.numel() for parameter in model.parameters())
    else:
        measure = layer_flops if costs == "flops" else layer_latencies
        measured, whole = measure(model, example_input)
        found = {x.name: measured.get(x.name, 0) * _shares(x) for x in groups.layers}
    for layer in groups.layers:
        free = (~(found[layer.name] > 0)).nonzero()
        if len(free):
            reason = f"group {int(free[0])} has no weights in '{layer.largest_member.name}'"
            if costs != "params" and not measured.get(layer.name):
                reason = "example_input runs through no convolution or dense layer of this name"
                reason += " (costs='params' needs none)"
            raise ValueError(
                f"costs={costs!r}: groups of layer '{layer.name}' ({layer.grouping}) cost nothing: "
                f"{reason}; exclude the layer or give costs as tensors"
            )
    return found, max(0.0, float(whole - sum(measured[name] for name in found)))


def check_costs(costs: Costs) -> None:
    """Raise `ValueError` unless ``costs`` is None, a name, a tensor or a mapping to tensors.

    >>> check_costs({"fc": torch.tensor([2.0, 0.0])})
    Traceback (most recent call last):
    ...
    ValueError: costs['fc'] must be a positive, finite tensor, one entry a group, got 0.0 at index 1
    """
    if isinstance(costs, Tensor):
        _check_vector("costs", costs)
    elif isinstance(costs, Mapping) and costs and all(isinstance(name, str) for name in costs):
        for name, values in costs.items():
            _check_vector(f"costs[{name!r}]", values)
    elif costs is not None and not (isinstance(costs, str) and costs in _NAMES):
        raise ValueError(
            f"costs must be {_KNOWN}, a tensor with an entry for every group, a mapping from layer "
            f"names to such tensors or None, got {costs!r}"
        )


def _check_vector(name: str, values: object) -> None:
    given = repr(values)
    if isinstance(values, Tensor):
        given = f"{values.dtype} of shape {tuple(values.shape)}"
        real = not values.is_complex() and values.dtype != torch.bool
        if real and values.dim() == 1 and len(values):
            wrong = (~((values > 0) & values.isfinite())).nonzero()
            if not len(wrong):
                return
            given = f"{values[wrong[0, 0]].item()!r} at index {int(wrong[0, 0])}"
    raise ValueError(f"{name} must be a positive, finite tensor, one entry a group, got {given}")


def _shares(layer: GroupedLayer) -> Tensor:
    sizes = replace(layer, members=(layer.largest_member,)).sizes()
    return sizes / sizes.sum()

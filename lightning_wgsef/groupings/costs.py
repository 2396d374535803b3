"""Costs of groups: by the name of what is counted, measured times, or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.latency import layer_latencies

Costs = Literal["flops", "latency", "params"] | Tensor | Mapping[str, Tensor] | None

_NAMES = ("flops", "latency", "params")

_KNOWN = ", ".join(map(repr, _NAMES))


def latency_costs(
    model: nn.Module, groups: Groups, example_input: Any
) -> tuple[dict[str, Tensor], float]:
    r"""Measure the time that every group of ``model`` takes, and everything outside of groups.

    What a layer takes in one forward pass, C, is shared by the number n of a group's weights in the
    largest member:

    .. math:: c_j = C \, n_j / \sum_i n_i

    Returns the costs in every grouped layer, in seconds, float64 of shape (count,), and the rest.
    Together they are about the time of the model, for they are medians. ``example_input`` is a
    tensor, or a tuple of the arguments of ``forward``.

    Raises:
        ValueError: an unfit example_input, a group that costs nothing.
    """
    measured, whole = layer_latencies(model, example_input)
    found = {x.name: measured.get(x.name, 0) * _shares(x) for x in groups.layers}
    for layer in groups.layers:
        free = (~(found[layer.name] > 0)).nonzero()
        if len(free):
            reason = f"group {int(free[0])} has no weights in '{layer.largest_member.name}'"
            if not measured.get(layer.name):
                reason = "example_input runs through no convolution or dense layer of this name"
            raise ValueError(
                f"costs='latency': groups of layer '{layer.name}' ({layer.grouping}) cost nothing: "
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

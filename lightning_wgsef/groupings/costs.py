"""Costs of groups: by the name of what is counted or measured, or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Costs = Literal["flops", "latency", "params"] | Tensor | Mapping[str, Tensor] | None


@dataclass(frozen=True, eq=False)
class KnownLatency:
    """Latency that a run measured before; one that is resumed decides by the same.

    Attributes:
        measured: its `Groups.latency`.
    """

    measured: Tensor


_NAMES = ("flops", "latency", "params")

_KNOWN = ", ".join(map(repr, _NAMES))


def check_costs(costs: Costs | KnownLatency) -> None:
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
    elif not (
        costs is None
        or isinstance(costs, KnownLatency)
        or (isinstance(costs, str) and costs in _NAMES)
    ):
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

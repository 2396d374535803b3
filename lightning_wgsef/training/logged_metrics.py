"""Metrics to log: how sparse every layer is, and how far from its budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_wgsef.groups.groups import Groups


def logged_metrics(
    groups: Groups,
    norms: Tensor,
    values: Tensor,
    gaps: Tensor,
    steps: Sequence[float | Tensor],
    *,
    frozen: bool,
) -> dict[str, Tensor]:
    """Return numbers of shape (), always under the same names, on the model's device.

    Args:
        groups: the groups.
        norms: their norms, shape (m,).
        values: the penalty in every segment, shape (S,); a layer's own where layers have budgets.
        gaps: the sparsity gap in every segment, shape (S,).
        steps: the last step sizes.
        frozen: is the mask fixed?

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> from lightning_wgsef.groups.grouped_layer import GroupedLayer
    >>> from lightning_wgsef.groups.members import Member
    >>> rows = GroupedLayer("fc", "filter", 2, (Member("fc.weight", weight, axes=(0,)),), budget=1)
    >>> groups, zero = Groups([rows]), torch.zeros(1)
    >>> sorted(logged_metrics(groups, groups.norms(), zero, zero, [0.1], frozen=False))[:3]
    ['fc/gap', 'fc/group_sparsity', 'fc/value']
    """
    dead = norms == 0
    numbers = {}
    for name, part in groups.split(dead).items():
        numbers[f"{name}/group_sparsity"] = part.float().mean()
    if not groups.is_global:
        for layer, value, gap in zip(groups.layers, values, gaps, strict=True):
            numbers[f"{layer.name}/value"] = value
            numbers[f"{layer.name}/gap"] = gap
    largest = [torch.as_tensor(step).max().to(norms) for step in steps]
    numbers["sparsity"] = (groups.sizes * dead).sum() / groups.sizes.sum()
    numbers["value"] = values.sum()
    numbers["gap"] = gaps.sum()
    numbers["step"] = torch.stack([*largest, norms.new_zeros(())]).max()
    numbers["frozen"] = torch.tensor(float(frozen))
    return {name: number.float() for name, number in numbers.items()}

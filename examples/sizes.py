"""Budgets by size: numbers of groups that leave a share of the operations of the slim network."""

from __future__ import annotations

import copy
from bisect import bisect_left
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef import WGSEF, group_parameters, slim
from lightning_wgsef.groupings.patterns import by_pattern
from lightning_wgsef.network.flops import layer_flops


def budget_for_operations(
    network: nn.Module, share: float, example_input: Tensor, **groups: Any
) -> int | dict[str, int]:
    """The budget k whose slim network has the share of the operations that is nearest.

    With a budget a layer all layers keep like shares of their groups, to within one group. Which
    groups stay is what their norms say now; where groups are tied, every choice leaves as much.

    Args:
        network: in evaluation or training mode; it is left as it was.
        share: of its operations, in (0, 1].
        example_input: what it is run on.
        groups: other arguments of `group_parameters`.

    Returns:
        A number of groups with ``scope="global"``, else numbers by patterns of layer names.

    Raises:
        ValueError: not even one group in every layer leaves as little.

    >>> _ = torch.manual_seed(0)
    >>> network = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.Linear(10, 3))
    >>> budget_for_operations(network, 0.5, torch.zeros(2, 4), grouping="structure")
    {'*0': 7, '*2': 6}
    """
    arguments = {"example_input": example_input, **groups}
    layers = group_parameters(network, k=1.0, **arguments).layers
    counts = {layer.name: layer.count for layer in layers}
    dense = layer_flops(network, example_input)[1]
    # In which order layers get one group more, so that their shares stay alike.
    order = sorted(
        ((index - 0.5) / count, name)
        for name, count in counts.items()
        for index in range(2, count + 1)
    )

    def budget(more: int) -> int | dict[str, int]:
        if groups.get("scope") == "global":
            return len(counts) + more
        kept = dict.fromkeys(counts, 1)
        for _, name in order[:more]:
            kept[name] += 1
        return by_pattern(kept)

    @cache
    def left(more: int) -> float:
        small = slim(strongest(network, k=budget(more), **arguments), example_input)
        return layer_flops(small, example_input)[1] / dense

    found = bisect_left(range(len(order) + 1), share, key=left)
    if found == 0 and (least := left(0)) > share:
        raise ValueError(
            f"share must be at least {least:.3f}, which one group in every layer leaves of the "
            f"operations, got {share}"
        )
    around = [more for more in (found - 1, found) if 0 <= more <= len(order)]
    return budget(min(around, key=lambda more: abs(left(more) - share)))


def strongest(network: nn.Module, **arguments: Any) -> nn.Module:
    """A copy in which all but the strongest groups are zero; ``arguments`` are those of `WGSEF`."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    WGSEF(network, lam=0.0, freeze=1, **arguments).attach(optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return network

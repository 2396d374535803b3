"""The names of groupings, and the choice of layers and budgets: `group_parameters`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.channels import channel_groups
from lightning_wgsef.groupings.costs import Costs, check_costs
from lightning_wgsef.groupings.elements import element_groups
from lightning_wgsef.groupings.filters import filter_groups
from lightning_wgsef.groupings.layer_budgets import (
    Budget,
    check_budget,
    global_budget,
    layer_budget,
    with_costs,
)
from lightning_wgsef.groupings.patterns import check_patterns, matches
from lightning_wgsef.groups import Groups

Grouping = Callable[[nn.Module], Groups]

GROUPINGS: dict[str, Grouping] = {
    "channel": channel_groups,
    "element": element_groups,
    "filter": filter_groups,
}


def group_parameters(
    model: nn.Module,
    grouping: str | Grouping = "channel",
    k: Budget = 0.5,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    scope: str = "layer",
    costs: Costs = None,
    example_input: Any | None = None,
) -> Groups:
    """The groups of ``model`` with a budget for every layer; print the result to see them.

    Args:
        model: any module.
        grouping: a name (`channel`, `filter`, `element`), or a function from a module to `Groups`.
        k: the budget of every layer: a number of groups (int), a share of its groups (float in
            (0, 1], rounded to the nearest number, at least one), or a mapping from patterns of
            layer names to either; the first pattern that matches a layer counts, and layers
            that none matches are left out.
        include: patterns of layer names; only these are grouped. A layer that is left out by rule
            (the image's channels, the classifier's outputs, frozen layers) is grouped if
            ``include`` gives its exact name.
        exclude: patterns of layer names that are left out.
        scope: "layer", every layer has its own budget; "global", all layers compete for one, of
            which each keeps its strongest group. Norms are made comparable then: the penalty
            weights are one over the layer's mean square norm as it is now.
        costs: what a group costs, and thereby the unit of k: None, 1; "params", its weights;
            "flops" and "latency", its share of its layer's, measured on ``example_input``; a tensor
            with an entry for every group, layer after layer, or a mapping from layer names to
            tensors. A share k is one of the layer's cost, or with "global" one of the whole
            model's, including what is not grouped.
        example_input: a tensor, or a tuple of the arguments of ``forward``.

    A pattern is a name with wildcards as in file names; it stands for the modules inside, too.

    Raises:
        ValueError: an unknown grouping, a budget outside its range, a pattern that matches no
            layer, a model without a layer to group, groups that share weights, or costs that cannot
            be measured or do not fit the groups.

    >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> print(group_parameters(network, "channel", k=0.25))
    layer  grouping  groups  weights each  budget  removable
    2       channel       8            36       2        yes
    left out: 0: first layer: its channels are the network's input
    """
    check_grouping(grouping)
    found = (GROUPINGS[grouping] if isinstance(grouping, str) else grouping)(model)
    if not isinstance(found, Groups):
        raise ValueError(f"grouping must return Groups, {grouping!r} returned {type(found)}")
    names = [layer.name for layer in found.layers]
    included = check_patterns("include", include, names)
    excluded = check_patterns("exclude", exclude, names)
    if isinstance(k, Mapping):
        check_patterns("k", list(k), names)
    check_budget(k, scope)
    check_costs(costs)
    left_out, layers = dict(found.left_out), []
    for layer in found.layers:
        reason = _reason_to_leave_out(layer, included, excluded, k)
        if reason:
            left_out[layer.name] = reason
        else:
            layers.append(layer)
    if not layers:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(
            f"{type(model).__name__} has no layer that grouping={_name(grouping)!r} can group"
            f"{reasons or ': it has no weights'}"
        )
    layers, rest = with_costs(model, layers, costs, example_input)
    if scope == "global":
        assert not isinstance(k, Mapping)
        layers = [replace(layer, weights=_comparable(layer)) for layer in layers]
        groups = Groups(layers, left_out, global_budget(layers, k, rest))
    else:
        groups = Groups([replace(x, budget=layer_budget(x, k)) for x in layers], left_out)
    groups.check_disjoint()
    return groups


def check_grouping(grouping: str | Grouping) -> None:
    """Raise `ValueError` unless ``grouping`` is a known name or a function.

    >>> check_grouping("chanel")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: grouping must be 'channel', 'element', 'filter' or a function...
    """
    known = isinstance(grouping, str) and grouping in GROUPINGS
    if not known and not callable(grouping):
        names = [repr(name) for name in sorted(GROUPINGS)]
        raise ValueError(
            f"grouping must be {', '.join(names[:-1])}, {names[-1]} or a function from a module to "
            f"Groups, got {grouping!r}"
        )


def _name(grouping: str | Grouping) -> str:
    return grouping if isinstance(grouping, str) else getattr(grouping, "__name__", "custom")


def _comparable(layer: GroupedLayer) -> Tensor:
    """One over the layer's mean square norm for every group; times the weights it has."""
    mean = Groups([layer]).norms().double().square().mean()
    weights = (
        torch.ones(layer.count, dtype=torch.float64) if layer.weights is None else layer.weights
    )
    return weights.to(mean) / torch.where(mean > 0, mean, 1)


def _reason_to_leave_out(
    layer: GroupedLayer, included: list[str] | None, excluded: list[str] | None, k: Budget
) -> str:
    if excluded and any(matches(pattern, layer.name) for pattern in excluded):
        return "named in exclude"
    if included is not None and not any(matches(pattern, layer.name) for pattern in included):
        return "not named in include"
    if isinstance(k, Mapping) and not any(matches(pattern, layer.name) for pattern in k):
        return "no pattern of k matches it"
    if included is None or layer.name not in included:
        weight = layer.largest_member
        frozen = "" if weight.parameter.requires_grad else f"frozen: {weight.name} has no gradient"
        return frozen or layer.reserved
    return ""

"""The names of groupings, and the choice of layers and budgets: `group_parameters`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Integral

import torch
from torch import Tensor, nn

from lightning_wgsef.budgets import check_count_or_share
from lightning_wgsef.groupings.channels import channel_groups
from lightning_wgsef.groupings.elements import element_groups
from lightning_wgsef.groupings.filters import filter_groups
from lightning_wgsef.groups import GroupedLayer, Groups

Grouping = Callable[[nn.Module], Groups]
Budget = int | float | Mapping[str, int | float]

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

    A pattern is a name with wildcards as in file names; it stands for the modules inside, too.

    Raises:
        ValueError: an unknown grouping, a budget outside its range, a pattern that matches no
            layer, a model without a layer to group, or groups that share weights.

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
    included = _patterns("include", include, names)
    excluded = _patterns("exclude", exclude, names)
    if isinstance(k, Mapping):
        _patterns("k", list(k), names)
    check_budget(k)
    left_out, layers = dict(found.left_out), []
    for layer in found.layers:
        reason = _reason_to_leave_out(layer, included, excluded, k)
        if reason:
            left_out[layer.name] = reason
        else:
            layers.append(replace(layer, budget=_budget(layer, k)))
    if not layers:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(
            f"{type(model).__name__} has no layer that grouping={_name(grouping)!r} can group"
            f"{reasons or ': it has no weights'}"
        )
    groups = Groups(layers, left_out)
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


def check_budget(k: Budget) -> None:
    """Raise `ValueError` unless k is a count, a share, or a mapping of patterns to either.

    >>> check_budget(1.5)
    Traceback (most recent call last):
    ...
    ValueError: k must be a number of groups (int >= 1) or a share (float in (0, 1]), got 1.5
    """
    if isinstance(k, Mapping):
        if not k:
            raise ValueError("k is an empty mapping: give at least one pattern and its budget")
        for pattern, value in k.items():
            check_count_or_share(f"k[{pattern!r}]", value, "groups")
    else:
        check_count_or_share("k", k, "groups")


def _name(grouping: str | Grouping) -> str:
    return grouping if isinstance(grouping, str) else getattr(grouping, "__name__", "custom")


def _patterns(
    argument: str, patterns: str | Sequence[str] | None, names: Iterable[str]
) -> list[str] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    listed = list(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise ValueError(f"{argument}: a pattern must be a string, got {pattern!r}")
        if not any(_matches(pattern, name) for name in names):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no layer; the layers are "
                f"{', '.join(names) or '(none)'}"
            )
    return listed


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _reason_to_leave_out(
    layer: GroupedLayer, included: list[str] | None, excluded: list[str] | None, k: Budget
) -> str:
    if excluded and any(_matches(pattern, layer.name) for pattern in excluded):
        return "named in exclude"
    if included is not None and not any(_matches(pattern, layer.name) for pattern in included):
        return "not named in include"
    if isinstance(k, Mapping) and not any(_matches(pattern, layer.name) for pattern in k):
        return "no pattern of k matches it"
    if included is None or layer.name not in included:
        weight = layer.largest_member
        frozen = "" if weight.parameter.requires_grad else f"frozen: {weight.name} has no gradient"
        return frozen or layer.reserved
    return ""


def _budget(layer: GroupedLayer, k: Budget) -> float:
    if isinstance(k, Mapping):
        k = next(value for pattern, value in k.items() if _matches(pattern, layer.name))
    if layer.costs is not None:
        return _budget_in_costs(layer, k, layer.costs.to(torch.float64))
    if not isinstance(k, Integral):
        return max(1.0, math.floor(float(k) * layer.count + 0.5))
    if k > layer.count:
        raise ValueError(
            f"k = {k} is more than the {layer.count} groups of layer '{layer.name}' "
            f"({layer.grouping}); name a share, a mapping of patterns, or exclude the layer"
        )
    return float(k)


def _budget_in_costs(layer: GroupedLayer, k: int | float, costs: Tensor) -> float:
    """A budget in units of cost. It admits the dearest group, which may be the strongest."""
    total, dearest = float(costs.sum()), float(costs.max())
    if not isinstance(k, Integral):
        return max(float(k) * total, dearest)
    if not dearest <= k <= total:
        raise ValueError(
            f"k = {k} must lie between the dearest group's cost, {dearest:g}, and the cost of all "
            f"groups, {total:g}, in layer '{layer.name}' ({layer.grouping})"
        )
    return float(k)

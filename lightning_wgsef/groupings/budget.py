"""Budgets: k as a count, a share or a size, of groups or of costs, by layer or over all layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from lightning_wgsef.groupings.costs import Costs, KnownLatency
from lightning_wgsef.groupings.patterns import matches
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.size import SlimSize
from lightning_wgsef.utils.validation import check_count_or_share

Budget = int | float | str | Mapping[str, int | float]

SCOPES = ("layer", "global")

# The budget where none is named.
DEFAULT_K = 0.5

# The names in `costs` that count the slim network, and what they may be called in a size.
COUNTED = ("flops", "params", "latency")

_UNITS = {
    "flops": ("flop", "flops"),
    "params": ("param", "params", "parameter", "parameters"),
    "bytes": ("b", "byte", "bytes"),
}

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}

_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}

# As people and tables write them: 0.5, .5, 1e3, 49,110; with a space before and within the unit.
_SIZE = re.compile(
    r"\s*((?:\d{1,3}(?:,\d{3})+|\d+)\.?\d*|\.\d+)(e[+-]?\d+)?"
    r"\s*([a-z\u00b5\u03bc]+(?:\s+[a-z]+)?)\s*"
)

# In milliseconds.
_TIMES = {"s": 1e3, "ms": 1.0, "us": 1e-3, "\u00b5s": 1e-3, "\u03bcs": 1e-3}

_NAMED_UNITS = "FLOPs, params, B, with k, M, G, T or Ki, Mi, Gi before them; s, ms, us"


def parsed_size(k: str) -> tuple[float, str] | None:
    """Return a size in units, and what it counts; None if it is none.

    It counts "flops", "params", "bytes", or "latency" in milliseconds.

    >>> parsed_size("120 MFLOPs"), parsed_size("4 MB"), parsed_size("800 kparams")
    ((120000000.0, 'flops'), (4000000.0, 'bytes'), (800000.0, 'params'))
    >>> parsed_size("1.2M params"), parsed_size("49,110 FLOPs")
    ((1200000.0, 'params'), (49110.0, 'flops'))
    >>> parsed_size("1 MiB"), parsed_size("5 miles")
    ((1048576.0, 'bytes'), None)
    >>> parsed_size("5 ms"), parsed_size("0.25 s")
    ((5.0, 'latency'), (250.0, 'latency'))
    """
    match = _SIZE.fullmatch(k.lower())
    number = float(match[1].replace(",", "") + (match[2] or "")) if match else 0.0
    if not match or not 0 < number < math.inf:
        return None
    if match[3] in _TIMES:
        return number * _TIMES[match[3]], "latency"
    unit = "".join(match[3].split())
    for measure, names in _UNITS.items():
        for prefix, factor in (_PREFIXES | _BINARY).items():
            if unit in [prefix + name for name in names]:
                return number * factor, measure
    return None


def check_budget(k: Budget, scope: str = "layer") -> None:
    """Raise `ValueError` unless k is a count, a share, a size, or a mapping to counts or shares.

    >>> check_budget(1.5)
    Traceback (most recent call last):
    ...
    ValueError: k must be a number of groups (int >= 1) or a share (float in (0, 1]), got 1.5
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    if isinstance(k, str) and parsed_size(k) is not None:
        return
    if not isinstance(k, Mapping):
        check_count_or_share("k", k, "groups", *[_A_SIZE] * isinstance(k, str))
        return
    if scope == "global":
        raise ValueError(f"k must be one number with scope='global', got a mapping: {dict(k)}")
    if not k:
        raise ValueError("k is an empty mapping: give at least one pattern and its budget")
    for pattern, value in k.items():
        check_count_or_share(f"k[{pattern!r}]", value, "groups")


_A_SIZE = (
    f"a size such as '120 MFLOPs', '4 MB', '800 kparams' or '5 ms' (units: {_NAMED_UNITS}; half of "
    "the dense network's is k=0.5, scope='global', costs='flops', 'params' or 'latency')"
)


def measure_of(k: Budget, costs: Costs | KnownLatency) -> str | None:
    """Return what of the slim network the budget counts; None: nothing.

    It is "flops", "params", "bytes" or "latency".

    Raises:
        ValueError: k is a size in units of something else than ``costs`` says.

    >>> measure_of("4 MB", None), measure_of(0.4, "flops"), measure_of(0.4, None)
    ('bytes', 'flops', None)
    """
    size = parsed_size(k) if isinstance(k, str) else None
    counted = costs if isinstance(costs, str) and costs in COUNTED else None
    counted = "latency" if isinstance(costs, KnownLatency) else counted
    if size is None:
        return counted
    fitting = "params" if size[1] == "bytes" else size[1]
    if costs is not None and counted != fitting:
        given = repr(costs) if isinstance(costs, str) else type(costs).__name__
        raise ValueError(
            f"costs must be None or {fitting!r} with k = {k!r}, which says what is counted, got "
            f"{given}"
        )
    return size[1]


def with_costs(
    layers: Sequence[GroupedLayer], costs: Tensor | Mapping[str, Tensor] | None
) -> list[GroupedLayer]:
    """Give the layers these costs.

    Raises:
        ValueError: a tensor of another length than the groups.
    """
    if costs is None:
        return list(layers)
    counts = {layer.name: layer.count for layer in layers}
    if isinstance(costs, Tensor):
        if len(costs) != sum(counts.values()):
            raise ValueError(
                f"costs must have one entry for each of the {sum(counts.values())} groups "
                f"({counts}), got shape {tuple(costs.shape)}"
            )
        found = dict(zip(counts, costs.split_with_sizes(list(counts.values())), strict=True))
    else:
        found = dict(costs)
        shapes = {name: tuple(values.shape) for name, values in found.items()}
        if shapes != {name: (count,) for name, count in counts.items()}:
            raise ValueError(f"costs must have the groups of every layer, {counts}, got {shapes}")
    return [replace(layer, costs=found[layer.name]) for layer in layers]


def check_used(layers: Sequence[GroupedLayer], k: Budget) -> None:
    """Raise `ValueError` for a budget of layers of which the grouping's name says what stays.

    The default, all groups, and what the name says are no contradiction.
    """
    for pattern, value in k.items() if isinstance(k, Mapping) else [("", k)]:
        mine = [x for x in layers if not pattern or matches(pattern, x.name)]
        said = [DEFAULT_K, 1.0, *(x.budget / x.m for x in mine if x.m)]
        if mine and all(x.m for x in mine) and value not in said:
            grouping = mine[0].grouping
            raise ValueError(
                f"k{f'[{pattern!r}]' if pattern else ''} = {value} is not used with grouping="
                f"{grouping!r}, whose name says how many stay: leave k out, or name another n:m"
            )


def layer_budget(layer: GroupedLayer, k: int | float | Mapping[str, int | float]) -> float:
    """Return the budget of one layer, which admits at least one group, or those it must keep.

    A share is rounded up to a number of groups that the layer runs with.

    Raises:
        ValueError: more than the layer has, or less than it must keep or its dearest group costs.
    """
    if layer.m:
        return layer.budget  # the grouping's name says it
    if isinstance(k, Mapping):
        k = next(value for pattern, value in k.items() if matches(pattern, layer.name))
    if layer.costs is not None:
        return _layer_budget_in_costs(layer, k, layer.costs.to(torch.float64))
    if not isinstance(k, Integral):
        count = max(layer.least, math.floor(float(k) * layer.count + 0.5))
        return float(min(layer.count, math.ceil(count / layer.multiple) * layer.multiple))
    if k < layer.least:
        raise ValueError(
            f"k = {k} is less than layer '{layer.name}' ({layer.grouping}) must keep: every token "
            f"is sent to {layer.least} of its {layer.count} experts"
        )
    if k > layer.count:
        raise ValueError(
            f"k = {k} is more than the {layer.count} groups of layer '{layer.name}' "
            f"({layer.grouping}); name a share, a mapping of patterns, or exclude the layer"
        )
    return float(k)


def global_budget(layers: Sequence[GroupedLayer], k: int | float) -> float:
    """Return the budget of all layers together, which admits at least one group of each.

    Args:
        layers: the layers, with their costs.
        k: a number, or a share.

    Raises:
        ValueError: more than there is, or too little for a group of every layer.
    """
    costs = [torch.ones(x.count) if x.costs is None else x.costs.double() for x in layers]
    total = sum(float(cost.sum()) for cost in costs)
    numbers = [layer.bounds[0] for layer in layers]
    least = sum(float(x.topk(n).values.sum()) for x, n in zip(costs, numbers, strict=True))
    if isinstance(k, Integral):
        budget, asked = float(k), f"k = {k}:"
    else:
        budget = float(k) * total
        asked = f"k = {k} of {total:g} leaves {budget:g}; take a larger k:"
        if layers[0].costs is None:
            budget = math.floor(budget + 0.5)
    if not least <= budget <= total:
        raise ValueError(
            f"{asked} the budget of all layers must lie between {least:g}, the cost of "
            f"{_fewest(layers)}, and {total:g}, that of all groups"
        )
    return budget


def size_limit(size: SlimSize, layers: Sequence[GroupedLayer], k: int | float | str) -> float:
    """Return the largest size of the slim network that k allows.

    Args:
        size: of the slim network.
        layers: the layers, with their costs.
        k: a number of units, a share of the dense network, or a size.

    Raises:
        ValueError: more than the dense network has, or less than a group of every layer may leave.
    """
    fewest = [layer.bounds[0] for layer in layers]
    total, least = float(size.total), float(size.of(_dearest(size, layers, fewest)))
    named = parsed_size(k) if isinstance(k, str) else None
    if named is not None:
        limit = named[0]
    else:
        limit = float(k) if isinstance(k, Integral) else float(k) * total
    if limit == total:  # of all groups, which may be more than was measured
        return max(limit, float(size.of(torch.ones_like(size.kinds, dtype=torch.bool))))
    if not least <= limit <= total:
        raise ValueError(
            f"k = {k!r}, {size.shown(limit)} {size.unit} of the slim network, must lie between "
            f"{size.shown(least)} ({least / total:.1%}), what {_fewest(layers)} may leave, and "
            f"{size.shown(total)}, the dense network"
        )
    return limit


def alike_budgets(
    size: SlimSize, layers: Sequence[GroupedLayer], limit: float
) -> list[GroupedLayer]:
    """Give every layer the same share of its groups, to within one, the largest that fits a size.

    Whichever groups they are: of a layer whose groups differ, the dearest are counted.
    """
    shares = sorted(
        ((index - 0.5 * layer.multiple) / layer.count, number)
        for number, layer in enumerate(layers)
        for index in range(layer.bounds[0], layer.bounds[1], layer.multiple)
    )

    def numbers(more: int) -> list[int]:
        kept = [layer.bounds[0] for layer in layers]
        for _, number in shares[:more]:
            kept[number] += layers[number].multiple
        return kept

    low, high = 0, len(shares)
    while low < high:
        middle = (low + high + 1) // 2
        fits = float(size.of(_dearest(size, layers, numbers(middle)))) <= limit * (1 + 1e-12)
        low, high = (middle, high) if fits else (low, middle - 1)
    return [
        replace(layer, budget=float(number), costs=None)
        for layer, number in zip(layers, numbers(low), strict=True)
    ]


def _fewest(layers: Sequence[GroupedLayer]) -> str:
    """Name the groups that every layer has to keep."""
    if all(layer.bounds[0] == 1 for layer in layers):
        return "one group of every layer"
    return "the groups that have to stay (at_least, multiple_of)"


def _dearest(size: SlimSize, layers: Sequence[GroupedLayer], numbers: Sequence[int]) -> Tensor:
    """Return so many of the dearest groups of every layer, as booleans over all groups."""
    costs = size.costs(torch.ones_like(size.kinds, dtype=torch.bool))
    parts = torch.split_with_sizes(costs, [layer.count for layer in layers])
    alive = [
        torch.zeros_like(part, dtype=torch.bool).index_fill_(0, part.topk(number).indices, True)
        for part, number in zip(parts, numbers, strict=True)
    ]
    return torch.cat(alive)


def _layer_budget_in_costs(layer: GroupedLayer, k: int | float, costs: Tensor) -> float:
    """Return a budget in units of cost that admits the dearest group, maybe the strongest."""
    total, dearest = float(costs.sum()), float(costs.max())
    if not isinstance(k, Integral):
        if k * total < float(costs.min()):
            raise ValueError(
                f"k = {k} of {total:g} is less than the cheapest group costs, "
                f"{float(costs.min()):g}, in layer '{layer.name}' ({layer.grouping}); take a "
                "larger k, or exclude the layer"
            )
        return max(float(k) * total, dearest)
    if not dearest <= k <= total:
        raise ValueError(
            f"k = {k} counts costs, not groups, and must lie between the dearest group's cost, "
            f"{dearest:g}, and that of all groups, {total:g}, in layer '{layer.name}' "
            f"({layer.grouping}); or name a share"
        )
    return float(k)

"""Limits of widths: multiples, floors and ceilings of what stays, by number, share or pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral

import torch

from lightning_wgsef.groupings.patterns import check_patterns, matches
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.utils.validation import check_count_or_share

Multiple = int | Mapping[str, int]

Bound = int | float | Mapping[str, int | float] | None

# What of groups is no width: blocks and experts are there or not.
_WHOLE = ("layer", "expert")


def check_limits(multiple_of: Multiple, at_least: Bound, at_most: Bound) -> None:
    """Raise `ValueError` for a limit that no model could make right.

    >>> check_limits(0, None, None)
    Traceback (most recent call last):
    ...
    ValueError: multiple_of must be a number of channels (int >= 1), got 0
    """
    for name, value in _entries("multiple_of", multiple_of):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a number of channels (int >= 1), got {value!r}")
    for argument, bound in (("at_least", at_least), ("at_most", at_most)):
        for name, value in _entries(argument, bound):
            if value is not None:
                check_count_or_share(name, value, "groups")


def with_limits(
    layers: Sequence[GroupedLayer], multiple_of: Multiple, at_least: Bound, at_most: Bound
) -> list[GroupedLayer]:
    """Give the layers limits of how many of their groups stay.

    A width is a number of channels: where a group is several of them (two of a bundle, a head), so
    many groups are a multiple. Shares of floors are rounded up, of ceilings down.

    Raises:
        ValueError: a pattern that matches no layer, a multiple or floor beyond a layer, or a floor
            above a ceiling.

    >>> layers = [GroupedLayer("fc", "filter", 20, ())]
    >>> limited = with_limits(layers, 8, 0.5, {"f*": 17})[0]
    >>> limited.least, limited.most, limited.multiple
    (10, 17, 8)
    """
    names = [layer.name for layer in layers]
    for argument, given in (
        ("multiple_of", multiple_of),
        ("at_least", at_least),
        ("at_most", at_most),
    ):
        if isinstance(given, Mapping):
            check_patterns(argument, list(given), names)
    return [_limited(layer, multiple_of, at_least, at_most) for layer in layers]


def limited_budget(layer: GroupedLayer, budget: float) -> float:
    """Return the budget of a layer of its own, within its limits and in units of cost.

    It is the largest that the limits allow and that is kept, or the floor.
    """
    if layer.m or (layer.most is None and layer.multiple == 1 and layer.least == 1):
        return budget
    cost = 1.0 if layer.costs is None else float(layer.costs.max())
    if layer.costs is not None and bool((layer.costs != layer.costs[0]).any()):
        raise ValueError(
            f"multiple_of, at_least and at_most need groups of one cost with scope='layer': those "
            f"of layer '{layer.name}' ({layer.grouping}) differ; take scope='global', or a mapping "
            "that leaves it out"
        )
    count = math.floor(budget / cost * (1 + 1e-12))
    least, most = layer.bounds
    return cost * max(least, min(most, count // layer.multiple * layer.multiple))


def as_multiple(left: int, count: int, multiple: int) -> int:
    """Return the least width that is a multiple and at least ``left``; that if none is possible.

    >>> as_multiple(9, 20, 8), as_multiple(0, 20, 8), as_multiple(18, 20, 8)
    (16, 8, 18)
    """
    width = max(1, math.ceil(left / multiple)) * multiple
    return width if width <= count else left


def multiple_of_groups(layer: GroupedLayer, multiple_of: Multiple) -> int:
    """Return of what number of groups the layer keeps multiples; 1 where they are no widths."""
    asked = _of(layer, multiple_of)
    if asked is None or asked == 1 or layer.grouping in _WHOLE or layer.m:
        return layer.multiple
    return math.lcm(layer.multiple, int(asked) // math.gcd(int(asked), _channels(layer)))


def _limited(
    layer: GroupedLayer, multiple_of: Multiple, at_least: Bound, at_most: Bound
) -> GroupedLayer:
    least, most = (_of(layer, x) for x in (at_least, at_most))
    named = f"layer '{layer.name}' ({layer.grouping}), which has {layer.count} groups"
    multiple = multiple_of_groups(layer, multiple_of)
    if multiple > layer.count and multiple > layer.multiple:
        asked, each = _of(layer, multiple_of), _channels(layer)
        raise ValueError(
            f"multiple_of = {asked} is larger than {named} of {each} channels; take a mapping of "
            f"patterns such as {{'{layer.name}': {layer.count * each}, '*': {asked}}}, or exclude "
            "the layer"
        )
    floor = layer.least if least is None else max(layer.least, _number(least, layer.count, up=True))
    ceiling = layer.most if most is None else _number(most, layer.count, up=False)
    if floor > layer.count:
        raise ValueError(f"at_least = {least} is more than {named}")
    limited = replace(layer, least=floor, most=ceiling, multiple=multiple)
    lowest, highest = limited.bounds
    if lowest > highest:
        steps = f" in steps of {multiple}" if multiple > 1 else ""
        raise ValueError(
            f"at_least = {1 if least is None else least}, {lowest} groups{steps}, is above at_most "
            f"= {'none' if most is None else most}, {highest} groups{steps}, for {named}"
        )
    return limited


def _of(
    layer: GroupedLayer, given: int | float | Mapping[str, int] | Mapping[str, int | float] | None
) -> int | float | None:
    if not isinstance(given, Mapping):
        return given
    return next((value for pattern, value in given.items() if matches(pattern, layer.name)), None)


def _number(value: int | float, count: int, *, up: bool) -> int:
    if isinstance(value, Integral):
        return int(value) if up else min(int(value), count)
    exact = float(value) * count
    return max(1, math.ceil(exact * (1 - 1e-12)) if up else math.floor(exact * (1 + 1e-12)))


def _channels(layer: GroupedLayer) -> int:
    """Count the channels of one group: the slices of the member that has fewest of them.

    Raises:
        ValueError: groups differ.
    """
    counts = []
    for member in layer.members:
        index = torch.arange(member.slices) if member.index is None else member.index.cpu()
        counts.append(index[index >= 0].bincount(minlength=layer.count))
    fewest = min(counts, key=lambda own: int(own.sum())) if counts else torch.ones(1)
    if bool((fewest != fewest[0]).any()):
        raise ValueError(
            f"multiple_of cannot be kept for layer '{layer.name}' ({layer.grouping}), whose groups "
            "are of different widths; take a mapping of patterns that leaves it out"
        )
    return max(1, int(fewest[0]) // _gates(layer))


def _gates(layer: GroupedLayer) -> int:
    """Count the rows that a recurrent layer of torch has for a unit; 1 for other layers."""
    for member in layer.members:
        if member.name.rpartition(".")[2].startswith("weight_hh"):
            rows, columns = member.parameter.shape
            return rows // columns if rows in (columns, 3 * columns) else 4  # fewer if it projects
    return 1


def _entries(
    name: str, given: int | float | Mapping[str, int] | Mapping[str, int | float] | None
) -> list[tuple[str, int | float | None]]:
    if not isinstance(given, Mapping):
        return [(name, given)]
    if not given:
        raise ValueError(f"{name} is an empty mapping: give at least one pattern and its number")
    return [(f"{name}[{pattern!r}]", value) for pattern, value in given.items()]

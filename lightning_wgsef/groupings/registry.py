"""Registry of groupings: what a name, a function or a mapping of patterns stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_wgsef.groupings.experts import expert_groups
from lightning_wgsef.groupings.head import head_groups
from lightning_wgsef.groupings.hidden import hidden_groups
from lightning_wgsef.groupings.patterns import matches
from lightning_wgsef.groupings.per_layer import (
    channel_groups,
    element_groups,
    filter_groups,
    filter_shape_groups,
    n_of_m_groups,
    tile_groups,
)
from lightning_wgsef.groupings.residual_block import branch_groups
from lightning_wgsef.groupings.structure import stream_groups, structure_groups
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.interface import Interface, network_interface

Maker = Callable[[nn.Module], Groups]

# A command line tries these in turn: a function first would take a mapping for its arguments.
Grouping = Mapping[str, str | Maker] | str | Maker

DEFAULT_GROUPING = "channel"

GROUPINGS: dict[str, Maker] = {
    "channel": channel_groups,
    "element": element_groups,
    "expert": expert_groups,
    "filter": filter_groups,
    "filter_shape": filter_shape_groups,
    "head": head_groups,
    "hidden": hidden_groups,
}

# Groupings that must not cut what the network reads or returns.
_AT_THE_ENDS: dict[str, Callable[[nn.Module, Interface | None], Groups]] = {
    "channel": channel_groups,
    "filter": filter_groups,
}

# Groupings that prove with an example input, where there is one, what they found.
_PROVED: dict[str, Callable[[nn.Module, Any], Groups]] = {
    "head": head_groups,
    "hidden": hidden_groups,
}

# Groupings that need an example input.
TRACED: dict[str, Callable[[nn.Module, Any], Groups]] = {
    "layer": branch_groups,
    "stream": stream_groups,
    "structure": structure_groups,
}

# What a model lacks in which a grouping finds nothing, not even something to leave out.
MISSING = {
    "head": "it has no nn.MultiheadAttention, and no attention with known names of layers: say "
    "them with lightning_wgsef.groupings.register_projections",
    "expert": "it has no experts: weights of three axes of which the first is that of the experts, "
    "or a list of modules of one kind beside a layer with an output for each",
    "stream": "it has no residual stream that norms take as a whole",
    "hidden": "it has no module with two dense layers of which the second reads what the first "
    "makes, and no recurrent layer of torch",
}

_SIZES = {
    r"block:([1-9]\d*)x([1-9]\d*)": tile_groups,
    r"([1-9]\d*):([1-9]\d*)": n_of_m_groups,
}


def find_groups(
    model: nn.Module,
    grouping: Grouping,
    example_input: Any | None = None,
    interface: Interface | None = None,
) -> Groups:
    """Find what ``grouping`` groups in ``model``, without budgets.

    A name, a function from a module to `Groups`, or a mapping from patterns of layer names to
    either: the first pattern that matches a layer of its grouping counts. ``interface`` says which
    layers read the network's inputs and make its outputs; None: `network_interface` finds it.

    Raises:
        ValueError: an unknown name, no example input where one is needed, a function that returns
            something else, or a pattern that matches no layer of its grouping.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4))
    >>> found = find_groups(network, {"0": "filter", "2": "2:4"})
    >>> [(layer.name, layer.grouping) for layer in found.layers]
    [('0', 'filter'), ('2', '2:4')]
    """
    check_grouping(grouping)
    if interface is None and needs_interface(grouping):
        interface = network_interface(model, example_input)
    if isinstance(grouping, Mapping):
        return _mapped(model, grouping, example_input, interface)
    if not isinstance(grouping, str):
        found = grouping(model)
        if not isinstance(found, Groups):
            raise ValueError(f"grouping must return Groups, {grouping!r} returned {type(found)}")
        return found
    if grouping in TRACED:
        if example_input is None:
            raise ValueError(
                f"grouping={grouping!r} follows a forward pass and needs an example_input, a "
                "tensor, a tuple of the arguments of forward, or a dict of them"
            )
        return TRACED[grouping](model, example_input)
    if grouping in _AT_THE_ENDS:
        return _AT_THE_ENDS[grouping](model, interface)
    if grouping in _PROVED:
        return _PROVED[grouping](model, example_input)
    maker = _maker(grouping)
    assert maker is not None  # `check_grouping` has seen to it
    return maker(model)


def grouping_at_ends(grouping: Grouping | None, interface: Interface | Collection[str]) -> Grouping:
    """Return a grouping that leaves out other layers than the order of definition says.

    Args:
        grouping: of which the groups are; None is the default.
        interface: what reads inputs and makes outputs; or the names of the layers to group.
    """
    named = DEFAULT_GROUPING if grouping is None else grouping

    def find(model: nn.Module) -> Groups:
        if isinstance(interface, Interface):
            return find_groups(model, named, None, interface)
        found = find_groups(model, named)
        layers = [replace(x, reserved="") for x in found.layers if x.name in interface]
        rest = {x.name: x.reserved for x in found.layers if x.name not in interface}
        return Groups(layers, {**found.left_out, **rest})

    find.__name__ = grouping_name(grouping)
    return find


def check_grouping(grouping: Grouping) -> None:
    """Raise `ValueError` unless ``grouping`` is a known name, a function or a mapping to these.

    >>> check_grouping("chanel")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: grouping must be 'channel', 'element', ...got 'chanel'
    """
    if isinstance(grouping, Mapping) and grouping:
        for pattern, inner in grouping.items():
            if not isinstance(pattern, str) or isinstance(inner, Mapping):
                raise ValueError(
                    "grouping must map patterns of layer names to names or functions, got "
                    f"{pattern!r}: {inner!r}"
                )
            check_grouping(inner)
        return
    if isinstance(grouping, str) and grouping in TRACED:
        return
    is_function = callable(grouping) and not isinstance(grouping, nn.Module | type)
    if is_function or (isinstance(grouping, str) and _maker(grouping)):
        return
    names = ", ".join(repr(name) for name in sorted([*GROUPINGS, *TRACED]))
    raise ValueError(
        f"grouping must be {names}, 'block:RxC' such as 'block:16x16', 'n:m' such as '2:4' "
        "(0 < n < m), a function from a module to Groups, or a mapping from patterns of layer "
        f"names to these, got {grouping!r}"
    )


def needs_interface(grouping: Grouping) -> bool:
    """Tell whether a grouping leaves out what reads the network's inputs or makes its outputs."""
    if isinstance(grouping, Mapping):
        return any(map(needs_interface, grouping.values()))
    return isinstance(grouping, str) and grouping in _AT_THE_ENDS


def grouping_name(grouping: Grouping | None) -> str:
    """Return the name by which messages call a grouping; None is the default."""
    if grouping is None:
        return DEFAULT_GROUPING
    if isinstance(grouping, str | Mapping):
        return str(grouping)
    return str(getattr(grouping, "__name__", "custom"))


def _maker(name: str) -> Maker | None:
    """Return the function that a name without example input stands for; None: there is none."""
    if name in GROUPINGS:
        return GROUPINGS[name]
    for pattern, make in _SIZES.items():
        if found := re.fullmatch(pattern, name):
            first, second = (int(size) for size in found.groups())
            if make is tile_groups or first < second:
                return lambda model: make(model, first, second)
    return None


def _mapped(
    model: nn.Module,
    grouping: Mapping[str, str | Maker],
    example: Any | None,
    interface: Interface | None,
) -> Groups:
    layers: dict[str, GroupedLayer] = {}
    left_out: dict[str, str] = {}
    for pattern, inner in grouping.items():
        found = find_groups(model, inner, example, interface)
        mine = [layer for layer in found.layers if matches(pattern, layer.name)]
        reasons = {name: why for name, why in found.left_out.items() if matches(pattern, name)}
        if not mine and not reasons:
            raise ValueError(
                f"grouping: the pattern {pattern!r} matches no layer of {grouping_name(inner)!r}; "
                f"its layers are {', '.join(x.name for x in found.layers) or '(none)'}"
            )
        left_out.update({n: why for n, why in reasons.items() if n not in left_out})
        for layer in mine:
            layers.setdefault(layer.name, layer)
    return Groups(layers.values(), {n: why for n, why in left_out.items() if n not in layers})

"""Experts as groups, and the hidden units inside them: the grouping `expert`, and part of `hidden`.

Experts are found by the shapes of their weights, see `expert_modules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.layout_proof import proved_layouts
from lightning_wgsef.groupings.unit_removal import unit_removal
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.example_input import model_copy, run_example
from lightning_wgsef.network.experts import Experts, expert_modules

# Names by which the weights are tried first that read the hidden units.
_DOWN = re.compile(r"down|out|w2|w_2|fc2|second|wo\b", re.IGNORECASE)

# Bytes that rows must be a multiple of for products of many matrices at once.
_ALIGNED = 16

_UNKNOWN = (
    "which axes of its three-dimensional weights are the hidden units of its experts is not known "
    "without an example_input, on which that is tried"
)

_NONE = (
    "the hidden units of its experts are not where they were looked for, along every axis of its "
    "three-dimensional weights, with gates one after another and in turn"
)


def expert_groups(model: nn.Module) -> Groups:
    """Group all weights of an expert, and the router's row for it.

    What zero weights make of a token is zero, and the router goes on to choose among all experts:
    one that is zero and gone adds nothing, as before. At least as many experts stay as a token is
    sent to.

    Args:
        model: any module; it is not touched.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate = nn.Linear(4, 3)
    ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    >>> print(expert_groups(Block()))
    layer    grouping  groups  weights each  budget  removable
    experts    expert       3            25       -        yes
    """
    layers = []
    for experts in expert_modules(model):
        members = [
            Member(experts.path(name), parameter, (0,))
            for name, parameter in experts.stacked.items()
        ]
        for number, (path, module) in enumerate(experts.children.items()):
            members += [
                Member(
                    experts.path(f"{path}.{name}"),
                    parameter,
                    (0,),
                    torch.tensor([number], device=parameter.device),
                    (1, *parameter.shape),
                )
                for name, parameter in module.named_parameters()
            ]
        members += _router_rows(experts)
        least = min(experts.active, experts.count)
        layers.append(
            GroupedLayer(
                experts.name,
                "expert",
                experts.count,
                tuple(members),
                removable=True,
                has_reader=True,
                least=least,
            )
        )
    return Groups(layers)


def _router_rows(experts: Experts) -> Iterator[Member]:
    if experts.router is None:
        return
    name, module = experts.router
    for tensor, parameter in module.named_parameters(recurse=False):
        rows = torch.full((len(parameter),), -1, device=parameter.device)
        if len(rows) > max(experts.numbers):
            rows[list(experts.numbers)] = torch.arange(experts.count, device=rows.device)
            yield Member(f"{name}.{tensor}".lstrip("."), parameter, (0,), rows)


def expert_units(
    model: nn.Module, example_input: Any | None
) -> tuple[list[GroupedLayer], dict[str, str]]:
    """Group the hidden units of experts that share weights of three axes: a layer for each expert.

    Experts that are modules of their own are MLP blocks like others. Which axis holds the units,
    and how the halves of a gate lie, is proved with the example input.

    Returns:
        The layers, and for modules whose units are not known the reason.
    """
    candidates = {x.name: x for x in expert_modules(model) if x.stacked}
    if example_input is None:
        return [], dict.fromkeys(candidates, _UNKNOWN)
    layouts = {name: list(_layouts(experts)) for name, experts in candidates.items()}
    left_out = {name: _NONE for name, found in layouts.items() if not found}
    tried = {name: found for name, found in layouts.items() if found}
    proved, wrong = proved_layouts(model, example_input, tried) if tried else ({}, {})
    left_out.update({name: why or _NONE for name, why in wrong.items()})
    units = [x for layer in proved.values() for x in _each(candidates[layer.name], layer)]
    multiple = _multiple(model, example_input, units) if units else 1
    return [replace(layer, multiple=multiple) for layer in units], left_out


@torch.no_grad()
def _multiple(model: nn.Module, example_input: Any, units: list[GroupedLayer]) -> int:
    """Find the numbers of units that experts run with: any, or whole multiples of 16 bytes."""
    for multiple in (1, _ALIGNED // units[0].members[-1].parameter.element_size()):
        network = model_copy(model).eval()
        dead = [(layer, torch.arange(layer.count) >= multiple) for layer in units]
        try:
            unit_removal(network, dead).apply(network)
            run_example(network, example_input)
        except Exception:  # kernels refuse sizes in their own ways
            continue
        return multiple
    return 1


def _layouts(experts: Experts) -> Iterator[GroupedLayer]:
    """Units of all experts, in every layout that the shapes allow, the likeliest first."""
    cubes = [name for name, x in experts.stacked.items() if x.dim() == 3]
    for down in sorted(cubes, key=lambda name: (not _DOWN.search(name), -cubes.index(name))):
        for axis in (2, 1):
            reader = experts.stacked[down]
            width = reader.shape[axis]
            ups = [name for name in cubes if name != down]
            choices = [list(_rows(experts.stacked[name], width)) for name in ups]
            for chosen in product(*choices):
                members = []
                for name, (place, units) in zip(ups, chosen, strict=True):
                    members.append(_member(experts, name, place, units, width))
                    members += [
                        _member(experts, bias, 1, units, width)
                        for bias, x in experts.stacked.items()
                        if x.dim() == 2 and _belongs(bias, name, x, len(units), reader, axis)
                    ]
                units = torch.arange(width, device=reader.device)
                members.append(_member(experts, down, axis, units, width))
                count = experts.count * width
                yield GroupedLayer(experts.name, "hidden", count, tuple(members), has_reader=True)


def _rows(weight: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the axes that may hold the units, with the unit of every place along them."""
    for axis in (1, 2):
        places = torch.arange(weight.shape[axis], device=weight.device)
        if len(places) == width:
            yield axis, places
        elif len(places) == 2 * width:
            yield from ((axis, places % width), (axis, places // 2))


def _belongs(bias: str, name: str, value: Tensor, size: int, reader: Tensor, axis: int) -> bool:
    """Is this the bias of the weight of a name, and not of what reads the units?"""
    if value.shape[1] != size:
        return False
    return bias.startswith(name) or value.shape[1] != reader.shape[3 - axis]


def _member(experts: Experts, name: str, axis: int, units: Tensor, width: int) -> Member:
    starts = torch.arange(experts.count, device=units.device) * width
    index = (starts[:, None] + units).flatten()
    return Member(experts.path(name), experts.stacked[name], (0, axis), index)


def _each(experts: Experts, layer: GroupedLayer) -> Iterator[GroupedLayer]:
    """Yield the units of every expert as a layer of its own."""
    width = layer.count // experts.count
    for number in range(experts.count):
        members = []
        for member in layer.members:
            assert member.index is not None
            own = member.index[: len(member.index) // experts.count]
            members.append(
                Member(member.name, member.parameter, (member.axes[1] - 1,), own, at=number)
            )
        yield GroupedLayer(
            f"{experts.name}.{experts.numbers[number]}".lstrip("."),
            "hidden",
            width,
            tuple(members),
            removable=True,
            has_reader=True,
        )

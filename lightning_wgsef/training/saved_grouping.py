"""Grouping of a saved run: its groups are found again without the call that found them first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.budget import Budget, parsed_size
from lightning_wgsef.groupings.registry import Grouping, find_groups, grouping_name
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.layers import tensors_by_name, unwrap
from lightning_wgsef.training.schedules import CubicRamp

_KEY = "WGSEFCallback"

_LARGEST = 2**63


def grouping_state(groups: Groups, grouping: Grouping, k: Budget | CubicRamp) -> dict[str, Any]:
    """Return what was grouped and how, in plain types and tensors.

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> state = grouping_state(group_parameters(network), "channel", 0.5)
    >>> state["grouping"], state["k"], list(state["layers"])
    ('channel', 0.5, ['1'])
    """
    k = k.k if isinstance(k, CubicRamp) else k
    return {
        "grouping": grouping_name(grouping),
        "k": {name: _number(x) for name, x in k.items()} if isinstance(k, Mapping) else _number(k),
        "layers": {
            layer.name: {
                "grouping": layer.grouping,
                "count": layer.count,
                # Of n:m the name says it all; an index for every weight would be large.
                "members": []
                if layer.m
                else [
                    {
                        "name": member.name,
                        "axes": list(member.axes),
                        "index": None if member.index is None else member.index.cpu().clone(),
                        "shape": None if member.shape is None else list(member.shape),
                    }
                    for member in layer.members
                ],
            }
            for layer in groups.layers
        },
    }


def check_same_grouping(saved: object, own: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a saved `grouping_state` has the groups of this run.

    Numbers of groups may agree where groups do not.
    """
    if not isinstance(saved, Mapping) or saved.keys() != own.keys() or not _is_plain(saved):
        raise ValueError(
            "the saved state is damaged: grouping must be what grouping_state returned"
        )
    if not _same(saved["layers"], own["layers"]):
        raise ValueError(
            f"the saved state is of other groups: those of {said_of(saved)}, this run has "
            f"{said_of(own)}; resume with the grouping of before, or start without the state"
        )


def _is_plain(saved: Mapping[str, Any]) -> bool:
    """Tell whether the name and k are what they can be."""
    k = saved["k"] if isinstance(saved["k"], Mapping) else {"": saved["k"]}
    if isinstance(saved["k"], str) and parsed_size(saved["k"]) is not None:
        k = {"": 1}
    return bool(k) and all(
        isinstance(name, str)
        and ((type(x) is int and 0 < x < _LARGEST) or (type(x) is float and 0 < x <= 1))
        for name, x in [(saved["grouping"], 1), *k.items()]
    )


def _same(saved: object, own: object) -> bool:
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        return saved.keys() == own.keys() and all(_same(saved[x], own[x]) for x in own)
    if isinstance(saved, list) and isinstance(own, list):
        return len(saved) == len(own) and all(map(_same, saved, own))
    if isinstance(saved, Tensor) and isinstance(own, Tensor):
        return saved.dtype == own.dtype and torch.equal(saved.cpu(), own)
    return type(saved) is type(own) and not isinstance(own, Tensor) and saved == own


def saved_groupings(content: object) -> Iterator[Mapping[str, Any]]:
    """Yield the `grouping_state` of every callback in a Lightning checkpoint that has one."""
    states = content.get("callbacks") if isinstance(content, Mapping) else None
    for key, state in states.items() if isinstance(states, Mapping) else ():
        saved = state.get("grouping") if isinstance(state, Mapping) else None
        if str(key).startswith(_KEY) and isinstance(saved, Mapping):
            yield saved


def saved_grouping(saved: Sequence[Mapping[str, Any]]) -> Grouping:
    """Return a grouping that finds the groups of saved runs again, under their names."""

    def find(model: nn.Module) -> Groups:
        return Groups(layer for one in saved for layer in groups_of(one, model).layers)

    find.__name__ = " and ".join(dict.fromkeys(str(one.get("grouping")) for one in saved))
    return find


def said_of(saved: Mapping[str, Any]) -> str:
    """Name a saved grouping and its k, as arguments."""
    return f"grouping={saved.get('grouping')!r}, k={saved.get('k')!r}"


def groups_of(saved: Mapping[str, Any], model: nn.Module) -> Groups:
    """Find the groups of a saved run in a model, without budgets.

    Raises:
        ValueError: a damaged state, or one of another model.

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> saved = grouping_state(group_parameters(network), "channel", 0.5)
    >>> groups_of(saved, network).counts
    [3]
    """
    tensors = tensors_by_name(unwrap(model))
    try:
        return Groups(_layer(model, name, x, tensors) for name, x in saved["layers"].items())
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the saved grouping is damaged: {error!r}") from error


def _layer(
    model: nn.Module, name: str, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> GroupedLayer:
    grouping, count = str(saved["grouping"]), int(saved["count"])
    if saved["members"]:
        members = tuple(_member(part, tensors) for part in saved["members"])
        return GroupedLayer(name, grouping, count, members)
    found = {layer.name: layer for layer in find_groups(model, grouping).layers}
    if name not in found or found[name].count != count:
        raise ValueError(
            f"the saved grouping has {count} groups of {grouping!r} in '{name}', which the model "
            "lacks: another model"
        )
    return found[name]


def _member(part: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Member:
    name, index, shape = part["name"], part["index"], part["shape"]
    if name not in tensors:
        raise ValueError(f"the saved grouping has '{name}', which the model lacks: another model")
    if index is not None and (not isinstance(index, Tensor) or index.dtype != torch.long):
        raise TypeError(f"index of '{name}'")
    parameter = tensors[name]
    return Member(
        name,
        parameter,
        tuple(int(axis) for axis in part["axes"]),
        None if index is None else index.to(parameter.device),
        None if shape is None else tuple(int(size) for size in shape),
    )


def _number(k: Any) -> int | float | str:
    if isinstance(k, str):
        return k
    return int(k) if isinstance(k, Integral) else float(k)

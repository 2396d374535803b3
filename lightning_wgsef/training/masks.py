"""Masks: which groups are alive, found in weights or files, and applied to weights and moments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_wgsef.groups.grouped_layer import on_model, with_values
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.layers import canonical_name
from lightning_wgsef.utils.files import read_checkpoint

# For every layer, by name, a boolean for every group: alive?
Masks = dict[str, Tensor]


def masks_from_zeros(groups: Groups, state_dict: Mapping[str, Tensor] | None = None) -> Masks:
    """Return the masks that weights already have: a group is dead where all of it is zero.

    Args:
        groups: the groups of a model, as `group_parameters` makes them.
        state_dict: look at these weights instead of the model's own.

    Raises:
        ValueError: no group is zero, or ``state_dict`` lacks a weight or has another shape.

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> _ = network[1].weight.data[:, 1].zero_()
    >>> masks_from_zeros(group_parameters(network, "channel"))
    {'1': tensor([ True, False,  True])}
    """
    measured = groups if state_dict is None else _groups_of(groups, state_dict)
    alive = measured.alive().to(groups.device)
    if bool(alive.all()):
        raise ValueError(
            f"no group is zero in {', '.join(layer.name for layer in groups.layers)}: these "
            "weights are not pruned; take those of a pruned network, with the grouping it had"
        )
    return groups.split(alive)


def given_masks(groups: Groups, masks: str | Path) -> Masks:
    """Return `masks_from_zeros` for "from_zeros", else those of the checkpoint at this path.

    A layer that is zero as a whole is named in a warning.

    Raises:
        ValueError: no mask is found, or the model does not have the checkpoint's weights.
    """
    if masks == "from_zeros":
        found = masks_from_zeros(groups)
    else:
        found = masks_from_checkpoint(groups, masks)
        if other := unmasked(groups, found):
            raise ValueError(
                f"masks: weights of {', '.join(other)} that are zero in {str(masks)!r} are not "
                "zero in the model: other weights would be trained under this mask. Load the "
                "checkpoint's weights first (load_from_checkpoint, load_state_dict)"
            )
    if whole := [name for name, mask in found.items() if not bool(mask.any())]:
        warnings.warn(
            f"{', '.join(whole)}: zero as a whole, and kept so. If these layers are new and start "
            f"at zero (a head, LoRA's B), leave them out with exclude={whole}: they would never "
            "learn",
            stacklevel=2,
        )
    return found


def within_masks(groups: Groups, masks: Mapping[str, Tensor]) -> Groups:
    """Return the groups with what is alive as their budgets; n:m budgets stay.

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> groups = group_parameters(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), k=1.0)
    >>> within_masks(groups, {"1": torch.tensor([True, False, True])}).budgets.tolist()
    [2.0]
    """
    layers = []
    for layer in groups.layers:
        alive = masks[layer.name].cpu()
        costs = torch.ones(layer.count) if layer.costs is None else layer.costs.cpu()
        budget = float(costs.double()[alive].sum()) or float(costs.min())  # a budget is positive
        layers.append(layer if layer.m else replace(layer, budget=budget))
    of_all = sum(layer.budget for layer in layers) if groups.is_global else None
    return Groups(layers, groups.left_out, of_all)


def apply_masks(groups: Groups, masks: Mapping[str, Tensor]) -> None:
    """Set dead groups to exactly zero, in place."""
    for member, dead in _dead(groups, masks):
        member.seen(member.weights).masked_fill_(dead, 0)


@torch.no_grad()
def unmasked(groups: Groups, masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the layers in which weights of dead groups are not zero.

    Of sharded parameters every process sees its own part. Waits for an accelerator.

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> groups = group_parameters(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    >>> unmasked(groups, {"1": torch.tensor([True, False, True])})
    ['1']
    """
    found = [
        (member.seen(member.weights).masked_fill(~dead, 0) != 0).any()
        for member, dead in _dead(groups, masks)
    ]
    names = [layer.name for layer in groups.layers for _ in layer.members]
    flags = torch.stack(found).tolist() if found else []
    return list(dict.fromkeys(name for name, one in zip(names, flags, strict=True) if one))


def unmasked_in(
    groups: Groups, masks: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
) -> list[str]:
    """Return `unmasked` of the weights in a ``state_dict``.

    Raises:
        ValueError: it lacks a weight, or has another shape.
    """
    on_cpu = {name: mask.cpu() for name, mask in masks.items()}
    return unmasked(_groups_of(groups, state_dict), on_cpu)


def apply_masks_to(module: nn.Module, groups: Groups, masks: Mapping[str, Tensor]) -> None:
    """Set dead groups to zero in a copy of the model, such as an average of its weights.

    An average that torch wraps keeps the model under the name "module".

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> average = torch.optim.swa_utils.AveragedModel(network)
    >>> masks = {"1": torch.tensor([True, False, True])}
    >>> apply_masks_to(average, group_parameters(network, "channel"), masks)
    >>> average.module[1].weight[:, 1].tolist(), bool(network[1].weight.all())
    ([0.0, 0.0], True)
    """
    inner = module.module if isinstance(module, AveragedModel) else module
    layers = [layer for layer in groups.layers if layer.name in masks]
    apply_masks(Groups(on_model(layers, inner)), masks)


def clear_moments(groups: Groups, masks: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Zero the optimizer's moments of dead groups: all state that is shaped like its parameter.

    A `ZeroRedundancyOptimizer` keeps the state of this process in an optimizer of its own.
    """
    local = getattr(optimizer, "optim", None)
    holder = local if isinstance(local, Optimizer) else optimizer
    for member, dead in _dead(groups, masks):
        for value in holder.state.get(member.parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == member.parameter.shape:
                member.seen(member.own(value)).masked_fill_(dead.to(value.device), 0)


def masks_from_checkpoint(groups: Groups, path: str | Path) -> Masks:
    """Return the masks of the weights in a checkpoint: Lightning's, or a plain ``state_dict``.

    Raises:
        ValueError: no such file, not a checkpoint, of another model, or without a zero group.
    """
    try:
        content = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"masks: {str(path)!r} cannot be read: {error}") from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"masks: {str(path)!r} holds {type(content).__name__}, no state_dict; take a Lightning "
            "checkpoint, or a file of torch.save(model.state_dict(), ..)"
        )
    return masks_from_zeros(groups, state_dict)


def _groups_of(groups: Groups, state_dict: Mapping[str, Tensor]) -> Groups:
    """Return the groups with the weights of a ``state_dict``, checked to be like the model's."""
    values = {canonical_name(str(name)): tensor for name, tensor in state_dict.items()}
    for layer in groups.layers:
        for member in layer.members:
            _check_like(member.name, values.get(member.name), member.parameter)
    return Groups(with_values(groups.layers, values))


def _dead(groups: Groups, masks: Mapping[str, Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """Yield every member, and which of its weights are dead, to broadcast with them."""
    nobody = torch.zeros(0, dtype=torch.bool, device=groups.device)
    alive = torch.cat([nobody, *(masks[layer.name].to(groups.device) for layer in groups.layers)])
    for member, part in zip(groups.layout.members, groups.layout.spread(alive, True), strict=True):
        yield member, ~member.laid(part)


def _check_like(name: str, found: object, parameter: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"the checkpoint has no weight '{name}': it is of another model")
    if not found.is_floating_point() or found.layout != torch.strided or found.is_meta:
        raise ValueError(
            f"the checkpoint's '{name}' must be a dense tensor of floats, it has dtype "
            f"{found.dtype}, layout {found.layout} and is on {found.device}"
        )
    if found.shape != parameter.shape:
        raise ValueError(
            f"the checkpoint's '{name}' has shape {tuple(found.shape)}, the model's has "
            f"{tuple(parameter.shape)}: it is of another model"
        )

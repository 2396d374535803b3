"""Masks: which groups are alive, found in weights or files, and applied to weights and moments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.registry import Grouping, grouping_name
from lightning_wgsef.groups.grouped_layer import GroupedLayer, on_model, with_values
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.layers import (
    canonical_name,
    is_lazy,
    modules_by_name,
    tensors_by_name,
)
from lightning_wgsef.network.sharding import unsharded_copy
from lightning_wgsef.training.saved_grouping import said_of, saved_grouping, saved_groupings
from lightning_wgsef.utils.files import read_checkpoint
from lightning_wgsef.utils.validation import check_kind

# A row for padding is zero and trained by nobody.
_WITH_ZERO_ROWS = (nn.Embedding, nn.EmbeddingBag)

# Share of a layer's weights from which on zeros in no group are no accident.
_MANY_ZEROS = 0.01

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
    check_kind("groups", groups, Groups, "what group_parameters returns")
    if state_dict is not None:
        check_kind("state_dict", state_dict, Mapping, "a mapping from names to tensors")
    measured = groups if state_dict is None else _groups_of(groups, state_dict)
    alive = measured.alive().to(groups.device)
    if bool(alive.all()):
        raise ValueError(
            f"no group is zero in {', '.join(layer.name for layer in groups.layers)}: these "
            "weights are not pruned; take those of a pruned network, with the grouping it had, or "
            "beside masks= no grouping: it is found then"
        )
    return groups.split(alive)


def pruned_grouping(model: nn.Module, masks: str | Path, arguments: Mapping[str, Any]) -> Grouping:
    """Find how a network was pruned, where nobody says it.

    As the checkpoint's callbacks say; else as `channel` has it, if its zero groups explain every
    zero; else by single weights, of which all that are zero are dead, see `zero_weights`.

    Args:
        model: any module.
        masks: "from_zeros", or the path of a checkpoint.
        arguments: of `group_parameters`.

    Raises:
        ValueError: a checkpoint that cannot be read, or is of another model.
    """
    plain = unsharded_copy(model)
    values = tensors_by_name(plain)
    if masks != "from_zeros":
        content = _read(masks)
        if saved := list(saved_groupings(content)):
            return saved_grouping(saved)
        state = {canonical_name(str(name)): x for name, x in _weights(content, masks).items()}
        values |= {name: x for name, x in state.items() if name in values}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what may be the network's input: nothing is looked for
        try:
            groups = group_parameters(plain, **arguments)
        except ValueError:
            groups = Groups([])
    default: Grouping = arguments["grouping"]
    single = zero_weights(plain, values)
    vectors = {m.name for x in single for m in x.members if m.parameter.dim() == 1}
    if not single or (groups.layers and not vectors and not _unexplained(plain, groups, values)):
        return default

    def element(model: nn.Module) -> Groups:
        return Groups(zero_weights(model, values))

    return element


def _unexplained(
    model: nn.Module, groups: Groups, values: Mapping[str, Tensor]
) -> dict[str, float]:
    """Find matrices with zeros outside of zero groups: their share of all weights, by name."""
    own = Groups(with_values(groups.layers, values))
    ignored = {name for name, why in groups.left_out.items() if why.endswith("named in exclude")}
    left = {
        f"{path}.{name}".lstrip("."): values[f"{path}.{name}".lstrip(".")] == 0
        for path, module in modules_by_name(model).items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
        and not isinstance(module, _WITH_ZERO_ROWS)
        and path not in ignored
        and f"{path}.{name}".lstrip(".") in values
    }
    for member, dead in _dead(own, own.split(own.alive())):
        if member.name in left:
            member.seen(left[member.name]).masked_fill_(dead, False)
    return {name: float(x.double().mean()) for name, x in left.items() if bool(x.any())}


def zero_weights(model: nn.Module, values: Mapping[str, Tensor]) -> list[GroupedLayer]:
    """Make groups of single weights of every layer in which some are zero.

    The bias of a filter that is zero is with it, and the shift of a norm whose scale is zero, if
    they are zero, too.

    Args:
        model: any module.
        values: whose weights are looked at, by canonical name.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> _ = network[0].weight.data[0].zero_()
    >>> [(x.name, x.count) for x in zero_weights(network, tensors_by_name(network))]
    [('0', 4)]
    """
    layers, seen = [], set[int]()
    for path, module in modules_by_name(model).items():
        parameters = dict(module.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            whole = f"{path}.{name}".lstrip(".")
            value = values.get(whole, parameter)
            vector = value.dim() == 1
            if id(parameter) in seen or isinstance(module, _WITH_ZERO_ROWS):
                continue
            seen.add(id(parameter))
            if bool((value != 0).all()) or (vector and (name != "weight" or len(value) < 2)):
                continue
            own = path if name == "weight" else whole
            groups = {own: (value.numel(), [Member(whole, parameter, tuple(range(value.dim())))])}
            across = int(getattr(module, "transposed", False))
            dead = value.eq(0) if vector else value.eq(0).movedim(across, 0).flatten(1).all(1)
            bias = parameters.get(named := name.replace("weight", "bias"))
            if named != name and bias is not None and bias.shape == dead.shape:
                shift = f"{path}.{named}".lstrip(".")
                zero = values[shift].eq(0)
                # A zero that is not with a zero filter or scale is trained.
                inside = zero & dead if vector else ~zero | dead
                index = torch.where(inside, torch.arange(len(dead), device=dead.device), -1)
                member = Member(shift, bias, (0,), index.to(bias.device))
                if bool((zero & dead).any()):
                    groups.setdefault(own if vector else shift, (len(dead), []))[1].append(member)
            layers += [GroupedLayer(x, "element", n, tuple(m)) for x, (n, m) in groups.items()]
    return layers


def given_masks(model: nn.Module, groups: Groups, masks: str | Path, grouping: Grouping) -> Masks:
    """Return `masks_from_zeros` for "from_zeros", else those of the checkpoint at this path.

    A warning names layers that are zero as a whole, and zeros that are in no zero group.

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
    plain = unsharded_copy(model) is model  # of sharded weights every process sees a part
    zeros = _unexplained(model, groups, tensors_by_name(model)) if plain else {}
    lost = {name: share for name, share in zeros.items() if share >= _MANY_ZEROS}
    if lost:
        listed = ", ".join(f"{name} ({share:.0%})" for name, share in lost.items())
        saved = [] if masks == "from_zeros" else saved_groupings(_read(masks))
        by = "".join(f" The checkpoint was pruned with {said_of(one)}." for one in saved)
        warnings.warn(
            f"masks: zero weights of {listed} are in no zero group of "
            f"grouping={grouping_name(grouping)!r} and will be trained.{by} Without grouping= "
            "every zero is kept",
            stacklevel=2,
        )
    matrices = {x.name for x in groups.layers if x.largest_member.parameter.dim() > 1}
    if whole := [name for name, mask in found.items() if name in matrices and not bool(mask.any())]:
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
    if groups.is_global and groups.size is not None:
        of_all = float(groups.size.of(torch.cat([masks[x.name] for x in layers]).to(groups.device)))
    return Groups(layers, groups.left_out, of_all, size=groups.size)


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


class Twin:
    """Part of a model that is built like another part of it, with groups: an average, or a teacher.

    Args:
        module: the part.
        prefix: path of the other.
    """

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.module, self.prefix = module, prefix
        self._before = self._sums()

    def mask(self, groups: Groups, masks: Mapping[str, Tensor]) -> None:
        """Set its dead groups to zero if it has changed since: a teacher never does."""
        if torch.equal(self._before, self._sums()):
            return
        layers = [
            replace(
                layer,
                members=tuple(
                    replace(m, name=m.name.removeprefix(f"{self.prefix}.")) for m in layer.members
                ),
                statistics=(),
            )
            for layer in groups.layers
            if layer.name in masks and _within(layer, self.prefix)
        ]
        apply_masks(Groups(on_model(layers, self.module)), masks)

    @torch.no_grad()
    def _sums(self) -> Tensor:
        return torch.stack([x.double().sum().cpu() for x in self.module.parameters()])


def twins(model: nn.Module, groups: Groups) -> Iterator[Twin]:
    """Yield the largest parts that nobody trains and that are built like a part with groups.

    >>> import copy
    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> average = copy.deepcopy(network).requires_grad_(False)
    >>> model = nn.ModuleDict({"network": network, "average": average})
    >>> [twin.prefix for twin in twins(model, group_parameters(model))]
    ['network']
    """
    modules = modules_by_name(model)
    built = {path: _built(module) for path, module in modules.items() if path}
    grouped = [path for path in built if any(_within(layer, path) for layer in groups.layers)]
    taken: list[str] = []
    for path, module in modules.items():
        if not path or path in grouped or not built[path] or path.startswith(tuple(taken)):
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            continue
        alike = [other for other in grouped if built[other] == built[path]]
        if alike:
            taken.append(f"{path}.")
            yield Twin(module, alike[0])


def _within(layer: GroupedLayer, path: str) -> bool:
    return all(member.name.startswith(f"{path}.") for member in layer.members)


def _built(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [
        (canonical_name(name), parameter.shape)
        for name, parameter in module.named_parameters()
        if not is_lazy(parameter)
    ]


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
    return masks_from_zeros(groups, _weights(_read(path), path))


def _read(path: str | Path) -> Any:
    try:
        return read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"masks: {str(path)!r} cannot be read: {error}") from error


def _weights(content: Any, path: str | Path) -> dict[str, Tensor]:
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"masks: {str(path)!r} holds {type(content).__name__}, no state_dict; take a Lightning "
            "checkpoint, or a file of torch.save(model.state_dict(), ..)"
        )
    return state_dict


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

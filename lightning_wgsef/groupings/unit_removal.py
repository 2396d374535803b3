"""Surgery plans for units: heads of attention, hidden units of an MLP, and whole experts."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.head import HEADS, KEY_VALUE_HEADS
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.network.attention import AttentionBlock, attention_blocks
from lightning_wgsef.network.experts import expert_modules
from lightning_wgsef.network.layers import modules_by_name
from lightning_wgsef.network.surgery import RemovalPlan

_WIDTHS = ("all_head_size", "inner_dim", "split_size")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts")

_UNITS = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_dim", "moe_intermediate_size")

_NORMS = ("num_features", "num_parameters")

_OUTPUTS = ("out_features", "out_channels", "nf")

_INPUTS = ("in_features", "in_channels", "nx")


def unit_removal(
    model: nn.Module, units: Iterable[tuple[GroupedLayer, Tensor]], *, widths: bool = False
) -> RemovalPlan:
    """Plan to take heads, hidden units or experts out of a model.

    Args:
        model: the model.
        units: groups of a layer, with which of them go.
        widths: lower every number of an attention module that is the width of all its heads,
            whatever it is called, beside those with known names; a trial tells which is right.

    >>> from lightning_wgsef.groupings.head import head_groups
    >>> network = nn.TransformerEncoderLayer(8, nhead=4)
    >>> gone = torch.tensor([True, True, False, False])
    >>> unit_removal(network, [(head_groups(network).layers[0], gone)]).heads
    {'self_attn': [2, 3]}
    """
    plan = RemovalPlan()
    modules = modules_by_name(model)
    units = even_units(units)
    has_heads = any(layer.grouping == "head" for layer, _ in units)
    blocks = {block.name: block for block in attention_blocks(model)} if has_heads else {}
    for layer, dead in units:
        if layer.grouping == "expert":
            _drop(plan, modules, model, layer, dead)
            continue
        _cut(plan, modules, layer, dead, widths)
        if layer.grouping != "head":
            continue
        block = blocks[layer.name]
        if isinstance(block.module, nn.MultiheadAttention):
            plan.heads[block.name] = (~dead).nonzero().flatten().tolist()
        else:
            _resize(plan, modules, block, dead, widths)
    return plan


def even_units(
    units: Iterable[tuple[GroupedLayer, Tensor]],
) -> list[tuple[GroupedLayer, Tensor]]:
    """Let experts that share their weights lose as many units each as the one that can lose least.

    Whole experts go one by one.

    >>> from lightning_wgsef.groups.members import Member
    >>> weight = nn.Parameter(torch.ones(2, 3, 4))
    >>> layers = [
    ...     GroupedLayer(f"{n}", "hidden", 3, (Member("experts.up", weight, (0,), at=n),))
    ...     for n in range(2)
    ... ]
    >>> dead = torch.tensor([[True, True, False], [False, False, True]])
    >>> [gone.tolist() for _, gone in even_units(zip(layers, dead, strict=True))]
    [[True, False, False], [False, False, True]]
    """
    units = list(units)
    least: dict[str, int] = {}
    told: dict[str, int] = {}
    for layer, dead in units:
        first = layer.members[0]
        if first.at is not None:
            told[first.name] = told.get(first.name, 0) + 1
            least[first.name] = min(int(dead.sum()), least.get(first.name, len(dead)))
    even = []
    for layer, dead in units:
        first = layer.members[0]
        if first.at is not None:
            every = told[first.name] == len(first.parameter)
            most = least[first.name] if every else 0
            left = math.ceil((layer.count - most) / layer.multiple) * layer.multiple
            count = max(0, layer.count - left)
            gone = dead.nonzero().flatten()[:count]
            dead = torch.zeros_like(dead).index_fill_(0, gone, True)
        even.append((layer, dead))
    return even


def _drop(
    plan: RemovalPlan,
    modules: dict[str, nn.Module],
    model: nn.Module,
    layer: GroupedLayer,
    dead: Tensor,
) -> None:
    """Plan to take whole experts out; the router goes on to know them."""
    experts = next(x for x in expert_modules(model) if x.name == layer.name)
    gone = dead.nonzero().flatten().tolist()
    plan.silenced += [experts.path(path) for n, path in enumerate(experts.children) if n in gone]
    if not experts.stacked or not gone:
        return
    for name in experts.stacked:
        path, _, tensor = experts.path(name).rpartition(".")
        plan.remove(path, modules[path], tensor, 0, gone)
    plan.experts[experts.name] = (~dead).nonzero().flatten().tolist()
    for name in _EXPERTS:
        if getattr(experts.module, name, None) == experts.count:
            plan.resize(experts.name, experts.module, name, len(gone))


def _cut(
    plan: RemovalPlan,
    modules: dict[str, nn.Module],
    layer: GroupedLayer,
    dead: Tensor,
    widths: bool,
) -> None:
    for member in layer.members:
        index = torch.arange(member.slices) if member.index is None else member.index.cpu()
        gone = (dead[index] & (index >= 0)).nonzero().flatten().tolist()
        path, _, tensor = member.name.rpartition(".")
        module, (axis,) = modules[path], member.axes
        if member.at is not None:
            if gone:
                plan.remove(path, module, tensor, axis + 1, gone, at=member.at)
            if member is layer.members[-1] and not member.at:  # once for all experts
                for name, value in vars(module).items():
                    is_width = type(value) is int and value == layer.count
                    if is_width and (widths or name in _UNITS):
                        plan.resize(path, module, name, len(gone))
            continue
        plan.remove(path, module, tensor, axis, gone)
        if tensor != "weight" or isinstance(module, nn.MultiheadAttention):
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for statistic in ("running_mean", "running_var"):
                plan.remove(path, module, statistic, 0, gone)
        outward = axis == int(hasattr(module, "nf"))  # a Conv1D has its outputs along axis 1
        for name in _NORMS + (_OUTPUTS if outward else _INPUTS):
            if hasattr(module, name):
                plan.resize(path, module, name, len(gone))


def _resize(
    plan: RemovalPlan,
    modules: dict[str, nn.Module],
    block: AttentionBlock,
    dead: Tensor,
    widths: bool,
) -> None:
    """What the module says of its heads, and of the width of all of them."""
    queries = block.layers["output"].inputs
    for path, module in modules.items():
        if module is not block.module and module is not block.holder:
            continue
        known = (*HEADS, *KEY_VALUE_HEADS, *_WIDTHS)
        others = [name for name in vars(module) if widths and name not in known]
        for name in (*known, *others):
            value = getattr(module, name, None)
            is_count = name in HEADS or name in KEY_VALUE_HEADS
            if type(value) is int and (is_count or value == queries):
                plan.resize(path, module, name, value * int(dead.sum()) // len(dead))

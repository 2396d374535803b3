"""What has to be cut when heads of attention, or hidden units of an MLP, are taken out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.head import HEADS, KEY_VALUE_HEADS
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.attention import AttentionBlock, attention_blocks
from lightning_wgsef.network.layers import modules_by_name
from lightning_wgsef.network.surgery import RemovalPlan

_WIDTHS = ("all_head_size", "inner_dim", "split_size")

_NORMS = ("num_features", "num_parameters")

_OUTPUTS = ("out_features", "nf")

_INPUTS = ("in_features", "nx")


@dataclass(frozen=True, eq=False)
class DeadUnits:
    """Groups of a layer that nothing reads.

    Attributes:
        layer: its groups, of which the last member is what reads them.
        dead: for every group, whether its columns in that are zero; never all of them.
    """

    layer: GroupedLayer
    dead: Tensor


def dead_units(groups: Groups) -> list[DeadUnits]:
    """The heads or hidden units that nothing reads, where any can be taken out.

    >>> from lightning_wgsef.groupings.hidden import hidden_groups
    >>> network = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    >>> _ = network[2].weight.data[:, 1:3].zero_()
    >>> dead_units(hidden_groups(network))[0].dead.tolist()
    [False, True, True, False, False, False]
    """
    found = []
    for layer in groups.layers:
        dead = ~Groups([replace(layer, members=layer.members[-1:])]).alive().cpu()
        if bool(dead.all()):
            dead[0] = False  # a layer cannot be empty
        if layer.removable and bool(dead.any()):
            found.append(DeadUnits(layer, dead))
    return found


def unit_removal(model: nn.Module, found: Iterable[DeadUnits]) -> RemovalPlan:
    """The plan that takes heads or hidden units out of a model.

    >>> from lightning_wgsef.groupings.head import head_groups
    >>> network = nn.TransformerEncoderLayer(8, nhead=4)
    >>> _ = network.self_attn.out_proj.weight.data[:, :4].zero_()
    >>> unit_removal(network, dead_units(head_groups(network))).heads
    {'self_attn': [2, 3]}
    """
    plan = RemovalPlan()
    modules = modules_by_name(model)
    blocks = {block.name: block for block in attention_blocks(model)}
    for units in found:
        _cut(plan, modules, units.layer, units.dead)
        if units.layer.grouping != "head":
            continue
        block = blocks[units.layer.name]
        if isinstance(block.module, nn.MultiheadAttention):
            plan.heads[block.name] = (~units.dead).nonzero().flatten().tolist()
        else:
            _resize(plan, modules, block, units.dead)
    return plan


def _cut(
    plan: RemovalPlan, modules: dict[str, nn.Module], layer: GroupedLayer, dead: Tensor
) -> None:
    for member in layer.members:
        index = torch.arange(member.slices) if member.index is None else member.index.cpu()
        gone = (dead[index] & (index >= 0)).nonzero().flatten().tolist()
        path, _, tensor = member.name.rpartition(".")
        module, (axis,) = modules[path], member.axes
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
    plan: RemovalPlan, modules: dict[str, nn.Module], block: AttentionBlock, dead: Tensor
) -> None:
    """What the module says of its heads, and of the width of all of them."""
    queries = block.layers["output"].inputs
    for path, module in modules.items():
        if module is not block.module and module is not block.holder:
            continue
        for name in (*HEADS, *KEY_VALUE_HEADS, *_WIDTHS):
            value = getattr(module, name, None)
            if isinstance(value, int) and (name not in _WIDTHS or value == queries):
                plan.resize(path, module, name, value * int(dead.sum()) // len(dead))

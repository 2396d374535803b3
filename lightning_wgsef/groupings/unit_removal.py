"""Surgery plans for units: heads of attention and hidden units of an MLP, and what reads them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.head import HEADS, KEY_VALUE_HEADS
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.network.attention import AttentionBlock, attention_blocks
from lightning_wgsef.network.layers import modules_by_name
from lightning_wgsef.network.surgery import RemovalPlan

_WIDTHS = ("all_head_size", "inner_dim", "split_size")

_NORMS = ("num_features", "num_parameters")

_OUTPUTS = ("out_features", "out_channels", "nf")

_INPUTS = ("in_features", "in_channels", "nx")


def unit_removal(
    model: nn.Module, units: Iterable[tuple[GroupedLayer, Tensor]], *, widths: bool = False
) -> RemovalPlan:
    """Plan to take heads or hidden units out of a model.

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
    blocks = {block.name: block for block in attention_blocks(model)}
    for layer, dead in units:
        _cut(plan, modules, layer, dead)
        if layer.grouping != "head":
            continue
        block = blocks[layer.name]
        if isinstance(block.module, nn.MultiheadAttention):
            plan.heads[block.name] = (~dead).nonzero().flatten().tolist()
        else:
            _resize(plan, modules, block, dead, widths)
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

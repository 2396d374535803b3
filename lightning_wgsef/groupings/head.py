"""Attention heads as groups: the grouping `head`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.layout_proof import proved_layouts
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member, input_member, output_members
from lightning_wgsef.network.attention import ROLES, AttentionBlock, attention_blocks

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")

KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")

_HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size")

# Name, axis of the outputs, and roles of the parameters of torch's own module.
_TORCH_PLACES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("in_proj_weight", 0, ROLES),
    ("q_proj_weight", 0, ("query",)),
    ("k_proj_weight", 0, ("key",)),
    ("v_proj_weight", 0, ("value",)),
    ("in_proj_bias", 0, ROLES),
    ("bias_k", 2, ("key",)),
    ("bias_v", 2, ("value",)),
)


def head_groups(model: nn.Module, example_input: Any | None = None) -> Groups:
    """Group the rows of Q, K and V that make one attention head, and its columns of the output.

    A head that is zero adds nothing to the output; the bias of the output belongs to no head. Where
    several heads of queries share one of keys and values (grouped-query attention), they are one
    group with it, so that there are as many groups as heads of keys and values; where all share one
    (multi-query attention), the module is left out. What all heads share, such as a norm over the
    width of one head, belongs to no group.

    Found are `nn.MultiheadAttention` and modules whose layers have the names in `PROJECTIONS` (see
    `register_projections` for others). The number of heads comes from attributes of the module or
    of its ``config``, and must fit the shapes of the weights. With an example input the layout is
    proved: with the columns of half of the heads at zero, their rows may be anything. Modules for
    which no layout passes are left out. Weights beside the projections that have an entry for every
    head, such as tables of relative positions, are part of it if that passes with them.

    Args:
        model: any module; it is copied, not touched.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    >>> groups = head_groups(nn.TransformerEncoderLayer(8, nhead=2))
    >>> print(groups)
    layer      grouping  groups  weights each  budget  removable
    self_attn      head       2           140       -        yes
    """
    found: dict[str, GroupedLayer] = {}
    pending: dict[str, list[GroupedLayer]] = {}
    hindered: dict[str, GroupedLayer] = {}
    left_out: dict[str, str] = {}
    names = []
    for block in attention_blocks(model):
        names.append(block.name)
        try:
            layouts = _layouts(block)
        except _UnfitError as reason:
            left_out[block.name] = str(reason)
            continue
        if isinstance(block.module, nn.MultiheadAttention):
            (found[block.name],) = layouts
        elif example_input is not None:
            # Whatever may stand against taking heads out is tried, too.
            own = _entries(block, layouts[0].count)
            tried = [
                replace(layer, removable=True, obstacle="", members=(*some, *more, last))
                for more in ([own, []] if own else [[]])
                for layer in layouts
                for *some, last in [layer.members]
            ]
            pending[block.name] = tried
            if block.by_kind and layouts[0].obstacle not in ("", _UNPROVED):
                hindered[block.name] = layouts[0]
        elif block.by_kind and layouts[0].obstacle != _UNPROVED:
            found[block.name] = layouts[0]
        else:
            left_out[block.name] = _UNPROVED
    if pending:
        proved, wrong = proved_layouts(model, example_input, pending)
        found.update(proved)
        # What lies between the heads, such as a norm over all of them, spoils the proof.
        found.update({name: hindered[name] for name in wrong if name in hindered})
        left_out.update(
            {name: why or _NO_LAYOUT for name, why in wrong.items() if name not in hindered}
        )
    return Groups([found[name] for name in names if name in found], left_out)


class _UnfitError(Exception):
    """Reason why the heads of a module cannot be grouped."""


_UNPROVED = (
    "whether its fused layer holds its heads one after another or queries, keys and values is not "
    "known without an example_input, on which that is tried"
)


_NO_LAYOUT = (
    "its heads are not where they were looked for, in every layout that its shapes allow, by head "
    "and by kind: what would be one of them has an effect on others"
)


def _layouts(block: AttentionBlock) -> list[GroupedLayer]:
    """Groups of the heads of a module in every layout that its shapes allow, the plainest first."""
    if block.problem:
        raise _UnfitError(block.problem)
    if isinstance(block.module, nn.MultiheadAttention):
        count, members = block.module.num_heads, []
        widths = dict.fromkeys(ROLES, count * block.module.head_dim)
        for name, axis, roles in _TORCH_PLACES:
            parameter = getattr(block.module, name)
            if parameter is not None:
                path = f"{block.name}.{name}".lstrip(".")
                index = _owners(roles, widths, count, parameter)
                members.append(Member(path, parameter, (axis,), index))
        return [_grouped(block, count, members)]
    fused = len({block.layers[role].name for role in ROLES}) < len(ROLES)
    found, reason = [], ""
    try:
        widths = _widths(block)
        heads, count = _counts(block, widths)
        for parts in range(1, count + 1 if fused else 2):
            if count % parts == 0:
                found.append(_laid(block, count, widths, parts))
    except _UnfitError as error:
        reason = str(error)
    if found and found[0].count == 1 < heads:
        raise _UnfitError(
            f"its {heads} heads share one head of keys and values (multi-query attention): they "
            "can only go together"
        )
    if not found and fused:
        found += _side_by_side(block)
    if not found:
        raise _UnfitError(reason)
    return found


def _laid(block: AttentionBlock, count: int, widths: dict[str, int], parts: int) -> GroupedLayer:
    """Heads of fused layers in parts, each with its queries, then its keys, then its values."""
    members = []
    for layer in dict.fromkeys(block.layers[role] for role in ROLES):
        roles = tuple(role for role in ROLES if block.layers[role] is layer)
        own = parts if len(roles) > 1 else 1
        less = {role: width // own for role, width in widths.items()}
        one = _owners(roles, less, count // own, layer.weight)
        index = torch.cat([one + part * (count // own) for part in range(own)])
        members += output_members(layer, index)
    return _grouped(block, count, members)


def _side_by_side(block: AttentionBlock) -> list[GroupedLayer]:
    """Heads one after another in every layer, whatever the widths of their parts are."""
    told = [
        _number(block, names, config=config)
        for names in (KEY_VALUE_HEADS, HEADS)
        for config in (False, True)
    ]
    layers = list(dict.fromkeys(block.layers[role] for role in ROLES))
    found = []
    for count in dict.fromkeys(number for number in told if number > 1):
        sizes = [*(layer.outputs for layer in layers), block.layers["output"].inputs]
        if not any(size % count for size in sizes):
            members = []
            for layer in layers:
                rows = torch.arange(layer.outputs, device=layer.weight.device)
                index = rows.div(layer.outputs // count, rounding_mode="floor")
                members += output_members(layer, index)
            found.append(replace(_grouped(block, count, members), obstacle=_UNPROVED))
    return found


def _grouped(block: AttentionBlock, count: int, members: list[Member]) -> GroupedLayer:
    output = block.layers["output"]
    columns = _owners(("output",), {"output": output.inputs}, count, output.weight)
    members = [*members, input_member(output, columns)]
    obstacle = _obstacle(block, count)
    return GroupedLayer(
        block.name,
        "head",
        count,
        tuple(members),
        removable=not obstacle,
        obstacle=obstacle,
        has_reader=True,
    )


def _owners(
    roles: tuple[str, ...], widths: dict[str, int], count: int, parameter: Tensor
) -> Tensor:
    """Return the group of every output of a parameter that holds the roles one after another."""
    parts = []
    for role in roles:
        outputs = torch.arange(widths[role], device=parameter.device)
        parts.append(outputs.div(widths[role] // count, rounding_mode="floor"))
    return torch.cat(parts)


def _widths(block: AttentionBlock) -> dict[str, int]:
    """Return how many outputs the queries, keys and values have, over all heads."""
    layers = block.layers
    roles = {role: [r for r in ROLES if layers[r] is layers[role]] for role in ROLES}
    widths = {role: layers[role].outputs // len(roles[role]) for role in ROLES}
    if len(roles["query"]) == len(ROLES):
        # There may be fewer heads of keys and values; the queries are as wide as the output reads.
        widths["query"] = layers["output"].inputs
        widths["key"] = widths["value"] = (layers["query"].outputs - widths["query"]) // 2
    for role in ROLES:
        if sum(widths[r] for r in roles[role]) != layers[role].outputs or widths[role] <= 0:
            raise _UnfitError(
                f"the {layers[role].outputs} outputs of '{layers[role].name}' are not those of "
                f"{', '.join(roles[role])}: '{layers['output'].name}' reads {widths['query']}"
            )
    return widths


def _counts(block: AttentionBlock, widths: dict[str, int]) -> tuple[int, int]:
    """Count the heads of the queries, and of the keys and values."""
    query, key, value = (widths[role] for role in ROLES)
    width = told_width = _number(block, _HEAD_WIDTHS, config=False)
    heads = _number(block, HEADS, config=False) or (query // width if width else 0)
    heads = heads or _number(block, HEADS, config=True)
    if not heads:
        raise _UnfitError(
            f"the number of heads is unknown: neither the module nor its config has one of "
            f"{', '.join(HEADS)}"
        )
    width = width or query // heads
    shared = key // max(width, 1)
    given = _number(block, KEY_VALUE_HEADS, config=False)
    if not told_width:  # the config is that of all layers, and does not know of removed heads
        given = given or _number(block, KEY_VALUE_HEADS, config=True)
    output = block.layers["output"].inputs
    fits = (
        heads * width == query
        and shared * width == key
        and shared > 0
        and heads % shared == 0
        and value % shared == 0
        and value // shared * heads == output
        and given in (0, shared)
    )
    if not fits:
        told = f" ({given} of keys and values)" if given else ""
        raise _UnfitError(
            f"{heads} heads{told} of width {width} do not fit the shapes: queries {query}, "
            f"keys {key}, values {value}, inputs of the output projection {output}"
        )
    return heads, shared


def _number(block: AttentionBlock, names: Iterable[str], *, config: bool) -> int:
    """Return the first attribute with one of these names, 0 for none."""
    places: list[object] = [block.module, block.holder]
    if config:
        places = [getattr(place, "config", None) for place in places]
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _obstacle(block: AttentionBlock, count: int) -> str:
    """Say why zero heads cannot be taken out of the module; "" if they can."""
    if isinstance(block.module, nn.MultiheadAttention):
        return ""
    whole = {*(layer.outputs for layer in block.layers.values()), block.layers["output"].inputs}
    projections = [layer.module for layer in block.layers.values()]
    for place in dict.fromkeys([block.module, block.holder]):
        children = list(place.named_children())
        own = [number for number, (_, child) in enumerate(children) if child in projections]
        for number, (name, child) in enumerate([*children, ("", place)]):
            parameters = dict(child.named_parameters(recurse=False))
            if child in projections or not parameters:
                continue
            if _is_norm(child):
                # A norm defined behind the projections, as in ALBERT, is not between them.
                is_between = own and own[0] < number < own[-1]
                named_so = re.match("(q|k|query|key|attn_sub)_", name)
                if (is_between or named_so) and next(iter(parameters.values())).numel() in whole:
                    return f"{type(child).__name__} '{name}' normalises over all heads"
    for member in _entries(block, count):
        path = member.name[len(block.name) :].lstrip(".")
        return f"'{path}' has an entry for every head"
    return ""


def _entries(block: AttentionBlock, count: int) -> list[Member]:
    """Weights beside the projections that seem to have an entry for every head, such as biases."""
    heads = _number(block, HEADS, config=False) or _number(block, HEADS, config=True) or count
    projections = [layer.module for layer in block.layers.values()]
    width, members = block.layers["output"].inputs // heads, []
    for place in dict.fromkeys([block.module, block.holder]):
        inside = next(name for name, own in block.module.named_modules() if own is place)
        for name, child in [*place.named_children(), ("", place)]:
            if child in projections or _is_norm(child) or heads == 1:
                continue
            for tensor, parameter in child.named_parameters(recurse=False):
                if _is_for_every_head(child, parameter, heads, width):
                    path = ".".join(filter(None, (block.name, inside, name, tensor)))
                    axis = list(parameter.shape).index(heads)
                    index = torch.arange(heads, device=parameter.device)
                    index = index.div(max(1, heads // count), rounding_mode="floor")
                    members.append(Member(path, parameter, (axis,), index))
    return members


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_for_every_head(module: nn.Module, parameter: Tensor, heads: int, width: int) -> bool:
    """Has a parameter an axis of the heads, not of the places of a kernel or of one head's width?

    >>> heads, width = 4, 8
    >>> kernel, table = nn.Conv2d(32, 32, 4), nn.Parameter(torch.ones(7, 4))
    >>> _is_for_every_head(kernel, kernel.weight, heads, width)
    False
    >>> _is_for_every_head(nn.Module(), table, heads, width)
    True
    >>> _is_for_every_head(nn.Module(), table, heads, width=4)  # positions, the same for all heads
    False
    """
    is_kernel = isinstance(module, nn.modules.conv._ConvNd)
    axes = list(parameter.shape[:2] if is_kernel else parameter.shape)
    if heads == width and len(axes) > 1 and not isinstance(module, nn.Embedding):
        axes.pop()
    return heads in axes

"""Grouping of a model: the choice of layers, penalty weights, costs and budgets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_wgsef.groupings.budget import (
    DEFAULT_K,
    Budget,
    alike_budgets,
    check_budget,
    check_used,
    global_budget,
    layer_budget,
    measure_of,
    size_limit,
    with_costs,
)
from lightning_wgsef.groupings.costs import Costs, KnownLatency, check_costs
from lightning_wgsef.groupings.norm_statistics import with_exact_statistics
from lightning_wgsef.groupings.patterns import check_patterns, matches
from lightning_wgsef.groupings.registry import (
    MISSING,
    Grouping,
    check_grouping,
    find_groups,
    grouping_name,
    needs_interface,
)
from lightning_wgsef.groupings.removability import with_invariance
from lightning_wgsef.groupings.slim_size import slim_size
from lightning_wgsef.groupings.weights import Weights, check_weights, with_weights
from lightning_wgsef.groupings.width_limits import (
    Bound,
    Multiple,
    check_limits,
    limited_budget,
    with_limits,
)
from lightning_wgsef.groups.grouped_layer import GroupedLayer, Overlaps, on_model
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.size import SlimSize
from lightning_wgsef.network.interface import Interface, network_interface
from lightning_wgsef.network.sharding import unsharded_copy
from lightning_wgsef.utils.validation import check_model

# How a warning begins to say what was taken for inputs and outputs that nobody saw.
ASSUMED = "By the order of definition"


def group_parameters(
    model: nn.Module,
    grouping: Grouping = "channel",
    k: Budget = DEFAULT_K,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    scope: str = "layer",
    weights: Weights = None,
    costs: Costs | KnownLatency = None,
    example_input: Any | None = None,
    overlap: str = "error",
    multiple_of: Multiple = 1,
    at_least: Bound = None,
    at_most: Bound = None,
) -> Groups:
    """Group the weights of ``model``, with a budget for every layer; print the result to see them.

    Args:
        model: any module.
        grouping: a name, see `find_groups`; a function from a module to `Groups`; or a mapping from
            patterns of layer names to either, such as ``{"*attn*": "head", "*mlp*": "hidden"}``:
            the first pattern that matches a layer counts.
        k: the budget of every layer: a number of groups (int), a share of its groups (float in
            (0, 1], rounded to the nearest number, at least one), or a mapping from patterns of
            layer names to either; the first pattern that matches a layer counts, and layers
            that none matches are left out. Or the size of the whole slim network, such as
            "120 MFLOPs" (of one sample), "4 MB" (parameters and buffers), "800 kparams" or "5 ms"
            (measured on ``example_input``).
        include: patterns of layer names; only these are grouped. A layer that is left out by rule
            (the image's channels, the classifier's outputs, frozen layers, and of `structure` what
            could not be taken out) is grouped if ``include`` gives its exact name.
        exclude: patterns of layer names that are left out.
        scope: "layer", every layer has its own budget; "global", all layers compete for one, of
            which each keeps its strongest group.
        weights: penalty weights, which say what makes a group strong: "uniform", "size",
            "sqrt_size", "layer_norm", "taylor", "fisher" (see `with_weights`), a tensor with an
            entry for every group, layer after layer, or a mapping from layer names to tensors.
            None: "uniform", or with ``scope="global"`` "layer_norm", which makes layers comparable;
            in training "taylor" where k is then a size of the slim network.
        costs: what a group costs, and thereby the unit of k: None, 1; "params", "flops" and
            "latency" (measured here, see `slim_size`), what `slim` takes out of the network with
            it, of everything that makes or reads it: with ``scope="global"`` the slim network has
            at most the share k of the dense one's, what is not grouped included, to within one
            group; else k is a share of what the layer's own groups cost. A tensor with an entry for
            every group, layer after layer, or a mapping from layer names to tensors. With names an
            ``example_input`` is needed; groups that cannot be taken out are left out.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them. With
            it, the claim that zero groups can be taken out is tried, see `zero_invariance`.
        overlap: what happens to a layer that claims weights of a layer before it: "error", or
            "first", which leaves it out.
        multiple_of: widths that stay are multiples of this number of channels, or by pattern of
            layer names; layers that no pattern matches have none. Blocks and experts are no widths.
        at_least: how many groups of every layer stay at least: a number, a share, or a mapping from
            patterns to either. None: one.
        at_most: how many stay at most, likewise. None: all.

    A pattern is a name with wildcards as in file names; it stands for the modules inside, too.

    Raises:
        ValueError: an unknown grouping, a budget outside its range, a pattern that matches no
            layer, a model without a layer to group, groups that share weights, or costs that cannot
            be measured or do not fit the groups.

    >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> print(group_parameters(network, "channel", k=0.25))
    layer  grouping  groups  weights each  budget  removable
    2       channel       8            36       2        yes
    left out: 0: first layer: its channels are the network's input
    """
    check_arguments(
        grouping,
        k,
        scope=scope,
        weights=weights,
        costs=costs,
        overlap=overlap,
        multiple_of=multiple_of,
        at_least=at_least,
        at_most=at_most,
    )
    check_model("model", model)
    measure = measure_of(k, costs)
    if measure is not None and example_input is None:
        what = f"k = {k!r}" if isinstance(k, str) else f"costs={costs!r}"
        raise ValueError(
            f"{what} needs an example_input, a tensor or a tuple of them: it counts the network "
            "that slim makes"
        )
    plain = unsharded_copy(model)
    interface = network_interface(plain, example_input) if needs_interface(grouping) else None
    found = find_groups(plain, grouping, example_input, interface)
    names = [layer.name for layer in found.layers]
    for argument, patterns in (
        ("include", include),
        ("k", list(k) if isinstance(k, Mapping) else None),
    ):
        _refuse_what_cannot_be(argument, patterns, names, found.left_out)
    if not names:
        raise _nothing(plain, grouping, found.left_out)
    included = check_patterns("include", include, names)
    excluded = check_patterns("exclude", exclude, names)
    if isinstance(k, Mapping):
        check_patterns("k", list(k), names)
    left_out, layers, overlaps = dict(found.left_out), [], Overlaps()
    for layer in found.layers:
        reason = _reason_to_leave_out(layer, included, excluded, k)
        if not reason and overlap == "first":
            reason = overlaps.add(layer)
        if reason:
            left_out[layer.name] = reason
        else:
            layers.append(layer)
    if not layers:
        raise _nothing(plain, grouping, left_out)
    check_used(layers, k)
    if interface is not None and interface.unseen:
        _warn_of_assumption(layers, interface)
    if example_input is not None:
        layers = list(with_invariance(plain, Groups(layers), example_input).layers)
        useless = _zeros_without_use(layers, included or ())
        left_out.update(useless)
        layers = [layer for layer in layers if layer.name not in useless]
        if not layers:
            raise _nothing(plain, grouping, left_out)
    size = None
    if measure is not None:
        left_out |= {x.name: _stays(x) for x in layers if not x.removable or x.count < 2}
        layers = [layer for layer in layers if layer.removable and layer.count > 1]
        if not layers:
            raise _nothing(plain, grouping, left_out)
        limited = with_limits(layers, multiple_of, at_least, at_most)
        known = costs.measured if isinstance(costs, KnownLatency) else None
        size = slim_size(plain, limited, measure, example_input, known)
        costs = size.costs(torch.ones_like(size.kinds, dtype=torch.bool))
    assert not isinstance(costs, str | KnownLatency)  # which are measures
    layers = with_exact_statistics(plain, layers, example_input)
    layers = with_costs(layers, costs)
    layers = with_weights(layers, weights, scope)
    if plain is not model:
        layers = on_model(layers, model)
    unlimited, layers = layers, with_limits(layers, multiple_of, at_least, at_most)
    is_limited = any(
        (x.least, x.most, x.multiple) != (y.least, y.most, y.multiple)
        for x, y in zip(layers, unlimited, strict=True)
    )
    limit: float | None = None
    if (
        size is not None
        and not isinstance(k, Mapping)
        and (scope == "global" or isinstance(k, str))
    ):
        limit = size_limit(size, layers, k)
    if scope == "global":
        if limit is None:
            assert isinstance(k, int | float)
            limit = global_budget(layers, k)
            size = SlimSize.of_costs(layers) if is_limited else None
        groups = Groups(layers, left_out, limit, size=size)
    elif size is not None and limit is not None:
        groups = Groups(alike_budgets(size, layers, limit), left_out, size=size, limit=limit)
    else:
        assert not isinstance(k, str)
        budgets = [layer_budget(layer, k) for layer in unlimited]
        if is_limited:
            budgets = [limited_budget(x, own) for x, own in zip(layers, budgets, strict=True)]
        groups = Groups(
            [replace(x, budget=own) for x, own in zip(layers, budgets, strict=True)], left_out
        )
    groups.check_disjoint()
    return groups


def check_arguments(
    grouping: Grouping,
    k: Budget,
    *,
    scope: str,
    weights: Weights,
    costs: Costs | KnownLatency,
    overlap: str,
    multiple_of: Multiple,
    at_least: Bound,
    at_most: Bound,
    **_: Any,
) -> None:
    """Raise `ValueError` for an argument of `group_parameters` that no model could make right."""
    check_budget(k, scope)
    check_grouping(grouping)
    check_weights(weights)
    check_costs(costs)
    measure_of(k, costs)
    check_limits(multiple_of, at_least, at_most)
    if overlap not in ("error", "first"):
        raise ValueError(f"overlap must be 'error' or 'first', got {overlap!r}")


def _warn_of_assumption(layers: Sequence[GroupedLayer], interface: Interface) -> None:
    """Say what was taken for the network's inputs and outputs where that was not seen."""
    for grouping, what, taken, others in (
        ("channel", "reads the network's input", interface.inputs, interface.other_inputs),
        ("filter", "makes the network's outputs", interface.outputs, interface.other_outputs),
    ):
        own = [layer.name for layer in layers if layer.grouping == grouping]
        also = [f"'{name}' ({others[name]})" for name in own if name in others]
        if not also:
            continue
        names = ", ".join(f"'{name}'" for name in taken) or "no layer"
        warnings.warn(
            f"grouping='{grouping}': {interface.unseen}. {ASSUMED}, {names} "
            f"{what}, though others may, too: {', '.join(also)}. Give an example_input (or the "
            "module's example_input_array) that runs, or name what must not be grouped in exclude",
            stacklevel=3,
        )


def _reason_to_leave_out(
    layer: GroupedLayer, included: list[str] | None, excluded: list[str] | None, k: Budget
) -> str:
    if excluded and any(matches(pattern, layer.name) for pattern in excluded):
        return "named in exclude"
    if included is not None and not any(matches(pattern, layer.name) for pattern in included):
        return "not named in include"
    if isinstance(k, Mapping) and not any(matches(pattern, layer.name) for pattern in k):
        return "no pattern of k matches it"
    if included is None or layer.name not in included:
        weight = layer.largest_member
        frozen = "" if weight.parameter.requires_grad else f"frozen: {weight.name} has no gradient"
        return frozen or layer.reserved
    return ""


def _zeros_without_use(layers: Sequence[GroupedLayer], included: Sequence[str]) -> dict[str, str]:
    """List what nobody could take out: `structure` is there to make the network smaller."""
    return {
        layer.name: (
            f"{layer.obstacle}: zeros may not make the network smaller "
            f"(include=['{layer.name}'] groups it all the same)"
        )
        for layer in layers
        if layer.grouping == "structure" and layer.obstacle and layer.name not in included
    }


def _stays(layer: GroupedLayer) -> str:
    """Say why a layer has no part in a size of the slim network."""
    why = layer.obstacle or f"those of {layer.grouping!r} stay in place"
    if layer.removable:
        return "it has one group, which has to stay"
    return f"its groups cannot be taken out, so that they do not count: {why}"


def _nothing(model: nn.Module, grouping: Grouping, left_out: Mapping[str, str]) -> ValueError:
    """Return the error of a model without a layer to group, with the reason for every layer."""
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
    missing = MISSING.get(grouping_name(grouping), "it has no weights")
    frozen = [name for name, why in left_out.items() if why.startswith("frozen:")]
    help_ = f"\n(include={frozen[-1:]} groups a frozen layer all the same)" if frozen else ""
    return ValueError(
        f"{type(model).__name__} has no layer that grouping={grouping_name(grouping)!r} can "
        f"group{reasons or f': {missing}'}{help_}"
    )


def _refuse_what_cannot_be(
    argument: str,
    patterns: str | Sequence[str] | None,
    names: Sequence[str],
    left_out: Mapping[str, str],
) -> None:
    """Raise `ValueError` where a pattern stands only for layers that cannot be grouped."""
    listed = patterns if isinstance(patterns, Sequence) else ()
    for pattern in [patterns] if isinstance(patterns, str) else listed:
        if not isinstance(pattern, str) or any(matches(pattern, name) for name in names):
            continue
        meant = [name for name in left_out if matches(pattern, name)]
        if meant:
            whys = "; ".join(f"layer {n!r} cannot be grouped: {left_out[n]}" for n in meant)
            raise ValueError(f"{argument}: {whys}")

"""Exactness of running statistics that shrink with groups, by trial where there is an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer, on_model
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.norm_statistics import NormStatistics
from lightning_wgsef.network.example_input import observed, perturbed, run_example, seeded
from lightning_wgsef.network.layers import modules_by_name, weighted_layers

# Factors of the trial: powers of two, which rounding leaves alone, large enough to reach the bound
# of a clipped activation.
_POWERS = 7


def with_exact_statistics(
    model: nn.Module, layers: Sequence[GroupedLayer], example_input: Any | None
) -> list[GroupedLayer]:
    """Keep the statistics of norms whose inputs shrink exactly as the groups do.

    With an example that is tried on a copy: groups are multiplied by factors, what their layers
    read stays as it was, and every input of the norm must be multiplied, too. Sigmoid or ReLU6 in
    between, a sum with other channels, a norm that others share, or a depthwise convolution whose
    filters shrink as well as its inputs do not pass. Without one, the norm must be the module
    behind the layer in a `torch.nn.Sequential`, or the one that goes by its name, and nobody
    else's.

    Args:
        model: any module; it is copied, not touched.
        layers: its groups, with all norms that might follow.
        example_input: a tensor, a tuple of the arguments of ``forward``, a dict of them, or None.

    >>> from lightning_wgsef.groupings.per_layer import filter_groups
    >>> network = nn.Sequential(
    ...     nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8),
    ...     nn.Linear(8, 8), nn.Sigmoid(), nn.BatchNorm1d(8),
    ... )
    >>> layers = filter_groups(network).layers
    >>> [len(x.statistics) for x in with_exact_statistics(network, layers, torch.ones(1, 4))]
    [1, 0]
    """
    if not any(layer.statistics for layer in layers):
        return list(layers)
    followed = [layer for layer in layers if layer.statistics]
    exact = None if example_input is None else _tried(model, followed, example_input)
    if exact is None:
        exact = _adjacent(model, followed)
    return [
        replace(x, statistics=tuple(n for n in x.statistics if (x.name, n.name) in exact))
        for x in layers
    ]


def _adjacent(model: nn.Module, layers: Sequence[GroupedLayer]) -> set[tuple[str, str]]:
    """Return the pairs of layer and norm with nothing in between by the order of definition."""
    modules = modules_by_name(model)
    users = [id(x) for _, x in model.named_modules(remove_duplicate=False)]
    found = set()
    for layer in layers:
        parent, _, own = layer.name.rpartition(".")
        for norm in layer.statistics:
            children = list(modules[parent]._modules)
            behind = children[children.index(own) + 1 :]
            next_one = not isinstance(modules[parent], nn.Sequential) or (
                behind and f"{parent}.{behind[0]}".lstrip(".") == norm.name
            )
            if next_one and users.count(id(norm.module)) == 1:
                found.add((layer.name, norm.name))
    return found


@torch.no_grad()
def _tried(
    model: nn.Module, layers: Sequence[GroupedLayer], example_input: Any
) -> set[tuple[str, str]] | None:
    """Return the pairs of layer and norm that pass; None if the model does not run."""
    network = perturbed(model)
    followed = on_model(layers, network)
    groups = Groups(followed)
    norms = {norm.name: norm.module for layer in followed for norm in layer.statistics}
    for module in norms.values():
        module.eps = 0.0  # type: ignore[assignment]  # nn.Module: Tensor | Module
    trial = _Trial(network, norms, _fixed(network, followed))
    try:
        before = trial.run(example_input)
        generator = torch.Generator().manual_seed(0)
        powers = torch.randint(1, _POWERS, (len(groups),), generator=generator)
        factors = torch.exp2(powers.to(groups.device, groups.dtype))
        groups.scale_(factors)
        after = trial.run(example_input)
    except ValueError:
        return None
    shares = groups.split(factors)
    return {
        (layer.name, norm.name)
        for layer in followed
        for norm in layer.statistics
        if _follows(norm, shares[layer.name], before[norm.name], after[norm.name])
    }


def _fixed(network: nn.Module, layers: Sequence[GroupedLayer]) -> dict[str, nn.Module]:
    """List the layers that read other channels than they make.

    A depthwise convolution in the groups of another layer makes the channels that it reads.
    """
    members = {m.name: layer.name for layer in layers for m in layer.members}
    return {
        layer.name: layer.module
        for layer in weighted_layers(network)
        if layer.split == 1
        or layer.split != layer.inputs
        or members.get(layer.path("weight"), layer.name) == layer.name
    }


class _Trial:
    """Runs of a network: what its norms read, while some layers read what they did first."""

    def __init__(
        self, network: nn.Module, norms: dict[str, nn.Module], fixed: dict[str, nn.Module]
    ) -> None:
        self._network = network
        self._norms = norms
        self._fixed = fixed
        self._first: dict[str, list[Any]] = {}

    def run(self, example_input: Any) -> dict[str, list[Tensor]]:
        """Return the inputs of every norm, one for each of its calls."""
        inputs: dict[str, list[Tensor]] = {name: [] for name in self._norms}
        again, calls = bool(self._first), dict.fromkeys(self._fixed, 0)

        def note(name: str, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            given = (*args, *named.values())
            if name in inputs:
                inputs[name].append(given[0].clone())
                return None
            calls[name] += 1
            if again:
                return (self._first[name][calls[name] - 1],), {}
            self._first.setdefault(name, []).append(given[0].clone())
            return None

        with seeded(self._network), observed({**self._norms, **self._fixed}, before=note):
            run_example(self._network, example_input)
        return inputs


def _follows(
    norm: NormStatistics, factors: Tensor, before: list[Tensor], after: list[Tensor]
) -> bool:
    """Tell whether every input of a norm was multiplied by the factor of its channel's group."""
    inside = torch.ones(len(factors) if norm.index is None else len(norm.index), dtype=torch.bool)
    if norm.index is not None:
        inside = norm.index.cpu() >= 0
        factors = factors[norm.index.to(factors.device)[inside.to(factors.device)]]
    for one, other in zip(before, after, strict=True):
        if one.dim() < 2 or one.shape[1] != len(inside):
            return False
        keep = inside.to(one.device)
        wanted = one[:, keep].transpose(1, -1) * factors
        error = (other[:, keep].transpose(1, -1) - wanted).abs().max()
        if not bool(error <= 1e-5 * wanted.abs().max()):
            return False
    return bool(before)

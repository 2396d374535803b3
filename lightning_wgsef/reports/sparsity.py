"""What is sparse: groups, weights and operations, as plain data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.example_input import batch_size
from lightning_wgsef.network.flops import layer_flops
from lightning_wgsef.network.layers import WeightedLayer, modules_by_name, weighted_layers
from lightning_wgsef.utils.tables import format_table
from lightning_wgsef.utils.validation import check_kind, check_model


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: its name.
        groups: number of groups, 0 if the layer is not grouped.
        groups_alive: how many of them are not zero.
        budget: K, in units of cost; None if the layer is not grouped.
        parameters: number of weights.
        parameters_alive: how many of them are not exactly zero.
        flops: multiply and add operations of the dense layer for one sample; None without an
            example input.
        flops_alive: those left when rows and columns of the weight that are zero are skipped.
        note: why the layer is not grouped.
    """

    name: str
    groups: int
    groups_alive: int
    budget: float | None
    parameters: int
    parameters_alive: int
    flops: int | None
    flops_alive: int | None
    note: str


@dataclass(frozen=True)
class SparsityReport:
    """A model's layers, and all of its parameters (norms included).

    Attributes:
        layers: its convolutions, dense layers and what else is grouped.
        parameters: number of its weights.
        parameters_alive: how many of them are not exactly zero.
        parameters_slim: those of the network that `slim` makes of it; None: it was not given.
        flops_slim: of that network, those of its convolutions and dense layers, for one sample.
    """

    layers: tuple[LayerReport, ...]
    parameters: int
    parameters_alive: int
    parameters_slim: int | None = None
    flops_slim: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ["layer", "groups alive", "budget", "parameters alive", "FLOPs alive"]
        rows = []
        for layer in self.layers:
            groups = f"{layer.groups_alive} / {layer.groups}" if layer.groups else "-"
            budget = "-" if layer.budget is None else f"{layer.budget:g}"
            parameters = f"{layer.parameters_alive:,} / {layer.parameters:,}"
            rows.append([layer.name, groups, budget, parameters, _pair(layer)])
        flops = [layer.flops for layer in self.layers if layer.flops is not None]
        flops_alive = [layer.flops_alive for layer in self.layers if layer.flops_alive is not None]
        total = f"{sum(flops_alive):,} / {sum(flops):,}" if flops else "-"
        parameters = f"{self.parameters_alive:,} / {self.parameters:,}"
        rows.append(["all", "", "", parameters, total])
        if self.parameters_slim is not None:
            left = f"{self.parameters_slim:,} / {self.parameters:,}"
            total = f"{self.flops_slim:,} / {sum(flops):,}" if flops else "-"
            rows.append(["after slim", "", "", left, total])
        notes = [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]
        return "\n".join([format_table(header, rows), *notes])


def sparsity_report(
    model: nn.Module,
    groups: Groups,
    example_input: Any | None = None,
    *,
    slim: nn.Module | None = None,
) -> SparsityReport:
    """Count what is left of a model.

    FLOPs are torch's own count (two a multiply-add) of one forward pass and one sample, a layer at
    a time: those alive are what is left when the zero rows (filters) and zero columns (channels) of
    this layer's weight are skipped. Removing a channel's producer as well saves more than that: the
    network that `slim` makes shows how much.

    Args:
        model: the model.
        groups: its groups, as `group_parameters` makes them or as a regularizer's ``groups``.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them, for the
            FLOPs; the first axis of its first tensor counts samples.
        slim: what `slim` made of the model, to be counted beside it.

    >>> from lightning_wgsef.groupings.group_parameters import group_parameters
    >>> network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    >>> _ = network[1].weight.data[:, :3].zero_()
    >>> report = sparsity_report(network, group_parameters(network), torch.ones(1, 4))
    >>> print(report)
    layer  groups alive  budget  parameters alive  FLOPs alive
    0                 -       -           30 / 30      48 / 48
    1             3 / 6       3            8 / 14      12 / 24
    all                                   38 / 44      60 / 72
    0: first layer: its channels are the network's input
    """
    check_model("model", model)
    check_kind("groups", groups, Groups, "what group_parameters returns")
    if slim is not None:
        check_model("slim", slim)
    flops = {} if example_input is None else _sample_flops(model, example_input)
    grouped = {layer.name: layer for layer in groups.layers}
    alive = groups.split(groups.alive())
    parameters = list(model.parameters())
    layers = {layer.name: layer for layer in weighted_layers(model)}
    modules = modules_by_name(model)
    rows = []
    for name in [*layers, *(name for name in grouped if name not in layers)]:
        own = list(modules[name].parameters()) if name in modules else []
        dense = flops.get(name)
        count = alive.get(name, torch.zeros(0))
        rows.append(
            LayerReport(
                name=name,
                groups=len(count),
                groups_alive=int(count.sum()),
                budget=grouped[name].budget if name in grouped else None,
                parameters=sum(p.numel() for p in own),
                parameters_alive=_nonzero(own),
                flops=dense,
                flops_alive=None if dense is None else _flops_alive(dense, layers[name]),
                note=groups.left_out.get(name, ""),
            )
        )
    return SparsityReport(
        tuple(rows),
        sum(p.numel() for p in parameters),
        _nonzero(parameters),
        None if slim is None else sum(p.numel() for p in slim.parameters()),
        None
        if slim is None or example_input is None
        else sum(_sample_flops(slim, example_input).values()),
    )


def _sample_flops(model: nn.Module, example_input: Any) -> dict[str, int]:
    samples = batch_size(example_input)
    return {name: count // samples for name, count in layer_flops(model, example_input)[0].items()}


def _nonzero(parameters: list[nn.Parameter]) -> int:
    return sum(int(torch.count_nonzero(p.detach())) for p in parameters)


def _flops_alive(dense: int, layer: WeightedLayer) -> int:
    """The share of ``dense`` in rows and columns of the weight that are not all zero."""
    nonzero = layer.weight.detach().ne(0).reshape(*layer.weight.shape[:2], -1).any(2)
    parts = nonzero.chunk(layer.split)  # the parts of a grouped convolution are independent
    live = sum(int(part.any(1).sum()) * int(part.any(0).sum()) for part in parts)
    return dense * live // sum(part.numel() for part in parts)


def _pair(layer: LayerReport) -> str:
    return "-" if layer.flops is None else f"{layer.flops_alive:,} / {layer.flops:,}"

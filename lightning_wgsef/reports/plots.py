"""Pictures without TensorBoard: curves of a run, and what is left of every layer."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_wgsef.reports.networks import NetworkReport
from lightning_wgsef.reports.sensitivity import SensitivityReport
from lightning_wgsef.reports.sparsity import SparsityReport
from lightning_wgsef.utils.files import as_path
from lightning_wgsef.utils.validation import check_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# For every scalar pairs of step and value.
History = Mapping[str, Sequence[tuple[float, float]]]


def plot_sparsity(source: str | os.PathLike[str] | History, prefix: str = "wgsef") -> Figure:
    """Sparsity of every layer, and the gap to the budget, over training.

    Args:
        source: a log folder of Lightning's `TensorBoardLogger` or `CSVLogger`, or what was logged:
            for every name, pairs of step and value.
        prefix: of the names, "wgsef/<name>" for a callback with a ``name``.

    Returns:
        The figure; ``figure.savefig("sparsity.png")`` writes it.

    Raises:
        ValueError: there is no such folder, or nothing with that prefix in it.
        ModuleNotFoundError: matplotlib is missing (``pip install "lightning-wgsef[plots]"``).

    >>> history = {"wgsef/fc/group_sparsity": [(0, 0.0), (10, 0.75)], "wgsef/gap": [(0, 2.0)]}
    >>> figure = plot_sparsity(history)
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['zero groups, %', 'sparsity gap']
    """
    curves = source if isinstance(source, Mapping) else _read(as_path("source", source))
    own = {name: points for name, points in curves.items() if name.startswith(f"{prefix}/")}
    if not own:
        raise ValueError(
            f"source has no scalars '{prefix}/...': it has {sorted(curves)[:8]}; is it the log "
            "folder of a run with WGSEFCallback (such as lightning_logs/version_0)?"
        )
    figure, (upper, lower) = _figure(2)
    layer = re.compile(f"{re.escape(prefix)}/(.+)/group_sparsity")
    for name, points in sorted(own.items()):
        if match := layer.fullmatch(name):
            _draw(upper, [(step, 100 * value) for step, value in points], match[1])
    if total := own.get(f"{prefix}/sparsity"):
        shares = [(step, 100 * value) for step, value in total]
        _draw(upper, shares, "all grouped weights", color="black", linewidth=2)
    _draw(lower, own.get(f"{prefix}/gap", ()), "all layers", color="black", linewidth=2)
    frozen = [step for step, value in own.get(f"{prefix}/frozen", ()) if value]
    for axes in (upper, lower):
        if frozen:
            axes.axvline(frozen[0], color="grey", linestyle=":", label="the mask is fixed")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
    upper.set_ylabel("zero groups, %")
    lower.set_ylabel("sparsity gap")
    lower.set_xlabel("step")
    return figure


def plot_report(report: SparsityReport | NetworkReport | SensitivityReport) -> Figure:
    """Draw a report: every layer's weights and those alive, networks beside each other, or losses.

    Args:
        report: of `sparsity_report` (dense and sparse, by layer), of `network_report` (such as of
            a dense, a sparse and a slim network), or of `sensitivity` (losses by layer and level,
            and the share of every layer that the proposal keeps).

    Raises:
        ValueError: no such report.
        ModuleNotFoundError: matplotlib is missing (``pip install "lightning-wgsef[plots]"``).

    >>> import torch
    >>> from lightning_wgsef import group_parameters, sparsity_report
    >>> network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    >>> report = sparsity_report(network, group_parameters(network))
    >>> [int(bar.get_height()) for bar in plot_report(report).axes[0].patches]
    [30, 14, 30, 14]
    """
    if isinstance(report, NetworkReport):
        return _plot_networks(report)
    if isinstance(report, SensitivityReport):
        return _plot_sensitivity(report)
    check_kind("report", report, SparsityReport, "a report, such as sparsity_report returns")
    layers = [layer for layer in report.layers if layer.parameters]
    figure, (axes,) = _figure(1)
    series = {
        "dense": [layer.parameters for layer in layers],
        "alive": [layer.parameters_alive for layer in layers],
    }
    _bars(axes, [layer.name for layer in layers], series, "weights")
    return figure


def _plot_networks(report: NetworkReport) -> Figure:
    figure, plots = _figure(3)
    names = [row.name for row in report.networks]
    values: dict[str, list[float]] = {
        "parameters": [row.parameters for row in report.networks],
        "FLOPs of a sample": [row.flops for row in report.networks],
        "milliseconds of a pass": [
            1e3 * row.latency.batches[0].seconds.median for row in report.networks
        ],
    }
    for axes, (label, heights) in zip(plots, values.items(), strict=True):
        axes.bar_label(axes.bar(names, heights), fmt="{:,.4g}", fontsize=8)
        axes.set_ylabel(label)
    return figure


def _plot_sensitivity(report: SensitivityReport) -> Figure:
    figure, (upper, lower) = _figure(2)
    names = [layer.name for layer in report.layers]
    places = range(len(names))
    for number, level in enumerate(report.levels):
        losses = [layer.losses[number] for layer in report.layers]
        upper.plot(places, losses, marker="o", label=f"{level:.0%} of the layer's groups stay")
    upper.axhline(report.loss, color="black", linestyle=":", label="the whole network")
    upper.set_ylabel("loss")
    upper.legend(fontsize=8)
    lower.bar(places, [100 * layer.proposed / layer.groups for layer in report.layers])
    lower.set_ylabel("groups by the proposed k, %")
    for axes, labels in ((upper, [""] * len(names)), (lower, names)):
        axes.set_xticks(places, labels, rotation=60, ha="right", fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def _bars(axes: Axes, names: list[str], series: dict[str, list[int]], label: str) -> None:
    width = 0.8 / len(series)
    for number, (name, heights) in enumerate(series.items()):
        places = [place + (number - 0.5) * width for place in range(len(names))]
        axes.bar(places, heights, width, label=name)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.legend()


def _draw(axes: Axes, points: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=label, **style)


def _figure(rows: int) -> tuple[Figure, tuple[Axes, ...]]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plots need matplotlib: pip install "lightning-wgsef[plots]"'
        ) from error
    figure = Figure(figsize=(8, 3.2 * rows), layout="constrained")
    return figure, tuple(figure.add_subplot(rows, 1, row + 1) for row in range(rows))


def _read(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Scalars of a log folder, of either logger."""
    table = folder if folder.suffix == ".csv" else folder / "metrics.csv"
    if table.is_file():
        return _read_csv(table)
    if not any(folder.glob("events.out.tfevents.*")):
        raise ValueError(
            "source must be a log folder with metrics.csv or event files, such as "
            f"lightning_logs/version_0, got '{folder}'"
        )
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def _read_csv(path: Path) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((float(row["step"]), float(value)))
    return curves

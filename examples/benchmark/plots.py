"""Plots of a suite, made from the records alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from examples.benchmark.curves import Curve, curves_of, points
from examples.benchmark.methods import METHODS
from examples.benchmark.records import Record
from examples.benchmark.report import grid, operations_left, runs_of
from examples.benchmark.suite import WITHOUT_BUDGET, Suite, Task

SHOWN = (
    "dense",
    "homotopy, structure, layer",
    "paper, structure, layer",
    "gradual magnitude",
    "one-shot magnitude",
    "PAT, minimum sparsity",
    "Torch-Pruning",
)
"""Whose validation accuracy is shown over the epochs."""


def draw(suite: Suite, records: list[Record], folder: Path) -> list[Path]:
    """Every curve, and of a task on none accuracy against operations and epochs, as SVG."""
    written: list[Path] = []
    curves = curves_of(suite)
    drawn_together = {task.name for curve in curves for task in curve.tasks}
    for task in suite.tasks:
        if task.name in drawn_together:
            continue
        found = {method: runs_of(records, task, method) for method in suite.methods}
        found = {m: runs for m, runs in found.items() if len(runs) >= len(suite.seeds_for(m))}
        if found.keys() <= {"dense"}:
            continue
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
        _against_operations(left, found)
        _curves(right, found, task)
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside lower center",
            fontsize=7,
            ncols=5,
            title="left: circles are ours, triangles others",
            title_fontsize=7,
        )
        figure.suptitle(f"{task.network} on {task.data}, {task.budget()}")
        written.append(save(figure, folder / f"{task.name}.svg"))
    for curve in curves:
        written += _draw_curve(suite, records, curve, folder)
    return written


def _draw_curve(suite: Suite, records: list[Record], curve: Curve, folder: Path) -> list[Path]:
    """Accuracy over the operations that are left, a line a method; nothing before any was run."""
    found = points(suite, records, curve)
    if not found.keys() - set(WITHOUT_BUDGET):
        return []
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for number, (method, own) in enumerate(found.items()):
        accuracies = [[run["test_accuracy"] for run in runs] for runs in own.values()]
        means = [statistics.mean(values) for values in accuracies]
        errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in accuracies]
        colour = pyplot.colormaps["tab10"](number % 10)
        if method in WITHOUT_BUDGET:
            axes.axhline(means[0], color=colour, linestyle=":", label=method)
            continue
        shares = [100 * operations_left(runs) for runs in own.values()]
        marker = "o" if METHODS[method].ours else "^"
        named = {"marker": marker, "color": colour, "capsize": 2, "label": method}
        axes.errorbar(shares, means, errors, **named)
    _over_operations(axes)
    axes.legend(fontsize=7)
    axes.set_title(f"{curve.name}: mean and standard deviation over seeds", fontsize=10)
    return [save(figure, folder / f"{curve.name}.svg")]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, the same file every time; its path."""
    with matplotlib.rc_context({"svg.hashsalt": "benchmark"}):
        figure.savefig(path, dpi=110, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _against_operations(axes: Axes, found: dict[str, list[Record]]) -> None:
    for number, (method, runs) in enumerate(found.items()):
        accuracies = [run["test_accuracy"] for run in runs]
        flops = statistics.mean(100 * run["flops"][1] / run["flops"][0] for run in runs)
        error = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        marker = "o" if METHODS[method].ours else "^"
        axes.errorbar(
            flops,
            statistics.mean(accuracies),
            error,
            fmt=marker,
            color=pyplot.colormaps["tab20"](number % 20),
            capsize=2,
            label=method,
        )
    _over_operations(axes)


def _over_operations(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("FLOPs left, %")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)


def _curves(axes: Axes, found: dict[str, list[Record]], task: Task) -> None:
    for method in SHOWN:
        if method in found:
            curves = [run["validation"] for run in found[method]]
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axes.plot(range(1, len(means) + 1), means, marker=".", label=method)
    axes.axvline(task.epochs * task.freeze, color="grey", linestyle=":", label="the mask is fixed")
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def heat_maps(suite: Suite, records: list[Record], folder: Path) -> list[Path]:
    """One map a method, of values and budgets, as SVG."""
    assert suite.values is not None
    columns = len(suite.methods)
    figure, plots = pyplot.subplots(1, columns, figsize=(4 * columns, 4.5), layout="constrained")
    everything = [record["test_accuracy"] for record in records if not record["trial"]]
    for axes, method in zip(plots, suite.methods, strict=True):
        cells = grid(suite, records, method)
        means = [[_mean(runs) if runs else math.nan for runs in row] for row in cells]
        image = axes.imshow(means, aspect="auto", vmin=min(everything), vmax=max(everything))
        axes.set_xticks(range(len(suite.tasks)), [task.name for task in suite.tasks], fontsize=8)
        values = suite.values[method]
        axes.set_yticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_ylabel(METHODS[method].tuned)
        axes.set_title(method, fontsize=9)
        for row, line in enumerate(means):
            for column, mean in enumerate(line):
                colour = "white" if image.norm(mean) < 0.5 else "black"
                where = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(column, row, f"{mean:.1f}", color=colour, **where)
    figure.colorbar(image, ax=plots, label="test accuracy, %")
    return [save(figure, folder / f"{suite.name}.svg")]


def _mean(runs: list[Record]) -> float:
    return statistics.mean(run["test_accuracy"] for run in runs)

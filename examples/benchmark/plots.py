"""Plots of a suite, made from the records alone."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from examples.benchmark.methods import METHODS
from examples.benchmark.records import Record
from examples.benchmark.report import runs_of
from examples.benchmark.suite import Suite, Task

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
    """For every task that was run, accuracy against operations and curves, as SVG and PNG."""
    written: list[Path] = []
    for task in suite.tasks:
        found = {method: runs_of(records, task, method) for method in suite.methods}
        found = {method: runs for method, runs in found.items() if len(runs) >= len(suite.seeds)}
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
        written += save(figure, folder / task.name)
    return written


def save(figure: Figure, path: Path) -> list[Path]:
    """The two files of a figure, as SVG and PNG."""
    paths = [path.with_name(f"{path.name}.{ending}") for ending in ("svg", "png")]
    with matplotlib.rc_context({"svg.hashsalt": "benchmark"}):  # the same file every time
        for each in paths:
            metadata = {"Date": None} if each.suffix == ".svg" else None
            figure.savefig(each, dpi=110, metadata=metadata)
    pyplot.close(figure)
    return paths


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
    axes.axvline(task.epochs / 2, color="grey", linestyle=":", label="the mask is fixed")
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)

"""How much a method's number matters: accuracy over its values and over budgets."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib import pyplot

from examples.benchmark.methods import METHODS
from examples.benchmark.plots import save
from examples.benchmark.records import Record
from examples.benchmark.report import described, origin, runs_of, spread, table
from examples.benchmark.suite import Suite


def grid_report(suite: Suite, records: list[Record], command: str) -> str:
    """For every method its values times the tasks, as Markdown."""
    assert suite.values is not None
    seeds = len(suite.seeds)
    over = "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    lines = [*origin(suite, records, command), ""]
    lines += [f"- {task.name}: {described(task)}." for task in suite.tasks]
    lines += [
        "",
        f"Where the length is varied, the mask is fixed at its end. Test accuracy, {over}.",
    ]
    lines += ["", f"![Test accuracy over values and budgets]({suite.name}.svg)"]
    for method in suite.methods:
        cells = grid(suite, records, method)
        rows = [
            [f"{value:g}", *("-" if not found else spread(found) for found in row)]
            for value, row in zip(suite.values[method], cells, strict=True)
        ]
        header = [METHODS[method].tuned, *(task.name for task in suite.tasks)]
        lines += ["", f"## {method}", "", *table(header, rows)]
    return "\n".join(lines) + "\n"


def grid(suite: Suite, records: list[Record], method: str) -> list[list[list[float]]]:
    """Test accuracies, for every value and task a list over seeds."""
    assert suite.values is not None
    return [
        [
            [
                run["test_accuracy"]
                for run in runs_of(records, task, method)
                if run["value"] == value
            ]
            for task in suite.tasks
        ]
        for value in suite.values[method]
    ]


def heat_maps(suite: Suite, records: list[Record], folder: Path) -> list[Path]:
    """One map a method, of values and budgets, as SVG and PNG."""
    assert suite.values is not None
    columns = len(suite.methods)
    figure, plots = pyplot.subplots(1, columns, figsize=(4 * columns, 4.5), layout="constrained")
    everything = [record["test_accuracy"] for record in records if not record["trial"]]
    for axes, method in zip(plots, suite.methods, strict=True):
        cells = grid(suite, records, method)
        means = [[statistics.mean(x) if x else float("nan") for x in row] for row in cells]
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
    return save(figure, folder / suite.name)

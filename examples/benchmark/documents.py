"""Tables of documents, filled from the records of suites and of examples.

Above a table a comment says what its rows and columns are::

    <!-- records: cpu
    rows: {dense: dense, ours: "homotopy, structure, layer"}
    columns: [[lenet-10, accuracy], [lenet-10, flops]]
    -->
    | | test accuracy | FLOPs left |
    |---|---|---|
    ..

Rows are methods by what they are called there, columns a task and one of `CELLS`; the first two
lines of the table stay as they are. Of the records of an example, rows are their names, and columns
say how their entries are written; one that a record does not have stays empty::

    <!-- figures: detector
    rows: {dense: dense, without its zeros: slim}
    columns: ["{map:.1f} %", "{latency[0]:.2f}"]
    -->
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from examples.benchmark.latencies import BATCHES, Latencies, read_latencies
from examples.benchmark.records import Record, Records
from examples.benchmark.report import mean_of, operations_left, runs_of, spread
from examples.benchmark.suite import Suite, check_known

_TABLE = re.compile(
    r"(?P<head><!-- (?P<kind>records|figures): (?P<suite>\S+)\s(?P<settings>.*?)-->\n"
    r"\|[^\n]*\n\|[^\n]*\n)"
    r"(?:\|[^\n]*\n)*",
    re.DOTALL,
)


def _freeze(runs: list[Record], latencies: Latencies) -> str:
    if runs[0]["method"] in ("dense", "small from scratch", "prune, then train"):
        return ""
    return f"{mean_of(runs, 'before_freeze'):.1f} → {mean_of(runs, 'after_freeze'):.1f}"


def _latency(runs: list[Record], latencies: Latencies) -> str:
    ratios = [latencies[run["name"]][-1][0] for run in runs if run["name"] in latencies]
    return f"{statistics.median(ratios):.2f}" if ratios else "not measured"


CELLS: dict[str, Callable[[list[Record], Latencies], str]] = {
    "accuracy": lambda runs, _: spread([run["test_accuracy"] for run in runs]),
    "flops": lambda runs, _: f"{100 * operations_left(runs):.0f} %",
    "freeze": _freeze,
    f"latency at batch {BATCHES[-1]}": _latency,
}


def filled(text: str, results: Path, read: Callable[[str], Suite]) -> str:
    """A document with the tables of its comments made anew.

    Args:
        text: of the document.
        results: folder of the suites' results.
        read: gives a suite by its name.

    Raises:
        ValueError: a comment names what is not there; the message lists what is.
    """

    def table(found: re.Match[str]) -> str:
        settings = yaml.safe_load(found["settings"])
        if found["kind"] == "figures":
            rows = _figures(results / found["suite"] / "figures.jsonl", settings)
        else:
            suite = read(found["suite"])
            rows = _rows(suite, results / suite.name, settings)
        lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return found["head"] + re.sub(r"\|  (?=\|)", "| ", lines)

    return _TABLE.sub(table, text)


def _figures(path: Path, settings: dict[str, Any]) -> list[list[str]]:
    records = {record["name"]: record for record in Records(path).all()}
    rows = []
    for label, name in settings["rows"].items():
        check_known(f"a row of {path}", name, records)
        cells = []
        for column in settings["columns"]:
            try:
                cells.append(column.format(**records[name]))
            except (KeyError, IndexError):
                cells.append("")
        rows.append([label, *cells])
    return rows


def _rows(suite: Suite, folder: Path, settings: dict[str, Any]) -> list[list[str]]:
    records = suite.counted(Records(folder / "records.jsonl").all())
    latencies = read_latencies(folder)
    tasks = {task.name: task for task in suite.tasks}
    for task, cell in settings["columns"]:
        check_known("a column's task", task, tasks)
        check_known("a column's cell", cell, CELLS)
    rows = []
    for label, method in settings["rows"].items():
        check_known("a row's method", method, suite.methods)
        row = [label]
        for task, cell in settings["columns"]:
            runs = runs_of(records, tasks[task], method)
            row.append(CELLS[cell](runs, latencies) if runs else "not run")
        rows.append(row)
    return rows

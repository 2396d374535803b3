"""Accuracy over operations: one network at several sizes, method by method, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from examples.benchmark.records import Record
from examples.benchmark.report import REFERENCE, operations_left, runs_of, spread, table
from examples.benchmark.suite import WITHOUT_BUDGET, Suite, Task

FEWEST = 3
"""Sizes that make a curve."""

Points = dict[str, dict[float, list[Record]]]
"""By method and share of the operations the runs of all seeds."""


@dataclass(frozen=True)
class Curve:
    """Tasks that differ in their operations alone, the largest first.

    Attributes:
        name: of the network and its data, as a heading and as the name of a file.
        tasks: three or more.
    """

    name: str
    tasks: tuple[Task, ...]

    @property
    def shares(self) -> list[float]:
        """Of the operations."""
        return [task.operations or 0.0 for task in self.tasks]


def curves_of(suite: Suite) -> list[Curve]:
    """What of a suite can be drawn over operations.

    Raises:
        ValueError: two curves of one network and one data set.
    """
    groups: dict[str, list[Task]] = {}
    for task in suite.tasks:
        if task.operations is not None:
            own: dict[str, Any] = {**task.settings("dense"), "skip": task.skip}
            groups.setdefault(str(own), []).append(task)
    curves: dict[str, Curve] = {}
    for tasks in groups.values():
        if len(tasks) >= FEWEST:
            name = f"{tasks[0].network}-{tasks[0].data}"
            if name in curves:
                raise ValueError(f"tasks of {name} must differ in their operations alone")
            ordered = sorted(tasks, key=lambda task: -(task.operations or 0.0))
            curves[name] = Curve(name, tuple(ordered))
    return list(curves.values())


def points(suite: Suite, records: Sequence[Record], curve: Curve) -> Points:
    """The runs of all seeds, by method and share; what is not finished is left out."""
    found: Points = {}
    for method in suite.methods:
        for task in curve.tasks:
            runs = runs_of(records, task, method)
            if runs and len(runs) >= len(suite.seeds_for(method)):
                found.setdefault(method, {})[task.operations or 0.0] = runs
    return found


def curve_lines(suite: Suite, records: Sequence[Record], curve: Curve) -> list[str]:
    """A table of a curve, and what it says of ours, as Markdown."""
    found = points(suite, records, curve)
    lines = ["", f"## {curve.name}: accuracy over operations", ""]
    if not found.keys() - set(WITHOUT_BUDGET):
        return [*lines, "Not run yet."]
    header = ["method", *(f"{share:.0%}" for share in curve.shares)]
    rows = [
        [method, *(_cell(own.get(share), share) for share in curve.shares)]
        for method, own in found.items()
    ]
    lines += [f"![Test accuracy over operations]({curve.name}.svg)", "", *table(header, rows)]
    if REFERENCE not in found:
        return lines
    return [*lines, "", *(f"- {line}" for line in _verdicts(suite, found, curve.shares))]


def _cell(runs: list[Record] | None, share: float) -> str:
    if runs is None:
        return "not run"
    accuracy = spread([run["test_accuracy"] for run in runs])
    left = operations_left(runs)
    alike = runs[0]["method"] in WITHOUT_BUDGET or _alike(left, share)
    return accuracy if alike else f"{accuracy} at {left:.1%}"


def _alike(left: float, share: float) -> bool:
    """Is one share of the operations within 2 % of another?"""
    return abs(left / share - 1) <= 0.02


def _verdicts(suite: Suite, found: Points, shares: Sequence[float]) -> list[str]:
    """Sentences: where ours stands at every size, and where it crosses the others."""
    lines = []
    leads: dict[str, dict[float, list[float]]] = {}
    for method in found.keys() - {REFERENCE, *WITHOUT_BUDGET}:
        both = found[method].keys() & found[REFERENCE].keys()
        leads[method] = {share: _lead(found, method, share) for share in both}
    rivals = [method for method in found if method in leads]
    for share in shares:
        ahead = {method: leads[method][share] for method in rivals if share in leads[method]}
        if not ahead:
            continue
        best = min(ahead, key=lambda method: statistics.mean(ahead[method]))
        lead = ahead[best]
        place = "first" if statistics.mean(lead) > 0 else "not first"
        line = f"{share:.0%}: {REFERENCE} is {place}, {spread(lead, sign='+')} on {best}"
        listed = ", ".join(f"{value:+.2f}" for value in lead)
        line += f" (seed by seed {listed})" if len(lead) > 1 else " (one seed)"
        own, its = (operations_left(found[method][share]) for method in (REFERENCE, best))
        if not _alike(its, own):
            line += f", which keeps {its:.1%} of the operations, ours {own:.1%}"
        within = [method for method in ahead if inside(ahead[method])]
        if within:
            line += f"; inside the spread: {', '.join(within)}"
        known = {REFERENCE, *WITHOUT_BUDGET, *ahead}
        missing = [method for method in suite.methods if method not in known]
        lines.append(line + (f"; not run: {', '.join(missing)}." if missing else "."))
    for method in rivals:
        means = [
            (share, statistics.mean(leads[method][share]))
            for share in shares
            if share in leads[method]
        ]
        for one, other in pairwise(means):
            if (share_there := crossing(one, other)) is not None:
                where = f"{share_there:.0%} of the operations"
                lines.append(f"{REFERENCE} and {method} cross at {where}.")
    return lines


def _lead(found: Points, method: str, share: float) -> list[float]:
    """What ours is ahead of a method, seed by seed."""
    others = {run["seed"]: run["test_accuracy"] for run in found[method][share]}
    ours = found[REFERENCE][share]
    return [run["test_accuracy"] - others[run["seed"]] for run in ours if run["seed"] in others]


def inside(differences: Sequence[float]) -> bool:
    """Is the mean of some differences less than their standard deviation? One says nothing: True.

    >>> inside([1.0, 1.2, 0.8]), inside([1.0, -1.2, 0.8]), inside([3.0])
    (False, True, True)
    """
    if len(differences) < 2:
        return True
    return abs(statistics.mean(differences)) < statistics.stdev(differences)


def crossing(one: tuple[float, float], other: tuple[float, float]) -> float | None:
    """Where a lead becomes a deficit between two shares of the operations, or None.

    Args:
        one: a share and the lead there.
        other: another share and the lead there; between them the lead is linear in the share's
            logarithm.

    >>> crossing((0.4, 1.0), (0.1, -1.0)), crossing((0.4, 1.0), (0.1, 2.0))
    (0.2, None)
    """
    (share, lead), (another, its_lead) = one, other
    if lead * its_lead >= 0:
        return None
    part = lead / (lead - its_lead)
    return round(math.exp((1 - part) * math.log(share) + part * math.log(another)), 12)

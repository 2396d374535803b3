"""Tables of a suite, made from the records alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from examples.benchmark.latencies import BATCHES, Latencies
from examples.benchmark.methods import METHODS
from examples.benchmark.records import Record
from examples.benchmark.suite import WITHOUT_BUDGET, Suite, Task

REFERENCE = "homotopy, structure, layer"
"""What all others are compared with, seed by seed."""


def runs_of(records: Iterable[Record], task: Task, method: str) -> list[Record]:
    """The runs that count of a method on a task, by seed."""
    trained = task.of(method)
    found = [
        record
        for record in records
        if not record["trial"] and record["method"] == method and _same_task(record, trained)
    ]
    return sorted(found, key=lambda record: (record["value"], record["seed"]))


def report(suite: Suite, records: list[Record], latencies: Latencies, command: str) -> str:
    """Everything about a suite, as Markdown."""
    lines = origin(suite, records, command)
    for task in suite.tasks:
        lines += ["", f"## {task.name}", "", *_task_lines(suite, records, latencies, task)]
    return "\n".join(lines) + "\n"


def origin(suite: Suite, records: list[Record], command: str) -> list[str]:
    """Where the numbers come from."""
    lines = [f"# {suite.name}", "", f"`{command}`"]
    if hardware := sorted({record["hardware"] for record in records}):
        dates = sorted(record["date"] for record in records)
        used = {name: x for record in records for name, x in record["versions"].items()}
        versions = ", ".join(f"{name} {x}" for name, x in used.items())
        lines += ["", f"{'; '.join(hardware)}; {dates[0]} to {dates[-1]}; {versions}."]
    return lines


def _task_lines(suite: Suite, records: list[Record], latencies: Latencies, task: Task) -> list[str]:
    found = {method: runs_of(records, task, method) for method in task.methods(suite)}
    reference = {run["seed"]: run for run in found.get(REFERENCE, [])}
    done = [method for method, runs in found.items() if runs]
    ranked = sorted(done, key=lambda method: -mean_of(found[method], "test_accuracy"))
    lines = [f"{described(task)}. Mean ± standard deviation over {len(suite.seeds)} seeds.", ""]
    if suite.seeds_of:
        own = "; ".join(f"{method} {len(suite.seeds_for(method))}" for method in suite.seeds_of)
        lines[0] += f" Seeds of others: {own}."
    if ranked:
        lines += table(
            [
                "method",
                "tuned",
                "test accuracy",
                f"less {REFERENCE}",
                "validation before → after the freeze",
                "groups alive of budget",
            ],
            [_accuracy_row(method, found[method], reference) for method in ranked],
        )
        lines += ["", *_cost_lines(ranked, found, latencies)]
        lines += _side_lines(ranked, found)
    lines += _off_size(task, {method: found[method] for method in ranked})
    lines += _anchors(suite)
    seeds = {method: len(suite.seeds_for(method)) for method in done}
    fewer = [f"{x} {len(found[x])} of {n}" for x, n in seeds.items() if len(found[x]) < n]
    if fewer:
        lines += ["", f"Not of all seeds yet: {'; '.join(fewer)}."]
    missing = [method for method in found if method not in done]
    if missing:
        lines += ["", f"Not run: {'; '.join(missing)}."]
    lines += [f"\nLeft out: {method}: {reason}." for method, reason in task.skip.items()]
    return lines


def _off_size(task: Task, found: dict[str, list[Record]]) -> list[str]:
    """Which methods left other operations than they should, by more than 2 % of them."""
    if task.operations is None:
        return []
    shares = {method: operations_left(runs) for method, runs in found.items() if method != "dense"}
    off = {
        method: share for method, share in shares.items() if abs(share / task.operations - 1) > 0.02
    }
    if not off:
        return []
    listed = "; ".join(f"{method} {share:.1%}" for method, share in off.items())
    return ["", f"Of other sizes, by more than 2 %: {listed}."]


def operations_left(runs: list[Record]) -> float:
    """The share of the operations that the slim networks keep, on average."""
    return statistics.mean(run["flops"][1] / run["flops"][0] for run in runs)


def _anchors(suite: Suite) -> list[str]:
    if not suite.anchors:
        return []
    rows = [[name, *cells] for name, cells in suite.anchors.items()]
    header = ["from papers", "test accuracy", "FLOPs left", "training"]
    return ["", *table(header, rows)]


def _cost_lines(
    ranked: Sequence[str], found: dict[str, list[Record]], latencies: Latencies
) -> list[str]:
    header = [
        "method",
        "parameters left",
        "FLOPs left",
        "slim less masked accuracy",
        f"latency slim / dense, batch {', '.join(map(str, BATCHES))}",
        "training step / plain",
        "peak memory, MiB",
    ]
    return table(header, [_cost_row(method, found[method], latencies) for method in ranked])


def _side_lines(ranked: Sequence[str], found: dict[str, list[Record]]) -> list[str]:
    """Where n of every m weights stay: how many end on another side than they were on."""
    rows = []
    for method in ranked:
        moved = [run["moved"] for run in found[method] if "moved" in run]
        if moved:
            places = (len(moved[0]) // 2 - 1, 3 * len(moved[0]) // 4 - 1)
            shares = [statistics.mean(run[max(0, place)] for run in moved) for place in places]
            rows.append([method, *(f"{share:.1%}" for share in shares)])
    header = ["weights that end on another side", "than at half", "than at three quarters"]
    return ["", *table(header, rows)] if rows else []


def _accuracy_row(method: str, runs: list[Record], reference: dict[int, Record]) -> list[str]:
    value = f"{METHODS[method].tuned} {runs[0]['value']:g}"
    differences = [
        run["test_accuracy"] - reference[run["seed"]]["test_accuracy"]
        for run in runs
        if run["seed"] in reference
    ]
    paired = "-" if not differences or method == REFERENCE else spread(differences, sign="+")
    freeze = f"{mean_of(runs, 'before_freeze'):.1f} → {mean_of(runs, 'after_freeze'):.1f}"
    alive = [sum(count for count, _ in run["alive"][-1].values()) for run in runs]
    mean = round(statistics.mean(alive), 1)
    of_groups = runs[0]["budget"] <= sum(count for _, count in runs[0]["alive"][-1].values())
    budget = f"{mean:g} of {runs[0]['budget']:g}" if of_groups else f"{mean:g}"  # else operations
    budget = "-" if method == "dense" else budget
    accuracy = spread([run["test_accuracy"] for run in runs])
    bold = f"**{method}**" if METHODS[method].ours else method
    return [bold, value, accuracy, paired, freeze, budget]


def _cost_row(method: str, runs: list[Record], latencies: Latencies) -> list[str]:
    parameters = statistics.mean(run["parameters"][1] / run["parameters"][0] for run in runs)
    flops = operations_left(runs)
    slim = statistics.mean(run["slim_test_accuracy"] - run["test_accuracy"] for run in runs)
    measured = [latencies[run["name"]] for run in runs if run["name"] in latencies]
    medians = [
        statistics.median(ratio for ratio, _, _ in batch) for batch in zip(*measured, strict=True)
    ]
    latency = ", ".join(f"{median:.2f}" for median in medians) or "not measured"
    step = statistics.median(ratio for run in runs for ratio in run["step_ratios"])
    memory = statistics.mean(run["peak_bytes"] for run in runs) / 2**20
    shares = [f"{parameters:.1%}", f"{flops:.1%}", f"{slim:+.2f}"]
    return [method, *shares, latency, f"{step:.2f}", f"{memory:.0f}"]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation.

    >>> spread([1.0, 2.0, 3.0]), spread([0.5], sign="+")
    ('2.00 ± 1.00', '+0.50')
    """
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def mean_of(runs: Sequence[Record], key: str) -> float:
    """Of a number over runs."""
    return statistics.mean(run[key] for run in runs)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def described(task: Task) -> str:
    """In a sentence, without its end."""
    made = ", ".join(f"{name} {value}" for name, value in task.arguments.items())
    network = f"{task.network} ({made})" if made else task.network
    share = task.share_of_epoch
    images = "" if share == 1 else f" of {share:.0%} of the training images"
    start = ""
    if task.pretrained is not None:
        start = f" from dense networks of {task.pretrained['epochs']} epochs"
    fixed = "half" if task.freeze == 0.5 else f"{task.freeze:.0%}"
    return (
        f"{network} on {task.data}, {task.budget()}, {task.epochs} epochs{images}{start}, the mask "
        f"fixed after {fixed} of them, {task.optimizer} from {task.lr:g}"
    )


def _same_task(record: Record, task: Task) -> bool:
    """Whether it was run like this; the dense network has no budget, and counts for all of them."""
    method, own = record["method"], Task(**record["task"])
    named = method in WITHOUT_BUDGET or own.name == task.name
    return named and own.settings(method) == task.settings(method)


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
        rows = [
            [f"{value:g}", *map(_cell, suite.tasks, row)]
            for value, row in zip(suite.values[method], grid(suite, records, method), strict=True)
        ]
        header = [METHODS[method].tuned, *(task.name for task in suite.tasks)]
        lines += ["", f"## {method}", "", *table(header, rows)]
    return "\n".join(lines) + "\n"


def _cell(task: Task, runs: list[Record]) -> str:
    if not runs:
        return "-"
    accuracy = spread([run["test_accuracy"] for run in runs])
    if not (isinstance(task.k, float) and task.k == 1):
        return accuracy
    alive = spread([sum(count for count, _ in run["alive"][-1].values()) for run in runs])
    return f"{accuracy}, {alive} of {runs[0]['budget']:g} groups alive"


def grid(suite: Suite, records: list[Record], method: str) -> list[list[list[Record]]]:
    """The runs that count, for every value and task a list over seeds."""
    assert suite.values is not None
    found = [runs_of(records, task, method) for task in suite.tasks]
    return [
        [[run for run in runs if run["value"] == value] for runs in found]
        for value in suite.values[method]
    ]

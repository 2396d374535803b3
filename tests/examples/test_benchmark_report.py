"""Which records a table of the benchmark is made of, and what it says about them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from examples.benchmark.report import _side_lines, grid_report, report, runs_of
from examples.benchmark.suite import Run, Suite, Task

TASK = Task(name="small", network="lenet5", data="digits", k=0.25, epochs=4)
SUITE = Suite("suite", (TASK,), ("dense", "gradual magnitude"), seeds=(0,))
HALF = {"share_of_epoch": 0.5}


def record(method: str, task: Task = TASK) -> dict[str, Any]:
    """As it is read from its file."""
    return json.loads(json.dumps(asdict(Run(task, method, 0.5, 0, trial=False))))


@pytest.mark.parametrize(
    "changed",
    [
        HALF,
        {"weight_decay": 0.1},
        {"precision": "bf16-mixed"},
        {"epochs": 8},
        {"arguments": {"width": 3}},
        {"optimizer": "adam"},
    ],
)
@pytest.mark.parametrize("method", SUITE.methods)
def test_runs_with_other_settings_do_not_count(method: str, changed: dict[str, Any]) -> None:
    other = record(method, replace(TASK, **changed))
    assert runs_of([other, record(method)], TASK, method) == [record(method)]


@pytest.mark.parametrize(
    "changed", [{"k": 0.5}, {"structure": "channel"}, {"exclude": "fc*"}, {"name": "other"}]
)
def test_the_dense_network_is_that_of_every_budget(changed: dict[str, Any]) -> None:
    task = replace(TASK, **changed)
    assert runs_of([record("dense")], task, "dense") == [record("dense")]
    assert runs_of([record("gradual magnitude")], task, "gradual magnitude") == []


def test_why_a_method_is_left_out_changes_no_run() -> None:
    task = replace(TASK, skip={"HESSO": "no"})
    for method in SUITE.methods:
        assert runs_of([record(method)], task, method) == [record(method)]


def test_a_share_of_the_images_is_said() -> None:
    text = report(replace(SUITE, tasks=(replace(TASK, **HALF),)), [], {}, "command")
    assert "4 epochs of 50% of the training images, the mask fixed" in text
    assert "4 epochs, the mask fixed" in report(SUITE, [], {}, "command")


def test_a_grid_shows_every_value_for_every_task_and_what_is_missing() -> None:
    method = "paper, structure, layer"
    tasks = (TASK, replace(TASK, name="smaller", k=0.1))
    values = {method: (0.01, 0.1)}
    suite = replace(SUITE, tasks=tasks, methods=(method,), values=values, seeds=(0, 1))
    accuracies = {("small", 0.01): (80.0, 82.0), ("smaller", 0.1): (10.0, 10.0)}
    records = [
        {**record(method, task), "value": value, "seed": seed, "test_accuracy": accuracy}
        for task in tasks
        for value in values[method]
        for seed, accuracy in enumerate(accuracies.get((task.name, value), ()))
    ]
    for each in records:
        each.update(hardware="a machine", date="2026-01-01", versions={"torch": "2"})
    lines = grid_report(suite, records, "command").splitlines()
    assert "| lam | small | smaller |" in lines
    assert "| 0.01 | 81.00 ± 1.41 | - |" in lines
    assert "| 0.1 | - | 10.00 ± 0.00 |" in lines
    assert "- smaller: lenet5 on digits, 10% of the groups, 4 epochs, the mask" in "\n".join(lines)
    assert "over 2 seeds" in "\n".join(lines)
    assert "one seed" in grid_report(replace(suite, seeds=(0,)), records, "command")


def test_a_grid_without_a_budget_shows_how_many_groups_are_alive() -> None:
    method = "ProxSGD"
    task = replace(TASK, k=1.0, freeze=1.0)
    suite = replace(SUITE, tasks=(task,), methods=(method,), values={method: [0.5]}, seeds=(0, 1))
    made = {"hardware": "a machine", "date": "2026-01-01", "versions": {}, "budget": 12.0}
    records = [
        record(method, task)
        | {
            "seed": seed,
            "test_accuracy": 80.0,
            "alive": [{"a": [9, 9]}, {"a": [2, 9], "b": [x, 3]}],
        }
        | made
        for seed, x in enumerate((1, 3))
    ]
    text = grid_report(suite, records, "command")
    assert "| 0.5 | 80.00 ± 0.00, 4.00 ± 1.41 of 12 groups alive |" in text
    assert "the mask fixed after 100% of them" in text


def test_seeds_that_are_missing_are_said() -> None:
    measured = {
        **{"name": "run", "hardware": "a machine", "date": "2026-01-01", "versions": {}},
        **{"test_accuracy": 80.0, "slim_test_accuracy": 80.0, "step_ratios": [1.0]},
        **{"before_freeze": 70.0, "after_freeze": 70.0, "alive": [{"fc": [2, 8]}], "budget": 2.0},
        **{"parameters": [8, 8], "flops": [8, 8], "peak_bytes": 2**20},
    }
    text = report(replace(SUITE, seeds=(0, 1)), [{**record("dense"), **measured}], {}, "command")
    assert "| dense | learning rate 0.5 | 80.00 | - |" in text
    assert "Not of all seeds yet: dense 1 of 2." in text
    assert "Not run: gradual magnitude." in text


def test_of_patterns_the_late_changes_of_sides_are_shown() -> None:
    runs = [{"moved": [0.3, 0.2, 0.1, 0.0]}, {"moved": [0.5, 0.4, 0.3, 0.0]}]
    lines = _side_lines(["dense", "SR-STE"], {"dense": [{}], "SR-STE": runs})
    assert lines[-1] == "| SR-STE | 30.0% | 20.0% |"  # at the end of epochs 2 and 3 of 4
    assert _side_lines(["dense"], {"dense": [{}]}) == []

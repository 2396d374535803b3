"""Accuracy over operations: what makes a curve, what it says of ours, and one that is run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmark import run as protocol
from examples.benchmark.__main__ import main, read, write_report
from examples.benchmark.curves import curve_lines, curves_of
from examples.benchmark.records import Records
from examples.benchmark.suite import Run, Suite, Task
from examples.models.lenet import SmallConvNet
from lightning_wgsef.network.flops import layer_flops

CURVE = "small-conv-digits.svg"
OURS = "homotopy, structure, layer"
BASE = Task(name="a-60", network="small-conv", data="digits", epochs=4, operations=0.6)
SUITE = Suite(
    "suite",
    (replace(BASE, name="a-12", operations=0.12), BASE, replace(BASE, name="a-30", operations=0.3)),
    ("dense", OURS, "gradual magnitude", "Torch-Pruning"),
    seeds=(0, 1),
)
ACCURACIES = {
    OURS: {0.6: (90.0, 91.0), 0.3: (85.0, 86.0), 0.12: (70.0, 72.0)},
    "gradual magnitude": {0.6: (88.0, 89.5), 0.3: (86.0, 87.5), 0.12: (70.0, 71.5)},
    "Torch-Pruning": {0.6: (80.0, 80.0)},
}


def records(accuracies: dict[str, dict[float, tuple[float, ...]]]) -> list[dict[str, Any]]:
    made = []
    for task in SUITE.tasks:
        for method, own in accuracies.items():
            for seed, accuracy in enumerate(own.get(task.operations or 0, ())):
                run = Run(task, method, 0.5, seed, trial=False)
                left = 70 if method == "Torch-Pruning" else 1000 * (task.operations or 0)
                made.append(
                    {
                        "name": run.name,
                        **vars(run),
                        "task": vars(task),
                        "test_accuracy": accuracy,
                        "slim_test_accuracy": accuracy,
                        "flops": [100 if method == "Torch-Pruning" else 1000, left],
                        "parameters": [100, 30],
                        "before_freeze": 50.0,
                        "after_freeze": 50.0,
                        "validation": [40.0, 50.0, 60.0, 70.0],
                        "alive": [{"a": [2, 4]}],
                        "budget": 2.0,
                        "step_ratios": [1.0],
                        "peak_bytes": 1,
                        "hardware": "a machine",
                        "date": "2026-01-01",
                        "versions": {},
                    }
                )
    return made


def test_three_sizes_of_one_network_are_a_curve() -> None:
    (curve,) = curves_of(SUITE)
    assert curve.name == "small-conv-digits"
    assert [task.operations for task in curve.tasks] == [0.6, 0.3, 0.12]
    assert curves_of(replace(SUITE, tasks=SUITE.tasks[:2])) == []
    others = tuple(replace(task, epochs=8, operations=None, k=0.5) for task in SUITE.tasks)
    assert curves_of(replace(SUITE, tasks=others)) == []
    longer = tuple(replace(task, epochs=8) for task in SUITE.tasks)
    with pytest.raises(ValueError, match="small-conv-digits must differ in their operations alone"):
        curves_of(replace(SUITE, tasks=(*SUITE.tasks, *longer)))


def test_what_a_curve_says() -> None:
    """Leads of 2.0, 1.5 at 60 %, of -1.0, -1.5 at 30 %, of 0.0, 0.5 at 12 %."""
    (curve,) = curves_of(SUITE)
    text = "\n".join(curve_lines(SUITE, records(ACCURACIES), curve))
    assert f"| {OURS} | 90.50 ± 0.71 | 85.50 ± 0.71 | 71.00 ± 1.41 |" in text
    assert "| Torch-Pruning | 80.00 ± 0.00 at 70.0% | not run | not run |" in text
    best, missing = "on gradual magnitude (seed by seed", "; not run: Torch-Pruning."
    assert f"- 60%: {OURS} is first, +1.75 ± 0.35 {best} +2.00, +1.50).\n" in text
    assert f"- 30%: {OURS} is not first, -1.25 ± 0.35 {best} -1.00, -1.50){missing}\n" in text
    end = f"+0.00, +0.50); inside the spread: gradual magnitude{missing}\n"
    assert f"- 12%: {OURS} is first, +0.25 ± 0.35 {best} {end}" in text
    crossings = [line for line in text.splitlines() if " cross at " in line]
    # 0.6 ** (1.25 / 3) * 0.3 ** (1.75 / 3) and 0.3 ** (0.25 / 1.5) * 0.12 ** (1.25 / 1.5)
    assert [line.rpartition(" cross at ")[2] for line in crossings] == [
        "40% of the operations.",
        "14% of the operations.",
    ]


def test_a_lead_of_a_larger_network_is_called_that() -> None:
    (curve,) = curves_of(SUITE)
    better = {**ACCURACIES, "Torch-Pruning": {0.6: (95.0, 95.0)}}
    text = "\n".join(curve_lines(SUITE, records(better), curve))
    seeds = "Torch-Pruning (seed by seed -5.00, -4.00)"
    assert f"{seeds}, which keeps 70.0% of the operations, ours 60.0%." in text
    assert text.count("which keeps") == 1


def test_half_of_the_seeds_are_not_shown() -> None:
    (curve,) = curves_of(SUITE)
    one = {OURS: {0.6: (90.0,)}, "gradual magnitude": {0.6: (80.0, 80.0)}}
    text = "\n".join(curve_lines(SUITE, records(one), curve))
    assert "| gradual magnitude | 80.00 ± 0.00 | not run | not run |" in text
    assert OURS not in text
    assert "Not run yet." in "\n".join(curve_lines(SUITE, [], curve))


def test_the_suite_has_a_curve_for_every_network() -> None:
    suite = read("curves")
    found = {curve.name: [task.operations for task in curve.tasks] for curve in curves_of(suite)}
    assert found == {
        "lenet5-fashion-mnist": [0.6, 0.4, 0.25, 0.12],
        "vit-fashion-mnist": [0.6, 0.4, 0.25, 0.15],
        "five-layer-batchnorm-cifar10": [0.6, 0.4, 0.25, 0.12],
        "cifar-resnet-cifar10": [0.6, 0.4, 0.25, 0.12],
    }
    assert suite.seeds == (0, 1, 2)
    assert set(suite.fixed) == set(suite.methods)  # nothing is tuned, the same for all


def test_a_curve_is_drawn_once(tmp_path: Path) -> None:
    made = Records(tmp_path / "records.jsonl")
    assert [path.name for path in write_report(SUITE, made, tmp_path)] == ["README.md"]
    for record in records(ACCURACIES):
        made.append(record)
    written = [path.name for path in write_report(SUITE, made, tmp_path)]
    assert sorted(written) == ["README.md", CURVE]
    assert f"![Test accuracy over operations]({CURVE})" in (tmp_path / "README.md").read_text(
        "utf-8"
    )
    before = (tmp_path / CURVE).read_bytes()
    write_report(SUITE, made, tmp_path)
    assert (tmp_path / CURVE).read_bytes() == before


def most_with_one_more(alive: dict[str, list[int]]) -> float:
    """FLOPs with one channel more in the layer that makes the most of it."""
    widths = [count for count, _ in alive.values()]
    more = [[n + (i == j) for j, n in enumerate(widths)] for i in range(len(widths))]
    return max(layer_flops(SmallConvNet(x), torch.zeros(2, 1, 8, 8))[1] for x in more)


@pytest.mark.sweep
def test_a_curve_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(protocol, "PLAIN_STEPS", 2)
    settings = "network: small-conv, data: digits, epochs: 2, batch_size: 256, operations"
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"tasks: {{a: {{{settings}: 0.6}}, b: {{{settings}: 0.4}}, c: {{{settings}: 0.2}}}}\n"
        f"methods: [dense, '{OURS}']\nseeds: [0]\nfixed: {{dense: 1.0, '{OURS}': 0.02}}\n"
    )
    folders = ["--results", str(tmp_path), "--work", str(tmp_path / "work"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--suite", str(path), *folders])
    assert main() == 0
    records = Records(tmp_path / "tiny" / "records.jsonl")
    assert len(records.all()) == 4
    written = write_report(read(str(path)), records, tmp_path / "tiny")
    assert {path.name for path in written} == {"README.md", CURVE}
    for record in records.all():
        if record["method"] != "dense":
            wanted = record["task"]["operations"] * record["flops"][0]
            assert record["flops"][1] <= wanted < most_with_one_more(record["alive"][-1])
    text = written[0].read_text("utf-8")
    assert "## small-conv-digits: accuracy over operations" in text
    assert text.count(f"| {OURS} |") == 4
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(("seeds_of", "drawn"), [({}, False), ({"Torch-Pruning": [0]}, True)])
def test_a_method_is_drawn_once_all_of_its_own_seeds_were_run(
    seeds_of: dict[str, list[int]], drawn: bool, tmp_path: Path
) -> None:
    """In the picture of a task, some methods have fewer seeds than the others."""
    suite = replace(SUITE, tasks=SUITE.tasks[1:2], seeds_of=seeds_of)
    made = Records(tmp_path / "records.jsonl")
    for record in records({**ACCURACIES, "Torch-Pruning": {0.6: (80.0,)}}):
        made.append(record)
    write_report(suite, made, tmp_path)
    picture = (tmp_path / "a-60.svg").read_text()
    assert "<!-- gradual magnitude -->" in picture
    assert ("<!-- Torch-Pruning -->" in picture) == drawn

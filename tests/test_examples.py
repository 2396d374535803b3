"""The examples end to end, on real data."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import FASHION_MNIST, needs_fashion_mnist

from examples import comparison, lenet_fashion_mnist, quickstart


def run(main, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    try:
        main()
    finally:
        torch.set_flush_denormal(False)  # the examples flush, other tests need such numbers


def alive(output: str) -> dict[str, tuple[int, int]]:
    """Layer -> (groups alive, budget) in the printed table."""
    found = re.findall(r"^network\.(\w+) +(\d+) / \d+ +(\d+) ", output, flags=re.MULTILINE)
    return {layer: (int(left), int(budget)) for layer, left, budget in found}


def test_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(quickstart.main, [], tmp_path, monkeypatch)
    output = capsys.readouterr().out
    assert alive(output) == {"conv2": (4, 4), "conv3": (8, 8), "fc": (16, 16)}
    dense, sparse = re.search(r"dense ([\d.]+) %, sparse ([\d.]+) %", output).groups()
    assert float(dense) > 95
    assert float(sparse) > 85  # chance is 10
    assert "tensorboard --logdir lightning_logs" in output
    assert list((tmp_path / "lightning_logs" / "quickstart-sparse").rglob("events.out.tfevents.*"))


@needs_fashion_mnist
def test_lenet_on_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data-dir", str(FASHION_MNIST), "--epochs", "1"]
    run(lenet_fashion_mnist.main, arguments, tmp_path, monkeypatch)
    output = capsys.readouterr().out
    assert alive(output) == {"conv2": (1, 1), "fc1": (40, 40), "fc2": (12, 12)}
    dense, sparse = re.search(r"dense ([\d.]+) %, sparse ([\d.]+) %", output).groups()
    assert float(dense) > 75
    assert float(sparse) > 60


@needs_fashion_mnist
@pytest.mark.parametrize("method", ["homotopy", "gradual magnitude", "one-shot magnitude"])
def test_comparison_meets_the_budget_with_every_method(method: str) -> None:
    task = comparison.TASKS["lenet"]
    record = comparison.run(task, method, "channel", 0.5, 0, FASHION_MNIST, limit_batches=0.1)
    assert record["alive"] == record["budgets"]
    assert record["accuracy"] > 40
    assert 5 < record["after_freeze"] <= 100
    table = comparison.table([record])
    assert f"| channel | 50% | {method} | {record['accuracy']:.2f} ± 0.00 |" in table

"""The examples end to end, on real data."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import fine_tune, lenet, quickstart


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


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
def test_fine_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(fine_tune.main, ["--epochs", "8"], tmp_path, monkeypatch)
    found = re.findall(
        r"^(.+): ([\d.]+) % right, ([\d,]+) of ([\d,]+) weights", capsys.readouterr().out, re.M
    )
    numbers = {name: (float(score), alive, total) for name, score, alive, total in found}
    pruned, masked, small = numbers.values()
    assert [name for name, *_ in found] == [
        "pruned",
        "fine-tuned with its zeros",
        "fine-tuned without them",
    ]
    assert masked[1:] == pruned[1:]  # not one weight came back
    assert small[1] == small[2]
    assert int(small[2].replace(",", "")) < int(pruned[2].replace(",", "")) / 10
    assert min(masked[0], small[0]) > pruned[0] - 1
    assert small[0] > 70  # chance is 10
    assert {x.name for x in (tmp_path / "fine_tune").iterdir()} == {
        "pruned.ckpt",
        "small.json",
        "small.safetensors",
    }


@pytest.mark.sweep
def test_lenet_on_fashion_mnist(
    fashion_mnist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--data-dir", str(fashion_mnist), "--epochs", "1"]
    run(lenet.main, arguments, tmp_path, monkeypatch)
    output = capsys.readouterr().out
    assert alive(output) == {"conv2": (1, 1), "fc1": (40, 40), "fc2": (12, 12)}
    dense, sparse = re.search(r"dense ([\d.]+) %, sparse ([\d.]+) %", output).groups()
    assert float(dense) > 75
    assert float(sparse) > 60


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
@pytest.mark.filterwarnings("ignore:.*litlogger", "ignore:.*litmodels")
def test_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_module("examples.tour", run_name="__main__")
    torch.set_flush_denormal(False)
    output = capsys.readouterr().out
    assert "mask fixed after step 200: 28 of 112 groups alive" in output
    assert "24,058 -> 1,702 parameters (7.1%)" in output
    difference = float(re.search(r"outputs on test images: (\S+)", output).group(1))
    assert difference < 1e-5
    pruned, tuned, small = (float(x) for x in re.findall(r"test/accuracy\W+([\d.]+)", output))
    assert pruned > 0.85  # chance is 0.1
    assert min(tuned, small) > pruned - 0.03
    written = {path.name for path in (tmp_path / "tour").iterdir()}
    assert written >= {
        "pruned.ckpt",
        "small.safetensors",
        "small.pt2",
        "sparsity.png",
        "networks.png",
    }

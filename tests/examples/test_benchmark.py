"""The benchmark's runner: every method under the protocol, stopped and resumed, on the digits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmark import run as protocol
from examples.benchmark.__main__ import main
from examples.benchmark.baselines.rivals import smaller_network
from examples.benchmark.callbacks import Checkpoint
from examples.benchmark.method_api import Situation, counted
from examples.benchmark.methods import METHODS
from examples.benchmark.records import read_record
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.suite import Run, Task, read_suite
from lightning_wgsef import group_parameters
from tests.helpers.benchmark_runs import WRITE, stopping

ROOT = Path(__file__).parents[2]
TASK = Task(
    name="digits", network="small-conv", data="digits", k=0.25, epochs=4, batch_size=64, lr=0.05
)
# One of every kind: the others differ in arguments of the package alone.
KINDS = (
    "dense",
    "small from scratch",
    "one-shot magnitude",
    "gradual magnitude",
    "HSPG",
    "AdaHSPG+",
    "PAT, minimum sparsity",
    "PAT, group lasso",
    "Torch-Pruning",
    "homotopy, structure, layer",
    "paper, half-space, channel, layer",
    "unbiased, structure, global",
)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(protocol, "PLAIN_STEPS", 2)
    yield
    torch.set_flush_denormal(False)


def run_of(method: str) -> Run:
    return Run(TASK, method, METHODS[method].values[1], seed=3, trial=False)


def execute(run: Run, folder: Path) -> dict[str, Any]:
    return protocol.execute(run, folder, folder / "work", "cpu")


@pytest.mark.parametrize("method", KINDS)
def test_every_method_keeps_the_protocol_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    run = run_of(method)
    whole = execute(run, tmp_path)
    assert len(whole["validation"]) == len(whole["alive"]) == TASK.epochs
    assert whole["before_freeze"] is not None
    assert whole["after_freeze"] is not None
    alive = sum(count for count, _ in whole["alive"][-1].values())
    if method == "dense":
        assert alive == sum(total for _, total in whole["alive"][-1].values())
    else:
        assert alive == whole["budget"]
        assert whole["parameters"][1] < whole["parameters"][0]
        assert whole["flops"][1] < whole["flops"][0]
    assert whole["slim_test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=0.3)

    for epoch in (0, 2):  # before and after the freeze
        monkeypatch.setattr(Checkpoint, "on_train_epoch_end", stopping(epoch))
        with pytest.raises(RuntimeError, match="stop"):
            execute(run, tmp_path)
    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", WRITE)
    resumed = execute(run, tmp_path)
    for key in ("validation", "loss", "alive", "test_accuracy", "before_freeze", "after_freeze"):
        assert resumed[key] == whole[key], key


def test_torch_pruning_removes_whole_heads_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(
        TASK,
        network="vit",
        arguments={"size": 8, "channels": 1, "width": 16, "depth": 2},
        structure={"*attention*": "head", "*mlp*": "hidden"},
        optimizer="adamw",
        lr=2e-3,
    )
    run = replace(run_of("Torch-Pruning"), task=task)
    whole = execute(run, tmp_path)
    assert whole["alive"][-1] == {
        "blocks.0.attention": [1, 4],
        "blocks.0.mlp.0": [16, 64],
        "blocks.1.attention": [1, 4],
        "blocks.1.mlp.0": [16, 64],
    }
    assert whole["slim_test_accuracy"] == whole["test_accuracy"]
    small = smaller_network(
        Situation(task, NETWORKS[task.network](**task.arguments), torch.zeros(2, 1, 8, 8))
    )
    assert whole["parameters"][1] == sum(p.numel() for p in small.parameters())

    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", stopping(2))
    with pytest.raises(RuntimeError, match="stop"):
        execute(run, tmp_path)
    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", WRITE)
    resumed = execute(run, tmp_path)
    for key in ("validation", "loss", "alive", "test_accuracy"):
        assert resumed[key] == whole[key], key


def test_a_trial_sees_no_test_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(run_of("dense"), trial=True)
    monkeypatch.setattr(
        "examples.data.modules.InMemory.test_dataloader",
        lambda self: pytest.fail("the test images"),
    )
    record = execute(run, tmp_path)
    assert "test_accuracy" not in record
    with pytest.raises(pytest.fail.Exception, match="the test images"):
        execute(replace(run, trial=False), tmp_path)


SUITE = """
tasks:
  digits: {network: small-conv, data: digits, k: 0.25, epochs: 12, batch_size: 64}
methods: ["homotopy, structure, layer"]
seeds: [0]
"""


def command(folder: Path, *more: str) -> list[str]:
    paths = ["--results", str(folder / "results"), "--work", str(folder / "work")]
    suite = ["--suite", str(folder / "small.yaml"), "--workers", "1"]
    return [sys.executable, "-W", "ignore", "-m", "examples.benchmark", *suite, *paths, *more]


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=-3
    )


def test_a_killed_suite_loses_one_epoch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the suite in the middle of its first run; the run ends by itself, too."""
    (tmp_path / "small.yaml").write_text(SUITE)
    suite = start(tmp_path)
    work = tmp_path / "work" / "small"
    deadline = time.monotonic() + 120
    while not (found := list(work.glob("*/last.ckpt"))):
        assert time.monotonic() < deadline
        assert suite.poll() is None
        time.sleep(0.02)
    suite.send_signal(signal.SIGKILL)
    suite.wait()
    (checkpoint,) = found
    saved = epochs_in(checkpoint)
    deadline = time.monotonic() + 60
    while True:  # whoever trains notices at the end of its epoch
        time.sleep(1.0)
        if (now := epochs_in(checkpoint)) == saved:
            break
        saved = now
        assert time.monotonic() < deadline
    assert saved < 6
    again = start(tmp_path)
    assert again.wait(timeout=300) == 0
    records = sorted((tmp_path / "results" / "small" / "records").glob("*.json"))
    assert len(records) == 4
    assert not list(work.glob("*/*.ckpt"))
    for path in records:
        record = read_record(path)
        assert record is not None
        assert len(record["validation"]) == record["task"]["epochs"]
        assert record["trial"] or len(record["step_ratios"]) == record["task"]["epochs"]
    for what in ("latencies", "report"):
        words = command(tmp_path, what)
        monkeypatch.setattr(sys, "argv", words[words.index("examples.benchmark") :])
        assert main() == 0
    (latencies,) = json.loads(
        (tmp_path / "results" / "small" / "latencies.json").read_text()
    ).values()
    assert all(0 < lower <= median <= upper for median, lower, upper in latencies)
    text = (tmp_path / "results" / "small" / "README.md").read_text()
    assert "| **homotopy, structure, layer** |" in text
    assert (tmp_path / "results" / "small" / "digits.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    "method", ["homotopy, structure, layer", "gradual magnitude", "Torch-Pruning"]
)
def test_a_budget_by_layers_is_met(tmp_path: Path, method: str) -> None:
    budgets = {"*conv1": 3, "*conv2": 5, "*conv3": 40}
    task = replace(TASK, k=budgets, epochs=2)
    record = execute(replace(run_of(method), task=task), tmp_path)
    assert record["alive"][-1] == {"conv1": [3, 16], "conv2": [5, 32], "conv3": [40, 64]}
    assert task.budget() == "3 groups of *conv1, 5 groups of *conv2, 40 groups of *conv3"


def test_a_single_channel_that_is_left_is_counted() -> None:
    """It competes with nothing, so `group_parameters` finds no group."""
    run = run_of("dense")
    dense = NETWORKS[run.task.network](**run.task.arguments)
    situation = Situation(replace(run.task, k=1 / 16), dense, torch.zeros(2, 1, 8, 8))
    arguments = situation.groups()
    groups = group_parameters(dense, **arguments)
    small = smaller_network(situation)
    expected = {layer.name: [int(layer.budget), layer.count] for layer in groups.layers}
    assert [1, 16] in expected.values()
    assert counted(groups, arguments)(small) == expected
    assert counted(groups, arguments)(dense) == {
        layer.name: [layer.count, layer.count] for layer in groups.layers
    }


def epochs_in(checkpoint: Path) -> int:
    """How many epochs the run that writes it has finished."""
    try:
        return int(torch.load(checkpoint, weights_only=False)["epoch"]) + 1
    except FileNotFoundError:
        return -1


def test_damaged_files_are_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "a.json"
    record.write_text('{"name": "a", ')
    assert read_record(record) is None
    assert not record.exists()
    assert (tmp_path / "a.json.damaged").exists()
    work = tmp_path / "work"
    work.mkdir()
    (work / "last.ckpt").write_bytes(b"half a checkpoint")
    assert execute(run_of("dense"), tmp_path)["test_accuracy"] > 50
    said = capsys.readouterr().err
    assert "a.json is damaged" in said
    assert "last.ckpt is damaged" in said


KNOWN = {"network": NETWORKS, "data": DATA, "methods": METHODS}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks: {a: {network: lenet, data: digits, k: 1, epochs: 2}}\nmethods: []", "'lenet5'"),
        ("tasks: {a: {network: lenet5, data: mnist, k: 1, epochs: 2}}\nmethods: []", "'digits'"),
        (
            "tasks: {a: {network: lenet5, data: digits, k: 1, epochs: 2, batch: 3}}\nmethods: []",
            "'batch' is not known",
        ),
        ("tasks: {a: {network: lenet5, data: digits, k: 1}}\nmethods: []", "lacks ['epochs']"),
        ("tasks: {}\nmethods: [homotopi]", "method must be one of"),
        ("tasks: {}", "must have 'tasks' and 'methods'"),
        ("tasks: [}", "is not YAML"),
        ("tasks: {}\nmethods: []\nseed: 3", "'seed' is not known"),
    ],
)
def test_bad_suites_say_what_is_known(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_suite(str(path), KNOWN)


def test_unknown_suites_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cpu'.*got 'gpu'"):
        read_suite("gpu", KNOWN)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/benchmark/suites").glob("*.yaml")))
def test_suites_that_come_along_can_be_read(path: Path) -> None:
    suite = read_suite(path.stem, KNOWN)
    assert suite.tasks
    for task in suite.tasks:
        assert task.epochs % 2 == 0, "the mask is fixed between two epochs"


def test_data_that_are_absent_are_named_before_anything_trains(tmp_path: Path) -> None:
    """Without network."""
    (tmp_path / "small.yaml").write_text(SUITE.replace("data: digits", "data: fashion-mnist"))
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        command(tmp_path, "--data-dir", str(tmp_path)),
        cwd=ROOT,
        env={**os.environ, **proxies},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(folder) in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    """An image of 8 pixels is too small for LeNet-5."""
    (tmp_path / "small.yaml").write_text(SUITE.replace("small-conv", "lenet5"))
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "failed: ValueError: example_input must be what LeNet5" in done.stdout + done.stderr

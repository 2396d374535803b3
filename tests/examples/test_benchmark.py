"""The benchmark's runner: every method under the protocol, stopped and resumed, on the digits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from examples.benchmark import run as protocol
from examples.benchmark.__main__ import main
from examples.benchmark.baselines.classical import smaller_network
from examples.benchmark.baselines.n_of_m import SRSTE
from examples.benchmark.callbacks import Checkpoint
from examples.benchmark.method_api import Situation, counted
from examples.benchmark.methods import METHODS
from examples.benchmark.records import Records
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.report import described
from examples.benchmark.suite import Run, Task, read_suite
from examples.training import Classifier, accuracy, quiet_trainer
from lightning_wgsef import group_parameters
from tests.helpers.benchmark_runs import WRITE, stopping

ROOT = Path(__file__).parents[2]
TASK = Task(
    name="digits", network="small-conv", data="digits", k=0.25, epochs=4, batch_size=64, lr=0.05
)
# One of every kind: the others differ in arguments of the package alone, or in one callback.
KINDS = ("small from scratch", "gradual magnitude", "Torch-Pruning", "homotopy, structure, layer")
RELATED = (
    "dense",
    "one-shot magnitude",
    "HSPG",
    "AdaHSPG+",
    "PAT, global",
    "PAT, minimum sparsity",
    "PAT, group lasso",
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


@pytest.mark.parametrize(
    "method", [*KINDS, *(pytest.param(x, marks=pytest.mark.sweep) for x in RELATED)]
)
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


@pytest.mark.parametrize("method", ["one-shot magnitude, n:m", "SR-STE"])
def test_patterns_keep_the_protocol_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    task = replace(TASK, structure="2:4", k=0.5, epochs=2)
    run = replace(run_of(method), task=task)
    whole = execute(run, tmp_path)
    assert sum(count for count, _ in whole["alive"][-1].values()) == whole["budget"]
    assert sum(total for _, total in whole["alive"][-1].values()) == 2 * whole["budget"]
    # One cut fixes the sides; SR-STE's go on to change.
    assert (whole["moved"][0] > 0) == (method == "SR-STE")
    assert whole["moved"][-1] == 0
    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", stopping(0))
    with pytest.raises(RuntimeError, match="stop"):
        execute(run, tmp_path)
    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", WRITE)
    resumed = execute(run, tmp_path)
    for key in ("validation", "loss", "alive", "moved", "test_accuracy"):
        assert resumed[key] == whole[key], key


def test_sr_ste_passes_gradients_through_and_lets_the_masked_decay() -> None:
    torch.manual_seed(0)
    network = nn.Linear(8, 4, bias=False)
    dense = network.weight.detach().clone()
    kept = dense.abs().view(-1, 4).argsort(1, descending=True).argsort(1) < 2
    masked = torch.where(kept.view_as(dense), dense, 0.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    callback = SRSTE(0.3, grouping="2:4")
    trainer = SimpleNamespace(optimizers=[optimizer])
    callback.on_train_start(trainer, nn.Sequential(network))
    assert torch.equal(network.weight, masked)
    inputs = torch.randn(5, 8)
    network(inputs).square().sum().backward()
    gradient = 2 * (inputs @ masked.T).T @ inputs
    callback.on_before_optimizer_step()
    optimizer.step()
    want = dense - 0.1 * (gradient + 0.3 * (dense - masked))
    torch.testing.assert_close(callback.dense[0], want)
    assert int((network.weight != 0).sum()) == 16


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


def finish(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> int:
    """The same command in this process, to its exit status."""
    words = command(folder, *more)
    monkeypatch.setattr(sys, "argv", words[words.index("examples.benchmark") :])
    return main()


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=-3
    )


@pytest.mark.sweep
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
    suite.kill()
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
    assert finish(monkeypatch, tmp_path) == 0
    records = Records(tmp_path / "results" / "small" / "records.jsonl").all()
    assert len(records) == 4
    assert not list(work.glob("*/*.ckpt"))
    for record in records:
        assert len(record["validation"]) == record["task"]["epochs"]
        assert record["trial"] or len(record["step_ratios"]) == record["task"]["epochs"]
    for what in ("latencies", "report"):
        assert finish(monkeypatch, tmp_path, what) == 0
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


def test_a_damaged_checkpoint_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "last.ckpt").write_bytes(b"half a checkpoint")
    assert execute(run_of("dense"), tmp_path)["test_accuracy"] > 50
    assert "last.ckpt is damaged" in capsys.readouterr().err


KNOWN = {"network": NETWORKS, "data": DATA, "methods": METHODS}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks: {a: {network: lenet, data: digits, k: 1, epochs: 2}}\nmethods: []", "'lenet5'"),
        ("tasks: {a: {network: lenet5, data: mnist, k: 1, epochs: 2}}\nmethods: []", "'digits'"),
        (
            "tasks: {a: {network: lenet5, data: digits, k: 1, epochs: 2, batch: 3}}\nmethods: []",
            "must be one of ['arguments', 'batch_size', ",
        ),
        ("tasks: {a: {network: lenet5, data: digits, k: 1}}\nmethods: []", "required: epochs"),
        ("tasks: {}\nmethods: [homotopi]", "method must be one of"),
        ("tasks: {}", "must have 'tasks' and 'methods'"),
        ("tasks: [}", "is not YAML"),
        ("tasks: {}\nmethods: []\nseed: 3", "'seed'; did you mean 'seeds'?"),
        ("tasks: {a: {network: lenet5, data: digits, k: 1, epochs: many}}\nmethods: []", "epochs"),
        ("tasks: {a: {network: lenet5, data: digits, k: x, epochs: 2}}\nmethods: []", "value: x"),
        ("tasks: {a: }\nmethods: []", "task 'a': the following arguments are required: network"),
        ("tasks: [a]\nmethods: []", "must have 'tasks' and 'methods'"),
        ("tasks: {}\nmethods: [dense]\nvalues: {HSPG: [1]}", "values must be one of ['HSPG']"),
    ],
)
def test_bad_suites_say_what_is_known(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_suite(str(path), KNOWN)


def test_unknown_suites_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cpu'.*got 'tpu'"):
        read_suite("tpu", KNOWN)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/benchmark/suites").glob("*.yaml")))
def test_suites_that_come_along_can_be_read(path: Path) -> None:
    suite = read_suite(path.stem, KNOWN)
    assert suite.tasks
    for task in suite.tasks:
        for part in (task, task.shorter(suite.trial_share)):
            fixed = part.freeze * part.epochs
            assert fixed == int(fixed), "the mask is fixed between two epochs"
            assert part.epochs <= task.epochs


def test_data_that_are_absent_are_named_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without network."""
    (tmp_path / "small.yaml").write_text(SUITE.replace("data: digits", "data: fashion-mnist"))
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert finish(monkeypatch, tmp_path, "--data-dir", str(tmp_path)) == 2
    assert str(folder) in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("instructions", "precision", "said"),
    [
        ("AVX2", "bf16-mixed", True),
        ("AVX512", "bf16-mixed", False),
        ("AVX2", "32-true", False),
        ("AVX2", "32-true, pretrained: {epochs: 2, precision: bf16-mixed}", True),
    ],
)
def test_a_processor_without_bfloat16_is_told_before_anything_trains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    instructions: str,
    precision: str,
    said: bool,
) -> None:
    """Measured there: 16.3 s a step of ResNet-20 instead of 1.5."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    own = f"data: digits, precision: {precision}"
    (tmp_path / "small.yaml").write_text(SUITE.replace("data: digits", own))
    called = command(tmp_path, "--minutes", "-1")  # no run is begun
    monkeypatch.setattr(sys, "argv", called[called.index("examples.benchmark") :])
    assert main() == 75
    found = "has AVX2 and no bfloat16: digits will take ten times" in capsys.readouterr().err
    assert found == said


def test_a_count_stays_a_count_and_a_share_a_share(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    one = "{network: lenet5, data: digits, epochs: 2, k: %s}"
    values = {"a": "1", "b": "1.0", "c": '{"*fc1": 3, "*fc2": 0.5}'}
    tasks = ", ".join(f"{name}: {one % k}" for name, k in values.items())
    path.write_text(f"tasks: {{{tasks}}}\nmethods: []")
    found = [task.k for task in read_suite(str(path), KNOWN).tasks]
    assert [(type(k), k) for k in found[:2]] == [(int, 1), (float, 1.0)]
    assert [(name, type(k), k) for name, k in found[2].items()] == [
        ("*fc1", int, 3),
        ("*fc2", float, 0.5),
    ]


def test_a_part_of_a_suite() -> None:
    suite = read_suite("paper", KNOWN)
    part = suite.only(["vgg16-cifar10-*"], ["homotopy, *", "dense"], [1])
    assert [task.name for task in part.tasks] == ["vgg16-cifar10-25", "vgg16-cifar10-10"]
    assert part.methods == (
        "dense",
        "homotopy, structure, layer",
        "homotopy, structure, global",
        "homotopy, channel, layer",
    )
    assert part.seeds == (1,)
    assert suite.only() == suite


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "vgg"], "--task must be one of ['digits'], got 'vgg'"),
        (["--method", "homotopi"], "--method must be one of ['homotopy, structure, layer']"),
        (["--seed", "7"], "--seed must be one of [0], got 7"),
        (["report", "--seed", "0", "--task", "d*"], None),
        (["report", "--method", "dense"], "--method must be one of"),
    ],
)
def test_parts_that_are_not_there_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str | None,
) -> None:
    (tmp_path / "small.yaml").write_text(SUITE)
    called = command(tmp_path, *more)
    monkeypatch.setattr(sys, "argv", called[called.index("examples.benchmark") :])
    assert main() == (0 if words is None else 2)
    assert (words or "") in capsys.readouterr().err


def test_a_report_is_of_a_whole_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(SUITE.replace("[0]", "[0, 1]"))
    called = command(tmp_path, "report", "--seed", "1")
    monkeypatch.setattr(sys, "argv", called[called.index("examples.benchmark") :])
    assert main() == 2
    assert "choose what is run, nothing else" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "method", ["homotopy, structure, layer", "gradual magnitude", "one-shot magnitude", "HSPG"]
)
def test_the_mask_is_fixed_when_the_task_says(tmp_path: Path, method: str) -> None:
    task = replace(TASK, freeze=0.75)
    assert METHODS["gradual magnitude"].tried(task) == pytest.approx((0.45, 0.6, 0.75))
    record = execute(Run(task, method, METHODS[method].tried(task)[-1], 3, trial=False), tmp_path)
    alive = [sum(count for count, _ in epoch.values()) for epoch in record["alive"]]
    assert min(alive[:2]) > record["budget"]
    assert alive[3] == record["budget"]
    assert "mask fixed after 75% of them" in described(task)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("homotopy, structure, layer", 1e-4),
        ("gradual magnitude", 0.5),
        ("paper, structure, layer", 0.0),  # magnitude, once
    ],
)
def test_lenet_meets_its_budget_with_every_method(
    fashion_mnist: Path, method: str, value: float
) -> None:
    data = DATA["fashion-mnist"](fashion_mnist.parent, 128, "cpu")
    data.setup()
    (task, _) = read_suite("lenet_freeze", KNOWN).tasks
    network = NETWORKS[task.network](**task.arguments)
    situation = Situation(task, network, torch.zeros(2, *data.image_shape))
    pruning = METHODS[method].make(situation, value)
    quiet_trainer(5, pruning.callbacks, 0.1).fit(Classifier(network), data)
    groups = group_parameters(network, **situation.groups())
    alive = {name: int(part.sum()) for name, part in groups.split(groups.alive()).items()}
    assert alive == {layer.name: layer.budget for layer in groups.layers}
    assert accuracy(network, data.test_dataloader()) > 40  # chance is 10


def test_resnet18_meets_one_budget_for_all_its_groups(fashion_mnist: Path) -> None:
    data = DATA["fashion-mnist"](fashion_mnist.parent, 8, "cpu")
    data.setup()
    (task, _) = read_suite("resnet18_structure", KNOWN).tasks
    network = NETWORKS[task.network](**task.arguments)
    situation = Situation(task, network, torch.zeros(2, *data.image_shape))
    pruning = METHODS["homotopy, structure, global"].make(situation, 1e-4)
    quiet_trainer(task.epochs, pruning.callbacks, 2).fit(Classifier(network), data)
    groups = group_parameters(network, **pruning.groups)
    assert int(groups.alive().sum()) == round(0.3 * len(groups))


@pytest.mark.parametrize("method", ["ProxSGD", "HSPG"])
def test_methods_without_a_budget_have_what_the_penalty_leaves(
    fashion_mnist: Path, tmp_path: Path, method: str
) -> None:
    (task, _) = read_suite("half_space", KNOWN).tasks
    run = Run(replace(task, share_of_epoch=0.01, epochs=2), method, 10.0, 0, trial=False)
    record = protocol.execute(run, fashion_mnist.parent, tmp_path / "work", "cpu")
    assert set(record["alive"][-1]) == {"conv1", "conv2", "fc1", "fc2"}
    assert sum(count for count, _ in record["alive"][-1].values()) < record["budget"] == 226


def test_a_run_whose_time_is_over_ends_its_epoch_and_goes_on(tmp_path: Path) -> None:
    run = run_of("gradual magnitude")
    whole = execute(run, tmp_path)
    for epoch in range(1, TASK.epochs):
        with pytest.raises(SystemExit) as ended:
            protocol.execute(run, tmp_path, tmp_path / "work", "cpu", until=0.0)
        assert ended.value.code == 75
        assert epochs_in(tmp_path / "work" / "last.ckpt") == epoch
    resumed = protocol.execute(run, tmp_path, tmp_path / "work", "cpu", until=0.0)
    for key in ("validation", "loss", "alive", "test_accuracy"):
        assert resumed[key] == whole[key], key


def test_a_suite_whose_time_is_over_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(SUITE)
    called = command(tmp_path, "--minutes", "0")
    monkeypatch.setattr(sys, "argv", called[called.index("examples.benchmark") :])
    assert main() == 75
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"python -m examples.benchmark report --suite {tmp_path / 'small.yaml'}")

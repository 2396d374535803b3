"""Methods that start from a dense network and end with the same share of its operations."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from examples.benchmark import run as protocol
from examples.benchmark.__main__ import main
from examples.benchmark.callbacks import Checkpoint
from examples.benchmark.method_api import Situation
from examples.benchmark.methods import METHODS
from examples.benchmark.records import Records
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.report import report, runs_of
from examples.benchmark.scheduler import Folders, finals, trials, waiting
from examples.benchmark.suite import Run, Suite, Task, read_suite
from examples.models.lenet import SmallConvNet
from examples.models.resnet import CifarResNet
from examples.sizes import budget_for_operations
from lightning_wgsef import group_parameters, slim
from lightning_wgsef.network.flops import layer_flops
from tests.helpers.benchmark_runs import WRITE, stopping

KNOWN = {"network": NETWORKS, "data": DATA, "methods": METHODS}
EXAMPLE = torch.zeros(2, 1, 8, 8)
TASK = Task(
    name="digits-50",
    network="small-conv",
    data="digits",
    epochs=4,
    operations=0.5,
    pretrained={"epochs": 6, "lr": 0.1},
    batch_size=64,
)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(protocol, "PLAIN_STEPS", 2)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("share", [0.6, 0.25, 0.1])
def test_widths_leave_the_share_of_the_operations_that_was_asked_for(share: float) -> None:
    """Removed by hand: the network of these widths has them."""
    network = SmallConvNet((16, 32, 64))
    budget = budget_for_operations(network, share, EXAMPLE, grouping="structure")
    assert isinstance(budget, dict)
    widths = [budget[f"*conv{i}"] for i in (1, 2, 3)]
    small = SmallConvNet(widths)
    left = layer_flops(small, EXAMPLE)[1] / layer_flops(network, EXAMPLE)[1]
    assert left == pytest.approx(share, rel=0.05)
    shares = [width / count for width, count in zip(widths, (16, 32, 64), strict=True)]
    assert max(shares) - min(shares) <= 1 / 16


def test_names_that_end_alike_are_told_apart() -> None:
    """'conv' of the stem, and 'blocks.0.conv1'; within the module of a training, too."""
    network = CifarResNet(8, width=4)
    example = torch.zeros(2, 3, 32, 32)
    budget = budget_for_operations(network, 0.3, example, grouping="structure")
    holder = nn.Module()
    holder.network = network
    holder.forward = network.forward  # type: ignore[method-assign]
    for model in (network, holder):
        groups = group_parameters(model, "structure", budget, example_input=example)
        found = {layer.name.removeprefix("network."): layer.budget for layer in groups.layers}
        assert found == {name.removeprefix("*"): count for name, count in budget.items()}


def test_the_network_is_left_as_it_was_and_one_budget_is_a_number() -> None:
    torch.manual_seed(0)
    network = SmallConvNet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    arguments = {"grouping": "structure", "scope": "global"}
    budget = budget_for_operations(network, 0.4, EXAMPLE, **arguments)
    assert isinstance(budget, int)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    groups = group_parameters(network, k=budget, example_input=EXAMPLE, **arguments)
    assert float(groups.budgets.sum()) == budget


def test_a_share_that_no_budget_leaves_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share must be at least 0\.\d+.*got 0.0001"):
        budget_for_operations(SmallConvNet(), 1e-4, EXAMPLE, grouping="structure")


def test_the_small_network_trains_like_the_dense_one_in_the_precision_of_its_task() -> None:
    settings = {"epochs": 6, "lr": 0.1, "precision": "bf16-mixed"}
    task = replace(TASK, epochs=4, pretrained=settings)
    found = {x: task.of(x) for x in ("dense", "small from scratch", "homotopy, structure, layer")}
    assert [x.epochs for x in found.values()] == [6, 10, 4]
    assert [x.lr for x in found.values()] == [0.1, 0.1, TASK.lr]
    assert [x.precision for x in found.values()] == ["bf16-mixed", "32-true", "32-true"]


def execute(run: Run, folder: Path, weights: Path) -> dict[str, Any]:
    return protocol.execute(run, folder, folder / "work", "cpu", weights)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The record and the weights of the network that others start from."""
    folder = tmp_path_factory.mktemp("dense")
    run = Run(TASK, "ProxSGD", 0.0, 3, trial=False).pretraining
    assert run is not None
    assert (run.task.epochs, run.task.lr, run.task.pretrained) == (6, 0.1, None)
    record = execute(run, folder, folder / "weights.safetensors")
    assert record["test_accuracy"] > 90
    return record, folder / "weights.safetensors"


@pytest.mark.parametrize(
    "method",
    [
        "homotopy, structure, layer",
        "homotopy, structure, global",
        "Torch-Pruning",
        "prune, then train",
        *(
            pytest.param(x, marks=pytest.mark.sweep)
            for x in ("PAT, global", "ProxSGD", "small from scratch")
        ),
    ],
)
def test_methods_start_from_the_dense_network_and_end_at_its_share(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dense: tuple[dict[str, Any], Path],
    method: str,
) -> None:
    whole, weights = dense
    run = Run(TASK.of(method), method, METHODS[method].tried(TASK)[1], 3, trial=False)
    started: list[dict[str, Any]] = []

    def sized(situation: Situation, run: Run, real: Any = protocol.sized) -> Situation:
        started.append({name: x.clone() for name, x in situation.network.state_dict().items()})
        return real(situation, run)

    monkeypatch.setattr(protocol, "sized", sized)
    record = execute(run, tmp_path, weights)
    left = record["flops"][1] / record["flops"][0]
    if "global" in method:  # what training moves is another thing than what norms say before
        alive = sum(count for count, _ in record["alive"][-1].values())
        assert alive == record["budget"] == record["k"]
        assert left < 0.8
    else:
        assert left == pytest.approx(0.5, rel=0.05)
        assert record["k"] == 0.5 if "prune" in method else isinstance(record["k"], dict)
    if method == "small from scratch":
        assert len(record["validation"]) == 10
        assert run.task.lr == 0.1
    else:
        assert len(record["validation"]) == 4
        torch.testing.assert_close(started[0], load_file(weights), rtol=0, atol=0)
    assert runs_of([record, whole], TASK, method) == [record]
    assert runs_of([record, whole], replace(TASK, operations=0.25), method) == []
    assert runs_of([record, whole], replace(TASK, operations=0.25), "dense") == [whole]
    if "global" not in method:
        return
    assert run.pretraining is not None
    assert run.pretraining.name == whole["name"]
    # The budget of a resumed run is that of the network it started from.
    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", stopping(0))
    with pytest.raises(RuntimeError, match="stop"):
        execute(run, tmp_path, weights)
    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", WRITE)
    resumed = execute(run, tmp_path, weights)
    for key in ("k", "validation", "loss", "alive", "test_accuracy", "flops"):
        assert resumed[key] == record[key], key


def test_weights_of_another_memory_format_are_kept(tmp_path: Path) -> None:
    """That is how a GPU trains them."""
    network = CifarResNet(8, width=4).to(memory_format=torch.channels_last)
    protocol.save_weights(network, tmp_path / "new" / "dense.safetensors")
    found = load_file(tmp_path / "new" / "dense.safetensors")
    torch.testing.assert_close(found, dict(network.state_dict()), rtol=0, atol=0)


def test_what_cannot_be_left_is_the_share_of_tied_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    situation = Situation(TASK, SmallConvNet(), EXAMPLE)
    real = budget_for_operations

    def refuses(network: nn.Module, share: float, example: Any, **groups: Any) -> Any:
        if groups["grouping"] == "filter":
            raise ValueError("no")
        return real(network, share, example, **groups)

    monkeypatch.setattr(protocol, "budget_for_operations", refuses)
    run = Run(TASK, "PAT, group lasso", 1e-3, 0, trial=False)
    k = protocol.sized(situation, run).task.k
    tied = real(situation.network, 0.5, EXAMPLE, grouping="structure", exclude=None)
    assert k == pytest.approx(sum(tied.values()) / (16 + 32 + 64))


def test_the_dense_networks_are_trained_first(tmp_path: Path) -> None:
    suite = Suite(
        "s",
        (TASK, replace(TASK, name="digits-25", operations=0.25)),
        ("dense", "gradual magnitude", "small from scratch", "ProxSGD"),
        seeds=(0, 1),
        trial_seed=0,
        fixed={"gradual magnitude": 0.5, "small from scratch": 1.0},
        seeds_of={"ProxSGD": [0]},
    )
    records = Records(tmp_path / "records.jsonl")
    folders = Folders(tmp_path, records, tmp_path, tmp_path / "weights")
    dense = finals(suite, TASK, "dense", folders)
    assert [run.seed for run in dense] == [0, 1]
    assert not trials(suite, TASK, "dense")
    assert not trials(suite, TASK, "gradual magnitude")
    assert [run.seed for run in trials(suite, TASK, "ProxSGD")] == [0, 0, 0]
    assert {run.method for run in waiting(suite, folders)} == {"dense", "small from scratch"}
    for run in dense:
        records.append({"name": run.name})
    # The weights of the second one were lost.
    folders.weights.mkdir()
    folders.weights_of(dense[0]).touch()
    now = {(run.method, run.seed) for run in waiting(suite, folders)}
    assert now == {
        ("dense", 1),
        ("gradual magnitude", 0),
        ("small from scratch", 0),
        ("small from scratch", 1),
        ("ProxSGD", 0),
    }


SUITE = """
defaults: {network: small-conv, data: digits, epochs: 2, batch_size: 64, pretrained: {epochs: 2}}
tasks: {quarter: {operations: 0.25}, tiny: {operations: 0.25, network: lenet5}}
methods: [dense, "homotopy, structure, layer", small from scratch]
fixed: {"homotopy, structure, layer": 1.0e-4, small from scratch: 1.0}
seeds: [0]
anchors: {a paper: ["97.0", 60 %, 9 epochs]}
"""


def test_a_whole_suite_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that fail, an image of 8 pixels is too small for LeNet-5, say why and stop no other."""
    (tmp_path / "small.yaml").write_text(SUITE)
    paths = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    command = ["benchmark", "--suite", str(tmp_path / "small.yaml"), *paths]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 1
    said = capsys.readouterr()
    assert "failed: ValueError: example_input must be what LeNet5" in said.out + said.err
    monkeypatch.setattr(sys, "argv", [*command, "--task", "quarter"])
    assert main() == 0  # nothing is left to do
    folder = tmp_path / "results" / "small"
    records = Records(folder / "records.jsonl").all()
    assert len(records) == 3
    (weights,) = (folder / "weights").iterdir()
    assert weights.stem in {record["name"] for record in records}
    assert load_file(weights).keys() == SmallConvNet().state_dict().keys()
    monkeypatch.setattr(sys, "argv", [*command, "report"])
    assert main() == 0
    text = (folder / "README.md").read_text()
    assert "small-conv on digits, 25% of the operations, 2 epochs from dense networks of 2" in text
    assert "| a paper | 97.0 | 60 % | 9 epochs |" in text
    assert text.count("| small from scratch |") == 2


def test_other_sizes_are_said() -> None:
    suite = Suite("s", (TASK,), ("gradual magnitude",), seeds=(0,))
    run = Run(TASK, "gradual magnitude", 0.5, 0, trial=False)
    record = {
        "name": run.name,
        "task": vars(TASK),
        "method": run.method,
        "value": 0.5,
        "seed": 0,
        "trial": False,
        "test_accuracy": 80.0,
        "slim_test_accuracy": 80.0,
        "before_freeze": 70.0,
        "after_freeze": 70.0,
        "alive": [{"a": [2, 4]}],
        "budget": 2.0,
        "parameters": [100, 30],
        "step_ratios": [1.0],
        "peak_bytes": 1,
        "hardware": "a machine",
        "date": "2026-01-01",
        "versions": {},
    }
    said = "Of other sizes, by more than 2 %: gradual magnitude 52.0%."
    assert said in report(suite, [{**record, "flops": [100, 52]}], {}, "command")
    assert said[:20] not in report(suite, [{**record, "flops": [1000, 509]}], {}, "command")


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("epochs: 2", "task 'a' must have one of 'k' and 'operations'"),
        ("epochs: 2, k: 0.5, operations: 0.5", "must have one of 'k' and 'operations'"),
        ("epochs: 2, operations: 0.5, pretrained: {lr: 0.1}", "pretrained must have 'epochs'"),
        ("epochs: 2, operations: 0.5, pretrained: {epoch: 3}", "did you mean 'epochs'?"),
        ("epochs: 2, operations: 0.5, pretrained: {epochs: x}", "epochs"),
        ("epochs: 2, operations: much", "operations"),
    ],
)
def test_bad_settings_say_what_is_known(tmp_path: Path, own: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"tasks: {{a: {{network: lenet5, data: digits, {own}}}}}\nmethods: []")
    with pytest.raises(ValueError, match=re.escape(words)):
        read_suite(str(path), KNOWN)


def test_a_method_with_a_fixed_value_has_to_be_known(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("tasks: {}\nmethods: []\nfixed: {HESO: 1}")
    with pytest.raises(ValueError, match="did you mean 'HESSO'"):
        read_suite(str(path), KNOWN)


@pytest.mark.sweep
def test_resnet20_keeps_the_share_by_widths_alone() -> None:
    """Within 2 % of what the suite asks for; slim makes it of these widths."""
    suite = read_suite("resnet20", KNOWN)
    network = CifarResNet(20)
    example = torch.zeros(2, 3, 32, 32)
    assert [task.operations for task in suite.tasks] == [0.5, 0.25, 0.5, 0.25]
    budget = budget_for_operations(network, 0.25, example, grouping="structure")
    groups = group_parameters(network, "structure", budget, example_input=example)
    first = [torch.arange(layer.count) < layer.budget for layer in groups.layers]
    groups.scale_(torch.cat(first).to(groups.dtype))
    left = layer_flops(slim(network, example), example)[1]
    assert left / layer_flops(network, example)[1] == pytest.approx(0.25, rel=0.02)
